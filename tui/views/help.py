"""The help: the table of keys, as they work here; what is not there yet, said as such."""

from textual.app import ComposeResult

from tui.chart.styles import Ink
from tui.core import keys
from tui.core.chrome import shown_key
from tui.core.scene import Scene
from tui.core.text_panel import Line, LineWindow
from tui.views.base import View


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
    views = [key for key in keys.GLOBAL if key.action.startswith("open:")]
    rest = [key for key in keys.GLOBAL if key not in views and key not in keys.COMMANDS and not key.planned]
    commands = "Commands" + (" (not bound: this screen is read-only)" if read_only else "; capitals ask first, with what is lost")
    sections: list[tuple[str, list[keys.Key]]] = [("Views", views), (commands, list(keys.COMMANDS)), ("Everywhere", rest)]
    sections += [(f"In {name}", list(own)) for name, own in keys.OF_VIEW.items()]
    sections.append(("Not there yet", [key for key in keys.GLOBAL if key.planned]))
    for title, table in sections:
        found.append([(f" {title}", Ink.TITLE)])
        for key in table:
            dim = key.planned or (key.changes and read_only)
            ink = Ink.FAINT if dim else Ink.KEY
            found.append([(f"   {shown_key(key.shown):<6}", ink), (key.text, Ink.FAINT if dim else Ink.TEXT)])
        found.append([])
    found.append([(" On the command line", Ink.TITLE)])
    for line in (
        ":rollback 140 --skip 5 --lr-scale 0.5    back to a checkpoint, past the next 5 steps of data, at half the rate",
        ":golden 140   :ungolden 140              trust a checkpoint, or no longer",
        ":set lr 1e-4                             a live setting, from the next step on",
        ":pause --release   :resume               checkpoint and give the machines back; take them again",
        ":advance --to sft   :stop   :stop --now  end the stage, the run, the run without a checkpoint",
        ":node drain NAME   :node add NAME        take a node out of use, or back; :node quarantine NAME at once",
        ":acknowledge all                         mark alarms as seen; or one, by its name",
        ":cancel 12                               cancel a command that waits",
        "a ! after the verb (:stop!) does it without asking",
    ):
        found.append([(f"   {line}", Ink.TEXT)])
    return found
