"""The keys: one table drives dispatch, the footer, the help and docs/keys.md alike.

A key's action `open:watch` calls `do_open("watch")` on the view that is open, or on the app where the view has no such method. The
keys of commands are in the commands' specs; their action is `command:VERB`. Keys are plain letters and arrows: terminals and
multiplexers lose the others.
"""

from typing import NamedTuple

from midwatch.commands import SPECS


class Key(NamedTuple):
    keys: tuple[str, ...]  # as Textual names them
    shown: str
    text: str  # in the help
    action: str
    short: str = ""  # in the footer; empty: not there
    changes: bool = False  # asks something of the run: not bound on a read-only screen
    planned: bool = False  # not there yet


class ViewName(NamedTuple):
    key: str
    name: str
    text: str


VIEWS = (
    ViewName("w", "watch", "pipeline, state, loss, KL and reward, GPUs, newest events"),
    ViewName("m", "metrics", "every metric on one time line, with stage borders and rolled-back lineages"),
    ViewName("n", "nodes", "every GPU as a heat map, faults, stragglers; down to one GPU and its rank"),
    ViewName("k", "checkpoints", "lineages as a tree, goldens marked; mark, compare, roll back"),
    ViewName("t", "stages", "objective, mixture, cost, held-out losses, samples; advance"),
    ViewName("b", "probe", "talk to a checkpoint, next-token probabilities, two side by side"),
    ViewName("y", "samples", "what the model writes, with reward and KL: newest, best, worst, longest, furthest"),
    ViewName("o", "prefer", "preferences by hand: two answers side by side, and which is better"),
    ViewName("l", "logs", "every rank, node and the controller, searchable"),
    ViewName("j", "journal", "who did what, when, and what came of it"),
)

PLANNED = (ViewName("d", "data", "what was read: mixture against target, any past batch as text"),)


def _commands(view: str = "") -> tuple[Key, ...]:
    """The keys that give commands in this view; without one, everywhere."""
    bound = [(spec.verb, spec.key) for spec in SPECS if spec.key is not None and spec.key.view == view]
    return tuple(Key((key.key,), key.key, key.help, f"command:{verb}", key.short, changes=True) for verb, key in bound)


COMMANDS = _commands()

GLOBAL = (
    *(Key((view.key,), view.key, f"{view.name}: {view.text}", f"open:{view.name}") for view in VIEWS),
    *COMMANDS,
    Key(("colon",), ":", "a command line; Tab completes, arrows go through what was typed before", "prompt", "type"),
    Key(("question_mark",), "?", "this help", "open:help"),
    Key(("H",), "H", "stacks of the last hang, in logs", "stacks"),
    Key(("escape",), "Esc", "go back; hide a notice", "back"),
    Key(("q",), "q", "detach: the run goes on without this screen", "detach", "detach"),
    *(Key((view.key,), view.key, f"{view.name}: {view.text}", f"missing:{view.name}", planned=True) for view in PLANNED),
)

_MOVE = (
    Key(("up",), "↑", "up", "move:-1"),
    Key(("down",), "↓", "down", "move:1"),
    Key(("pageup",), "PgUp", "a page up", "page:-1"),
    Key(("pagedown", "space"), "PgDn", "a page down", "page:1"),
    Key(("home",), "Home", "to the first", "end:-1"),
    Key(("end", "G"), "End", "to the last", "end:1"),
)
_READ = (
    Key(("enter",), "Enter", "the line whole, and back", "whole", "whole"),
    Key(("less_than_sign",), "<", "to the left", "shift:-1"),
    Key(("greater_than_sign",), ">", "to the right: what does not fit", "shift:1", "sideways"),
    Key(("W",), "W", "wrap long lines, or cut them", "wrap", "wrap"),
)
_FILTER = Key(("slash",), "/", "filter by a regular expression; an empty one ends it", "filter", "filter")

