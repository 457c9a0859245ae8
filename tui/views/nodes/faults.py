"""What is wrong on which node, in words, the gravest first; and what each GPU did in the last minutes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from midwatch.protocol import Fault, Gpu, NodeView, Snapshot
from tui.chart.formatting import age
from tui.views.nodes.table import ORDER, QUANTITIES, SLOW, STALE, Fleet, Floats, figures, rank_at, rank_of

SAMPLE_SECONDS = 3.0
SAMPLES = 100
"""Five minutes; at 4,096 GPUs six megabytes."""


class Trouble(NamedTuple):
    """One line of what is worst."""

    node: str
    place: int  # of the unit on its node; -1: the node itself
    what: str  # `GPU 3`, or nothing for the node itself
    mark: str
    text: str
    time: float = 0.0  # when it was first seen, by the node's clock; 0: not known
    rank: int | None = None


def state_trouble(node: NodeView) -> Trouble | None:
    """What a node's own state tells of."""
    if node.state in ("up", "spare", "starting"):
        return None
    note = f": {node.note}" if node.note else ""
    return Trouble(node.name, -1, "", "!" if node.state in ("gone", "out of reach") else " ", f"{node.state}{note}")


def faults_of(gpu: Gpu) -> list[Fault]:
    """Its faults, and that it does not answer where no fault says so."""
    found = list(gpu.faults)
    if gpu.stale is not None and not found:
        found.append(Fault("stale", "does not answer; its figures are old", gpu.stale))
    return found


def troubles(fleet: Fleet, most: int) -> list[Trouble]:
    """At most so many: nodes that are away, faulty GPUs, slow ranks, then those worst by the quantity that is shown."""
    found: list[Trouble] = []
    away = [trouble for node in fleet.nodes if (trouble := state_trouble(node)) is not None]
    found += [trouble for trouble in away if trouble.mark == "!"]
    marked = np.flatnonzero(fleet.marks != " ").tolist()
    marked.sort(key=lambda unit: (ORDER.find(str(fleet.marks[unit])), -_slowness(fleet, unit), unit))
    found += [_of_unit(fleet, unit) for unit in marked[:most]]
    found += [trouble for trouble in away if trouble.mark != "!"]
    if len(found) < most:
        taken = set(marked)
        order = np.argsort(fleet.values * -fleet.quantity.worst, kind="stable")
        for unit in order.tolist():
            if len(found) >= most or np.isnan(fleet.values[unit]):
                break
            if unit not in taken:
                found.append(_of_unit(fleet, unit))
    return found[:most]


def _slowness(fleet: Fleet, unit: int) -> float:
    node, place = int(fleet.node_of[unit]), int(fleet.place_of[unit])
    rank = rank_at(fleet.nodes[node], fleet.kinds[node], place)
    straggler = fleet.slow.get(rank) if rank is not None else None
    return straggler.own if straggler is not None else 0.0


def _of_unit(fleet: Fleet, unit: int) -> Trouble:
    """The gravest that is to be said of a unit; of one with nothing wrong, its value."""
    number, place = int(fleet.node_of[unit]), int(fleet.place_of[unit])
    node, kind, mark = fleet.nodes[number], fleet.kinds[number], str(fleet.marks[unit])
    rank = rank_at(node, kind, place)
    what = f"{kind} {place if kind != 'rank' or rank is None else rank}"
    if mark == " ":
        return Trouble(node.name, place, what, " ", fleet.words(float(fleet.values[unit])), 0.0, rank)
    gpus = node.stats.gpus if node.stats is not None else ()
    if mark != SLOW and kind == "GPU" and place < len(gpus):
        first = faults_of(gpus[place])[0]
        return Trouble(node.name, place, what, mark, first.text, first.time, rank)
    straggler = fleet.slow[rank] if rank is not None else None
    text = straggler_words(straggler.own, straggler.median) if straggler is not None else ""
    return Trouble(node.name, place, what, mark, text, straggler.since if straggler is not None else 0.0, rank)


