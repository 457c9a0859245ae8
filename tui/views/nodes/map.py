"""The nodes as a heat map that fits: by GPU, by node, by rack, the first of them that the screen has room for. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from tui.chart.heatmap import CELL, HeatLine, HeatMap, HeatmapLayout, Style, fits, shape
from tui.views.nodes.table import GRAVE, HIDDEN, MEANINGS, ORDER, STATES, Fleet, Floats, Ints, racks, rolled

LEVELS: dict[str, tuple[Style, ...]] = {"GPUs": ("number", "digit"), "nodes": ("pair",), "racks": ("pair",)}
LONGEST_LABEL = 18
MOST_BELOW = 14
SIDE, WIDEST_SIDE = 50, 100
"""Columns that the list of the worst takes at the right: at least, and at most where the map leaves more."""
SIGNS = {letter: state for state, letter in STATES.items()}


@dataclass(frozen=True)
class NodeMap:
    """A map, what its cells are, and the room for the list of the worst: columns at the right, or rows beneath."""

    level: str
    heat: HeatMap
    shape: HeatmapLayout
    side: int
    below: int
    nodes: Ints
    """[cells] Number of the node that each is, or is on; of a rack its first."""
    groups: tuple[tuple[int, int], ...]
    """[lines] Number of what each line stands for (node or rack), and the offset of its first cell there."""
    fits: bool

    def node_at(self, line: int, cell: int) -> tuple[int, int]:
        """Number of the node, and the place of the unit on it."""
        group, offset = self.groups[line]
        if self.level == "GPUs":
            return group, offset + cell
        return int(self.nodes[self.heat.lines[line].first + cell]), 0

    def find(self, node: int, place: int, fleet: Fleet) -> tuple[int, int]:
        """Line and cell of a unit."""
        if self.level == "GPUs":
            wanted, at = node, place
        else:
            _, of_node = racks(fleet)
            wanted = int(of_node[node])
            at = int((of_node[:node] == wanted).sum()) if self.level == "nodes" else 0
        found = [number for number, (group, offset) in enumerate(self.groups) if group == wanted and offset <= at]
        line = found[-1] if found else 0
        return line, max(0, min(at - self.groups[line][1], self.heat.lines[line].cells - 1))

    def moved(self, line: int, cell: int, across: int, down: int) -> tuple[int, int]:
        """The cell next to one, by the arrows; past a block's edge into the block beside it."""
        rows, lines = self.shape.rows, self.heat.lines
        if down:
            first = line - line % rows
            line = min(max(line + down, first), min(first + rows, len(lines)) - 1)
        elif 0 <= cell + across < lines[line].cells:
            return line, cell + across
        elif 0 <= line + across * rows < len(lines):
            line += across * rows
            cell = 0 if across > 0 else lines[line].cells - 1
        return line, max(0, min(cell, lines[line].cells - 1))


class MapLayout(NamedTuple):
    """A way to lay the map out, before it is filled."""

    level: str
    style: Style
    shape: HeatmapLayout
    across: int  # cells of a line
    side: int
    below: int
    labels: list[str]
    counts: list[int]  # of each group's cells
    fits: bool


def arrange(fleet: Fleet, wanted: str, width: int, height: int) -> NodeMap:
    """The map of the level asked for, or with none the finest that fits; scrolls where nothing does."""
    plans = list(_plans(fleet, wanted, width, height))
    plan = next((plan for plan in plans if plan.fits), plans[-1])
    side, below = plan.side, plan.below
    if plan.fits and side:
        side = min(WIDEST_SIDE, max(side, width - 1 - plan.shape.blocks * plan.shape.block))
    elif plan.fits and below:
        below = min(MOST_BELOW, max(below, height - plan.shape.rows))
    heat, nodes, groups = _fill(fleet, plan)
    return NodeMap(plan.level, heat, plan.shape, side, below, nodes, groups, plan.fits)