OF_VIEW: dict[str, tuple[Key, ...]] = {
    "watch": (Key(("z",), "z", "charts: this stage, or the whole run", "span", "span"),),
    "metrics": (
        _FILTER,
        Key(("plus", "equals_sign"), "+", "zoom in", "zoom:in", "zoom in"),
        Key(("minus",), "-", "zoom out", "zoom:out", "out"),
        Key(("0",), "0", "the whole run again", "zoom:all", "all"),
        Key(("left",), "←", "pan to earlier steps", "pan:-1"),
        Key(("right",), "→", "pan to later steps", "pan:1"),
        Key(("left_square_bracket",), "[", "crosshair to the left", "cross:-1", "crosshair"),
        Key(("right_square_bracket",), "]", "crosshair to the right", "cross:1"),
        Key(("enter",), "Enter", "one chart alone, and all again", "maximise", "one"),
        Key(("s",), "s", "smoothing: none, then wider", "smooth", "smooth"),
        Key(("L",), "L", "logarithmic y axis", "log", "log"),
        Key(("x",), "x", "x-axis labels: steps, tokens or time (columns are always steps)", "axis", "axis"),
        *_MOVE,
    ),
    "nodes": (
        _FILTER,
        Key(("v",), "v", "what is shown: utilisation, memory, power, temperature, SM, tensor, own time", "quantity", "values"),
        Key(("z",), "z", "by GPU, by node, by rack, or whichever fits", "level", "roll up"),
        Key(("f",), "f", "to the next one that is faulty or slow", "fault", "faulty"),
        Key(("enter",), "Enter", "one GPU: figures, last minutes, rank, faults; a rack: its nodes", "enter", "one"),
        Key(("left",), "←", "to the left", "walk:left"),
        Key(("right",), "→", "to the right", "walk:right"),
        Key(("up",), "↑", "up; on a GPU's page to the node before", "walk:up"),
        Key(("down",), "↓", "down; on a GPU's page to the next node", "walk:down"),
        *_commands("nodes"),
    ),
    "checkpoints": (
        Key(("enter",), "Enter", "details, and what a rollback to it would undo", "details", "details"),
        *_MOVE,
    ),
    "stages": _MOVE,
    "probe": (
        Key(("enter",), "Enter", "type a prompt; in the list: ask this checkpoint", "enter", "prompt"),
        Key(("1",), "1", "choose the checkpoint that answers", "choose:0", "whom"),
        Key(("2",), "2", "choose a second one beside it, or none", "choose:1", "beside"),
        Key(("a",), "a", "the prompt again, with another seed", "again", "again"),
        Key(("x",), "x", "stop the answer", "halt", "stop it"),
        Key(("e",), "e", "erase the conversation", "clear", "erase"),
        Key(("f",), "f", "form of the prompt: by the checkpoint's stage, chat, or text to be continued", "form", "form"),
        Key(("plus", "equals_sign"), "+", "higher temperature", "warm:0.1"),
        Key(("minus",), "-", "lower temperature; at 0 always the likeliest token", "warm:-0.1"),
        Key(("left",), "←", "the token before", "token:-1", "token"),
        Key(("right",), "→", "the next token", "token:1"),
        Key(("tab",), "Tab", "the other checkpoint's answer", "column"),
        *_MOVE,
    ),
    "samples": (
        _FILTER,
        Key(("s",), "s", "sort: newest, best, worst, longest, furthest from the reference first", "sort:next", "sort"),
        Key(("1",), "1", "newest first", "sort:step"),
        Key(("2",), "2", "best first", "sort:reward"),
        Key(("3",), "3", "worst first", "sort:worst"),
        Key(("4",), "4", "longest first", "sort:longest"),
        Key(("5",), "5", "furthest from the reference first", "sort:kl"),
        Key(("enter",), "Enter", "one whole: prompt, response, reward, KL; up and down go to others", "enter", "whole"),
        Key(("f",), "f", "follow the newest", "follow", "follow"),
        Key(("left",), "←", "the stage before, or all", "stage:-1", "stage"),
        Key(("right",), "→", "the next stage, or all", "stage:1"),
        *_MOVE,
    ),
    "prefer": (
        Key(("left", "1"), "←", "the left answer (or the upper one) is better; also 1", "choose:left", "left", changes=True),
        Key(("right", "2"), "→", "the right answer (or the lower one) is better; also 2", "choose:right", "right", changes=True),
        Key(("t",), "t", "a tie: neither is better", "choose:tie", "tie", changes=True),
        Key(("x",), "x", "both are bad", "choose:both-bad", "both bad", changes=True),
        Key(("s",), "s", "skip the pair", "choose:skip", "skip", changes=True),
        Key(("u",), "u", "undo: the last decision is taken back, and its pair comes again", "undo", "undo", changes=True),
        Key(("tab",), "Tab", "what is scrolled: the answers, or the prompt", "part"),
        Key(("enter", "space"), "Enter", "nothing, like Space: a slip decides nothing", "nothing"),
        Key(("p", "c", "g", "a"), "p", "disabled here, like c, g and a, to avoid steering the run by accident", "unbound"),
        *(key._replace(keys=tuple(each for each in key.keys if each != "space")) for key in _MOVE),
    ),
    "logs": (
        _FILTER,
        Key(("left",), "←", "the file before", "file:-1", "file"),
        Key(("right",), "→", "the next file", "file:1"),
        Key(("f",), "f", "follow the end, or hold", "follow", "follow"),
        *_READ,
        *_MOVE,
    ),
    "journal": (_FILTER, Key(("f",), "f", "follow the end, or hold", "follow", "follow"), *_READ, *_MOVE),
    "help": _MOVE,
}  # fmt: skip


def find(view: str, pressed: str) -> Key | None:
    """The key that was pressed, a view's own before everybody's."""
    return next((key for key in (*OF_VIEW.get(view, ()), *GLOBAL) if pressed in key.keys), None)
