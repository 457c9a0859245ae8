"""The help: the table of keys, as they work here; what is not there yet, said as such."""

from textual.app import ComposeResult

from midwatch.commands import BY_NAME, usage
from tui.chart.styles import Ink
from tui.core import keys
from tui.core.chrome import shown_key
from tui.core.keys import MOVE, register
from tui.core.scene import Scene
from tui.core.text_panel import Line, LineWindow
from tui.views.base import View


@register(
    "",
    "help",
    "",
    place=99,
    keys=MOVE,
)
class HelpView(View):
    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rows = self._list = LineWindow()

    def compose(self) -> ComposeResult:
        yield self._list

    def show(self, scene: Scene) -> None:
        self._list.show(lines(scene.read_only))

    def settled(self) -> bool:
        return self._list.size.height > 0 and bool(self._list.lines)

    def status(self) -> Line:
        return [(f"help: {self._list.place()} (up, down; Esc goes back)", Ink.FAINT)]

    def moved(self) -> None:
        self.midwatch.draw_foot()


def lines(read_only: bool) -> list[Line]:
    """The help's text."""
    found: list[Line] = []
    views = [key for key in keys.everywhere() if key.action.startswith("open:")]
    rest = [key for key in keys.everywhere() if key not in views and key not in keys.COMMANDS and not key.planned]
    commands = "Commands" + (" (not bound: this screen is read-only)" if read_only else "; those that lose something ask first")
    sections: list[tuple[str, list[keys.Key]]] = [("Views", views), (commands, list(keys.COMMANDS)), ("Everywhere", rest)]
    sections += [(f"In {name}", list(own)) for name, own in keys.all_of_views().items()]
    sections.append(("Not there yet", [key for key in keys.everywhere() if key.planned]))
    for title, table in sections:
        found.append([(f" {title}", Ink.TITLE)])
        for key in table:
            dim = key.planned or (key.changes and read_only)
            ink = Ink.FAINT if dim else Ink.KEY
            found.append([(f"   {shown_key(key.shown):<6}", ink), (key.text, Ink.FAINT if dim else Ink.TEXT)])
        found.append([])
    found.append([(" On the command line", Ink.TITLE)])
    for name, specs in BY_NAME.items():
        found.append([(f"   :{usage(name):<44}", Ink.KEY), (specs[0].help, Ink.TEXT)])
        found += [[(f"    {'':<44}", Ink.KEY), (f"{spec.flag}: {spec.help}", Ink.TEXT)] for spec in specs if spec.flag]
    found.append([("   a ! after the first word (:stop!) does it without asking", Ink.TEXT)])
    return found