def straggler_words(own: float, median: float) -> str:
    """How slow a rank is."""
    ratio = own / median if median > 0 else 0.0
    return f"{ratio:.1f} times the median: {_span(own)} of its own a step, {_span(median)} the others"


def _span(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def newest_fault(node: NodeView, now: float) -> tuple[int, str]:
    """How many GPUs of a node have faults, and the newest fault in words."""
    stats = node.stats
    if stats is None:
        return 0, ""
    faulty = [gpu for gpu in stats.gpus if gpu.faults or gpu.stale is not None]
    if not faulty:
        return 0, ""
    when, index, text = max((fault.time, gpu.index, fault.text) for gpu in faulty for fault in faults_of(gpu))
    ago = age(now - when) if when else ""
    return len(faulty), f"GPU {index}: {text}" + (f" ({ago} ago)" if ago and ago != "now" else "")


def marks_in(fleet: Fleet) -> list[str]:
    """The letters that are in sight, the gravest first."""
    present = set(np.unique(fleet.marks).tolist())
    return [letter for letter in ORDER if letter in present]


def counted(fleet: Fleet) -> str:
    """How many are faulty, slow, and do not answer, in a few words."""
    letters = "".join(fleet.marks.tolist())
    slow, stale = letters.count(SLOW), letters.count(STALE)
    faulty = len(letters) - letters.count(" ") - slow - stale
    told = [f"{faulty:,} faulty"] if faulty else []
    told += [f"{slow:,} slow"] if slow else []
    told += [f"{stale:,} silent"] if stale else []
    return ", ".join(told)


class History:
    """The last minutes of every GPU, [SAMPLES] of each quantity, kept by the screen from the first look on."""

    def __init__(self) -> None:
        self._past: dict[str, deque[np.ndarray]] = {}
        self._times: deque[float] = deque(maxlen=SAMPLES)

    def record(self, snapshot: Snapshot) -> None:
        """Takes a snapshot in, unless the last one is too fresh."""
        if self._times and 0 <= snapshot.time - self._times[-1] < SAMPLE_SECONDS:
            return
        self._times.append(snapshot.time)
        for node in snapshot.nodes:
            past = self._past.setdefault(node.name, deque(maxlen=SAMPLES))
            past.append(_sample(node))
        for name in self._past.keys() - {node.name for node in snapshot.nodes}:
            del self._past[name]

    def of(self, node: str, place: int, key: str) -> Floats:
        """A unit's values of one quantity, oldest first; NaN where there were none."""
        number = next(at for at, quantity in enumerate(QUANTITIES) if quantity.key == key)
        samples = self._past.get(node, ())
        found = [sample[number, place] if place < sample.shape[1] else np.nan for sample in samples]
        return np.array(found, np.float64)

    @property
    def seconds(self) -> float:
        return self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0


def _sample(node: NodeView) -> np.ndarray:
    """[quantities, units], in half precision: a sparkline shows no more. Without GPUs, CPUs and ranks."""
    stats = node.stats
    if stats is None:
        return np.full((len(QUANTITIES), 0), np.nan, np.float16)
    own = {beat.rank: beat.own or np.nan for beat in stats.ranks}
    if stats.gpus:
        rows: list[Sequence[float | None]] = [figures(stats.gpus, quantity.key) for quantity in QUANTITIES[:-1]]
        ranks = [rank_of(node, place) for place in range(len(stats.gpus))]
        rows.append([np.nan if rank is None else own.get(rank, np.nan) for rank in ranks])
        return np.array(rows, np.float16)
    units = max(len(stats.cpus), len(stats.rank_rss), len(stats.ranks))
    sample = np.full((len(QUANTITIES), units), np.nan, np.float16)
    sample[0, : len(stats.cpus)] = stats.cpus
    sample[1, : len(stats.rank_rss)] = [rss / max(stats.memory_total, 1) for rss in stats.rank_rss]
    sample[-1, : len(own)] = [own[rank] for rank in sorted(own)]
    return sample
