"""The nodes as figures: one quantity of every GPU, what is wrong with which, and both rolled up by node and rack. Pure functions.

A unit is what one cell stands for: a GPU, or on a node without GPUs a CPU or a rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from midwatch.protocol import Gpu, NodeView, Snapshot, Straggler
from tui.chart.formatting import UNICODE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Quantity(NamedTuple):
    key: str
    title: str
    worst: int  # 1: the highest is, -1: the lowest
    scale: str  # what a digit means


DEGREES = "°C" if UNICODE else "C"
QUANTITIES = (
    Quantity("utilisation", "utilisation", -1, "0-9 x10%"),
    Quantity("memory", "memory", 1, "0-9 x10%"),
    Quantity("power", "power", 1, "0-9 x10% of the limit"),
    Quantity("temperature", "temperature", 1, f"0-9 x10 {DEGREES}"),
    Quantity("sm", "SM activity", -1, "0-9 x10%"),
    Quantity("tensor", "tensor activity", -1, "0-9 x10%"),
    Quantity("step", "own time a step", 1, "5 median, 6 x1.2, 9 x1.8"),
)
BY_KEY = {quantity.key: quantity for quantity in QUANTITIES}

MARKS = {"lost": "L", "reset": "R", "xid": "X", "ecc": "E", "remap": "E", "throttle": "T", "nvlink": "N", "pcie": "P", "hang": "H"}
STALE, SLOW = "~", "S"
GRAVE = "LRXE"
"""Marks of what only a repair mends."""
ORDER = f"LRXETNPH?{STALE}{SLOW}"
"""The gravest first; ? is a kind that this screen does not know."""
MEANINGS = {"L": "lost", "R": "needs a reset", "X": "XID", "E": "ECC", "T": "throttled", "N": "NVLink", "P": "PCIe", "H": "hangs",
            "?": "other fault", STALE: "silent", SLOW: "slow"}  # fmt: skip
STATES = {"spare": "s", "out of reach": "r", "gone": "g", "starting": "b", "drained": "d", "quarantined": "q"}
"""The letter beside a node's name; nodes that train have none."""
HIDDEN = ("out of reach", "gone", "starting", "drained", "quarantined")
"""States in which a node's figures mean nothing for the run: the state stands in their place."""


def rack_of(name: str) -> str:
    """The rack that a host's name tells of: what comes before its last number, `r1n08` -> `r1`, `gpu-3-12.lab` -> `gpu-3`."""
    if re.fullmatch(r"[\d.]+|[\da-f:]+:[\da-f:]*", name):  # an address: its network
        return re.sub(r"[.:][^.:]*$", "", name) or name
    host = name.partition(".")[0]
    before = re.sub(r"\d+$", "", host)
    numbered = re.match(r"(.*\d)", before)
    return numbered.group(1) if numbered else before.rstrip("-_") or host


def rank_of(node: NodeView, place: int) -> int | None:
    """The rank on a GPU: by its processes, else by its place, as ranks take GPUs in order."""
    stats = node.stats
    if stats is not None and stats.gpus:
        for process in stats.gpus[place].processes if place < len(stats.gpus) else ():
            if process.rank is not None:
                return process.rank
    return node.first_rank + place if place < node.ranks else None


def mark_of(gpu: Gpu) -> str:
    """The letter of what is wrong with a GPU; a blank where nothing is."""
    if gpu.faults:
        return MARKS.get(gpu.faults[0].kind, "?")
    return STALE if gpu.stale is not None else " "


def figures(gpus: Sequence[Gpu], key: str) -> list[float | None]:
    """The GPUs' values of one quantity; None, which numpy makes NaN of, where they give none."""
    if key != "memory":
        return [getattr(gpu, key) for gpu in gpus]
    return [gpu.memory_used / gpu.memory_total if gpu.memory_used is not None and gpu.memory_total else None for gpu in gpus]


