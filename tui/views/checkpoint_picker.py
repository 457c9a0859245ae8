"""The list of checkpoints to choose one from: those that are kept, the newest first, goldens marked."""

from midwatch.protocol import CheckpointView
from tui.chart.formatting import UNICODE, age, compact
from tui.chart.styles import Ink
from tui.core.scene import Scene, checkpoint_flags, speaks_against
from tui.core.text_panel import Line, LineWindow, Run

NEWEST: tuple[str, Line] = ("newest", [("newest", Ink.TEXT), (" whichever that is when asked", Ink.FAINT)])
NOBODY: tuple[str, Line] = ("", [("nobody: one column", Ink.TEXT)])


class Choice(LineWindow):
    """What stands at the cursor is `chosen`, by its name; the empty one is nobody."""

    DEFAULT_CSS = "Choice { height: 1fr; display: none; }"

    def __init__(self) -> None:
        super().__init__(choosing=True)
        self._names: list[str] = []
        self._optional = False

    @property
    def chosen(self) -> str:
        return self._names[self.cursor]

    def open(self, scene: Scene, chosen: str, *, optional: bool) -> None:
        """optional: there may be nobody."""
        self._optional = optional
        self.refill(scene)
        if chosen in self._names:
            self.choose(self._names.index(chosen))

    def refill(self, scene: Scene) -> None:
        """There may be others now; the cursor stays where it is."""
        before = self.chosen if self.cursor < len(self._names) else None
        snapshot = scene.snapshot
        kept = sorted(snapshot.checkpoints, key=lambda c: (c.time, c.step), reverse=True) if snapshot is not None else []
        entries = [*([NOBODY] if self._optional else []), NEWEST, *((c.id, _row(c, scene)) for c in kept)]
        self._names = [name for name, _ in entries]
        self.show([line for _, line in entries])
        if before in self._names:
            self.choose(self._names.index(before))


def _row(checkpoint: CheckpointView, scene: Scene) -> list[Run]:
    star = "★" if UNICODE else "*"
    against = bool(speaks_against(checkpoint))
    mark, ink = (star, Ink.GOLD) if checkpoint.golden else ("?", Ink.ALARM) if against else (" ", Ink.FAINT)
    main = Ink.TEXT if checkpoint.on_line else Ink.GHOST
    loss = f"loss {compact(checkpoint.loss):<7} " if checkpoint.loss is not None else " " * 13
    return [
        (f"{checkpoint.id:<12.12} ", main),
        (f"{mark} ", ink),
        (f"{checkpoint.stage:.9} {checkpoint.stage_step:,}".ljust(15), Ink.FAINT),
        (loss, main),
        (f"{age(scene.now - scene.skew - checkpoint.time):>8} ago  ", Ink.FAINT),
        (", ".join(checkpoint_flags(checkpoint)), ink if checkpoint.golden or against else Ink.FAINT),
    ]