def _plans(fleet: Fleet, wanted: str, width: int, height: int) -> Iterator[MapLayout]:
    """From the finest to the coarsest."""
    below = max(0, min(8, height // 4))
    rooms = [(width - SIDE - 2, height, SIDE, 0)] if width >= 100 else []
    rooms.append((width - 1, height - below, 0, below))  # a column is left free at the left
    for level in (wanted,) if wanted else LEVELS:
        labels, counts = _groups(fleet, level)
        longest = max([*counts, 1])
        wide = min(LONGEST_LABEL, max([len(label) for label in labels], default=1))
        for style, (room, rows, side, beneath) in product(LEVELS[level], rooms):
            across = max(1, (room - wide - 2) // CELL[style])
            if across < longest:
                across = across // 8 * 8 or across
            lines = sum([-(-count // across) or 1 for count in counts])
            made = shape(max(1, lines), wide, min(across, longest), style, room, rows)
            yield MapLayout(level, style, made, across, side, beneath, labels, counts, fits(made, room, rows))


def _groups(fleet: Fleet, level: str) -> tuple[list[str], list[int]]:
    """What lines stand for, and how many cells each has."""
    if level == "GPUs":
        counts = np.bincount(fleet.node_of, minlength=len(fleet.nodes)).tolist()
        return [_label(node.name) for node in fleet.nodes], counts
    names, of_node = racks(fleet)
    counts = np.bincount(of_node, minlength=len(names)).tolist() if level == "nodes" else [1] * len(names)
    return [_label(name) for name in names], counts


def _label(name: str) -> str:
    """The end of a long name tells more than its beginning."""
    return name if len(name) <= LONGEST_LABEL else f"~{name[-LONGEST_LABEL + 1 :]}"


def _fill(fleet: Fleet, plan: MapLayout) -> tuple[HeatMap, Ints, tuple[tuple[int, int], ...]]:
    level, style, labels, counts, across = plan.level, plan.style, plan.labels, plan.counts, plan.across
    if level == "GPUs":
        numbers = [fleet.short(value) if value == value else "" for value in fleet.values.tolist()] if style == "number" else []
        heat: Floats = fleet.heat
        worst, marks, nodes = heat, fleet.marks, fleet.node_of
        signs = ["" if node.state in HIDDEN else STATES.get(node.state, "") for node in fleet.nodes]
        words = [
            node.state if node.state in HIDDEN else "no figures" if not counts[n] else "" for n, node in enumerate(fleet.nodes)
        ]
    else:
        numbers, signs, words = [], [""] * len(labels), [""] * len(labels)
        heat, worst, marks, nodes = _rolled(fleet, level, len(labels))
    lines, groups = [], []
    first = 0
    for group, count in enumerate(counts):
        for offset in range(0, max(1, count if not words[group] else 1), across):
            cells = min(across, count - offset)
            dim = signs[group] == STATES["spare"]
            lines.append(HeatLine(labels[group] if not offset else "", signs[group], first + offset, cells, words[group], dim))
            groups.append((group, offset))
        first += count
    return HeatMap(lines, style, heat, worst, marks, numbers, GRAVE + "gr"), nodes, tuple(groups)


def _rolled(fleet: Fleet, level: str, groups: int) -> tuple[Floats, Floats, np.ndarray, Ints]:
    """Cells for nodes, rack by rack, or for racks: mean and worst part, mark, and which node each is."""
    _, of_node = racks(fleet)
    away = np.array([STATES.get(node.state, " ") for node in fleet.nodes], "<U1")
    order = np.argsort(of_node, kind="stable")
    if level == "nodes":
        found = rolled(fleet, fleet.node_of, len(fleet.nodes))
        hidden = np.isin(away, [STATES[state] for state in HIDDEN])
        marks = np.where(hidden | (found.marks == " "), away, found.marks)
        mean, worst = np.where(hidden, np.nan, found.mean_heat), np.where(hidden, np.nan, found.worst_heat)
        return mean[order], worst[order], marks[order], order
    found = rolled(fleet, of_node[fleet.node_of], groups)
    marks = found.marks
    for letter in "grqd":  # faults come before, and the gravest state before the others
        group = of_node[away == letter]
        marks[group] = np.where(marks[group] == " ", letter, marks[group])
    first = order[np.searchsorted(of_node[order], np.arange(groups))]
    return found.mean_heat, found.worst_heat, marks, first


def legend(made: NodeMap, fleet: Fleet) -> str:
    """What the characters in sight mean."""
    heat = made.heat
    parts = []
    if heat.style == "number":
        parts.append(f"figures in {fleet.unit}")
    elif heat.style == "pair":
        worst = "highest" if fleet.quantity.worst > 0 else "lowest"
        parts.append(f"{fleet.quantity.scale}: mean, then {worst}")
    else:
        parts.append(fleet.quantity.scale)
    present = set(np.unique(heat.marks).tolist()) | {line.sign for line in heat.lines}
    parts += [f"{letter} {MEANINGS[letter]}" for letter in ORDER if letter in present]
    parts += [f"{letter} {state}" for letter, state in SIGNS.items() if letter in present]
    return "  ".join(parts)