@dataclass(frozen=True)
class Fleet:
    """One quantity of every unit of the nodes that are shown."""

    quantity: Quantity
    nodes: tuple[NodeView, ...]
    kinds: tuple[str, ...]
    """Of each node's units: GPU, CPU or rank."""
    node_of: Ints
    """[units] Number of the node that each is on."""
    place_of: Ints
    values: Floats
    """NaN where there is no figure."""
    heat: Floats
    """As a part of the scale, 0 to 1."""
    marks: NDArray[np.str_]
    """[units] Letters of what is wrong, blanks elsewhere."""
    slow: dict[int, Straggler]
    median: float
    """Of the values; NaN where there are none."""

    @property
    def units(self) -> int:
        return len(self.values)

    def words(self, value: float) -> str:
        """A value with its unit."""
        if np.isnan(value):
            return "-"
        match self.quantity.key:
            case "power":
                return f"{value:,.0f} W"
            case "temperature":
                return f"{value:.0f} {DEGREES}"
            case "step":
                return f"{1000 * value:.0f} ms" if value < 9.9995 else f"{value:.1f} s"
        return f"{value:.0%}"

    def short(self, value: float) -> str:
        """A value in at most four cells; its unit is the column's."""
        match self.quantity.key:
            case "power" | "temperature":
                return f"{value:.0f}"
            case "step":
                return f"{1000 * value:.0f}" if self.in_millis else f"{value:.1f}"
        return f"{100 * value:.0f}"

    @property
    def in_millis(self) -> bool:
        return not self.median >= 2.0

    @property
    def unit(self) -> str:
        """Of the short values."""
        return {"power": "W", "temperature": DEGREES, "step": "ms" if self.in_millis else "s"}.get(self.quantity.key, "%")


def fleet_of(snapshot: Snapshot, key: str, pattern: re.Pattern[str] | None = None, rack: str = "") -> Fleet:
    """One quantity over the nodes whose name or state matches, of one rack where it is named."""
    nodes = tuple(
        node
        for node in snapshot.nodes
        if (pattern is None or pattern.search(f"{node.name} {node.state}")) and (not rack or rack_of(node.name) == rack)
    )
    slow = {straggler.rank: straggler for straggler in snapshot.stragglers}
    values: list[float | None] = []
    limits: list[float] = []
    marks: list[str] = []
    kinds: list[str] = []
    counts: list[int] = []
    for node in nodes:
        kind, found = _units(node, key)
        kinds.append(kind)
        counts.append(len(found))
        values += found if node.state not in HIDDEN else [np.nan] * len(found)
        gpus = node.stats.gpus if node.stats is not None else ()
        if kind == "GPU":
            marks += [mark_of(gpu) for gpu in gpus]
            if key == "power":
                limits += [gpu.power_limit or np.nan for gpu in gpus]
        else:
            marks += " " * len(found)
            limits += [np.nan] * len(found)
    node_of = np.repeat(np.arange(len(nodes)), counts)
    starts = np.cumsum([0, *counts])[:-1]
    place_of = np.arange(len(values)) - np.repeat(starts, counts)
    letters = np.array(marks or [""], "<U1")[: len(marks)]
    _mark_slow(nodes, kinds, starts, counts, slow, letters)
    found_values = np.array(values, np.float64)
    known = found_values[np.isfinite(found_values)]
    median = float(np.median(known)) if len(known) else float("nan")
    heat = _heat(key, found_values, np.array(limits) if key == "power" else None, median)
    return Fleet(BY_KEY[key], nodes, tuple(kinds), node_of, place_of, found_values, heat, letters, slow, median)


def _units(node: NodeView, key: str) -> tuple[str, Sequence[float | None]]:
    """What a node's cells stand for, and their values."""
    stats = node.stats
    if stats is None:
        return "", []
    if key == "step":
        own = {beat.rank: beat.own or np.nan for beat in stats.ranks}
        if stats.gpus:
            ranks = [rank_of(node, place) for place in range(len(stats.gpus))]
            return "GPU", [np.nan if rank is None else own.get(rank, np.nan) for rank in ranks]
        return "rank", [own[rank] for rank in sorted(own)]
    if stats.gpus:
        return "GPU", figures(stats.gpus, key)
    if key == "memory":
        return "rank", [rss / max(stats.memory_total, 1) for rss in stats.rank_rss]
    return "CPU", list(stats.cpus) if key == "utilisation" else [np.nan] * len(stats.cpus)


