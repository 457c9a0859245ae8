"""From a snapshot to what charts show besides their lines: stage borders, marks, rolled-back lineages; and when to ask anew."""

import time
from collections.abc import Awaitable, Callable

from textual.timer import Timer
from textual.widget import Widget
from textual.worker import Worker

from midwatch.protocol import Snapshot
from tui.chart.render import Border, ChartMark
from tui.core.scene import stage_spans

INTERVAL = 1.0
"""Seconds between two rounds of questions for charts."""
GHOSTS = 4
"""Rolled-back lineages drawn, the newest."""


class Fetcher:
    """Runs a view's round of questions at most once an interval, one at a time; `hurry` starts one at once."""

    def __init__(self, owner: Widget, fetch: Callable[[], Awaitable[None]], interval: float = INTERVAL) -> None:
        self._owner, self._fetch, self._interval = owner, fetch, interval
        self._worker: Worker[None] | None = None
        self._timer: Timer | None = None
        self._wanted = False
        self._last = -1e9

    @property
    def busy(self) -> bool:
        """Whether a round is under way, or will be."""
        return self._timer is not None or (self._worker is not None and self._worker.is_running)

    def want(self) -> None:
        """Some time soon."""
        if self._worker is not None and self._worker.is_running:
            self._wanted = True
        elif self._timer is None:
            wait = self._last + self._interval - time.monotonic()
            if wait <= 0:
                self._start()
            else:
                self._timer = self._owner.set_timer(wait, self._start)

    def hurry(self) -> None:
        """Now: what is under way is out of date."""
        if self._worker is not None and self._worker.is_running:
            self._worker.cancel()
        self._start()

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer = None
        self._wanted = False
        self._worker = self._owner.run_worker(self._run)

    async def _run(self) -> None:
        await self._fetch()
        self._last = time.monotonic()
        if self._wanted:
            self._wanted = False
            self._timer = self._owner.set_timer(self._interval, self._start)


def borders(snapshot: Snapshot) -> tuple[Border, ...]:
    """The first step of every stage that has begun."""
    return tuple(Border(span.start, span.stage.name) for span in stage_spans(snapshot) if span.stage.state != "waiting")


def marks(snapshot: Snapshot) -> tuple[ChartMark, ...]:
    """Checkpoints on the line in force, goldens, and where it was rolled back to."""
    found = [ChartMark(c.step, "golden" if c.golden else "checkpoint") for c in snapshot.checkpoints if c.on_line]
    found += [ChartMark(line.fork_step, "rollback") for line in snapshot.lineages if line.cause != "start"]
    return tuple(found)


def ghosts(snapshot: Snapshot) -> tuple[int, ...]:
    """Lineages that are no longer in force, the newest few."""
    return tuple(line.id for line in snapshot.lineages if line.id != snapshot.lineage)[-GHOSTS:]


def newest_step(snapshot: Snapshot) -> int:
    """The newest step that charts show: after a rollback, and until the run is past it, the last one of the line that was left."""
    line = next((line for line in snapshot.lineages if line.id == snapshot.lineage), None)
    left = snapshot.left_at.get(line.parent, 0) if line is not None and line.parent is not None and line.cause == "rollback" else 0
    return max(snapshot.step, left)


def short_name(metric: str) -> str:
    """`eval/stdlib/loss` is `stdlib`, what is measured while training is `training`; others keep their name."""
    head, _, rest = metric.partition("/")
    if head == "eval":
        return rest.rpartition("/")[0] or rest
    return "training" if metric in ("policy/reward", "policy/kl_sequence") else metric


def window(start: int, stop: int) -> int:
    """Steps of a gentle smoothing for a chart of these steps: a fiftieth of it, none for a short one."""
    return (stop - start) // 50 if stop - start >= 200 else 0
