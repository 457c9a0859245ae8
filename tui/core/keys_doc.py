"""docs/keys.md, from the table of keys: `python -m tui.core.keys_doc` prints it, and a test holds the file to it."""

from midwatch.commands import BY_NAME, usage
from midwatch.terminal import write_out
from tui.core import keys

HEAD = """# Keys

Keyboard first; the mouse points at charts, scrolls and chooses. Commands that lose something are capitals; they ask first, show
what will be lost, and start with the focus on Cancel. A read-only screen (`midwatch attach --read-only`) binds no command. `?`
shows this on the screen.
"""

TAIL = """
## On the command line

`:` opens it; Tab completes, the arrows go through what was typed before, Esc leaves it. What is typed here is what the command
line of `midwatch` takes, without the run: `:rollback 140 --skip 5 --lr-scale 0.5`. Commands that lose something ask
first, unless a `!` ends the verb: `:stop! --now`. The names and letters of views open them; `:q` detaches.

| command | |
| --- | --- |
"""


def table(rows: list[keys.Key]) -> str:
    cells = "\n".join(f"| `{key.shown}` | {key.text} |" for key in rows)
    return f"\n| key | |\n| --- | --- |\n{cells}\n"


def meaning(name: str) -> str:
    """What the commands of a name do; those with a flag after it."""
    specs = sorted(BY_NAME[name], key=lambda spec: bool(spec.flag))
    return "; ".join(f"`{spec.flag}`: {spec.help}" if spec.flag else spec.help for spec in specs)


def page() -> str:
    views = [key for key in keys.everywhere() if key.action.startswith("open:")]
    planned = [key for key in keys.everywhere() if key.planned]
    rest = [key for key in keys.everywhere() if key not in (*views, *planned, *keys.COMMANDS)]
    parts = [HEAD, "\n## Views\n", table(views), "\n## Commands\n", table(list(keys.COMMANDS)), "\n## Everywhere\n", table(rest)]
    for name, own in keys.all_of_views().items():
        parts += [f"\n## In {name}\n", table(list(own))]
    usages = "\n".join(f"| `:{usage(name)}` | {meaning(name)} |" for name in BY_NAME)
    parts += [TAIL.rstrip("\n"), "\n", usages, "\n\n## Not there yet\n", table(planned)]
    return "".join(parts)


if __name__ == "__main__":
    write_out(page(), end="")