def _mark_slow(
    nodes: Sequence[NodeView],
    kinds: Sequence[str],
    starts: Ints,
    counts: Sequence[int],
    slow: dict[int, Straggler],
    marks: NDArray[np.str_],
) -> None:
    names = {straggler.node for straggler in slow.values()}
    for number, node in enumerate(nodes):
        if node.name in names and kinds[number] in ("GPU", "rank"):
            for place in range(counts[number]):
                at = int(starts[number]) + place
                if rank_at(node, kinds[number], place) in slow and marks[at] == " ":
                    marks[at] = SLOW


def rank_at(node: NodeView, kind: str, place: int) -> int | None:
    """The rank that a unit is, or has."""
    if kind == "rank" and node.stats is not None and node.stats.ranks:
        ranks = sorted(beat.rank for beat in node.stats.ranks)
        return ranks[place] if place < len(ranks) else None
    return rank_of(node, place) if kind in ("GPU", "rank") else None


def _heat(key: str, values: Floats, limits: Floats | None, median: float) -> Floats:
    if key == "temperature":
        part = values / 100
    elif key == "step":
        part = values / (2 * median) if median > 0 else values
    elif limits is not None:
        known = limits[np.isfinite(limits)]
        most = float(known.max()) if len(known) else 1000.0
        part = values / np.where(np.isfinite(limits), limits, most)
    else:
        part = values
    return np.clip(part, 0.0, 1.0)


def known_quantities(snapshot: Snapshot) -> list[str]:
    """Those of which there is any figure; utilisation in any case."""
    found = {"utilisation"}
    for node in snapshot.nodes:
        stats = node.stats
        if stats is None:
            continue
        found |= {"step"} if any(beat.own for beat in stats.ranks) else set()
        found |= {"memory"} if stats.rank_rss and not stats.gpus else set()
        for gpu in stats.gpus:
            found |= {key for key in ("power", "temperature", "sm", "tensor") if getattr(gpu, key) is not None}
            found |= {"memory"} if gpu.memory_total else set()
            if len(found) == len(QUANTITIES):
                break
    return [quantity.key for quantity in QUANTITIES if quantity.key in found]


class Rolled(NamedTuple):
    """Units put together, a cell for each node or rack."""

    mean: Floats
    worst: Floats
    mean_heat: Floats
    worst_heat: Floats
    marks: NDArray[np.str_]


def rolled(fleet: Fleet, group_of: Ints, groups: int) -> Rolled:
    """Mean and worst value of each group, and its gravest mark. `group_of` is [units]."""
    known = np.isfinite(fleet.values)
    count = np.bincount(group_of[known], minlength=groups).astype(np.float64)
    count[count == 0] = np.nan

    def both(data: Floats) -> tuple[Floats, Floats]:
        mean = np.bincount(group_of[known], data[known], minlength=groups) / count
        worst = np.full(groups, np.inf if fleet.quantity.worst < 0 else -np.inf)
        (np.minimum if fleet.quantity.worst < 0 else np.maximum).at(worst, group_of[known], data[known])
        return mean, np.where(np.isfinite(worst), worst, np.nan)

    mean, worst = both(fleet.values)
    mean_heat, worst_heat = both(fleet.heat)
    marks = np.full(groups, " ", "<U1")
    for letter in reversed(ORDER):  # the gravest is written last
        marks[group_of[fleet.marks == letter]] = letter
    return Rolled(mean, worst, mean_heat, worst_heat, marks)


def racks(fleet: Fleet) -> tuple[list[str], Ints]:
    """The racks in the order of their nodes, and [nodes] the number of each node's."""
    names: dict[str, int] = {}
    of_node = [names.setdefault(rack_of(node.name), len(names)) for node in fleet.nodes]
    return list(names), np.array(of_node, np.int64)
