"""The nodes: every GPU on one heat map, the worst of them listed, down to one with its rank and its last minutes."""

from __future__ import annotations

import re
from collections.abc import Awaitable

import numpy as np
from textual.app import ComposeResult
from textual.containers import Horizontal

from midwatch.protocol import NodeView, Verb
from tui.chart.formatting import age, plural
from tui.chart.heatmap import Heat
from tui.chart.styles import Ink
from tui.core.keys import FILTER, Key, commands, register
from tui.core.scene import Scene
from tui.core.text_panel import Line, LineWindow, Panel, Run, cut, fit, joined
from tui.views.base import View
from tui.views.nodes.faults import History, Trouble, counted, faults_of, state_trouble, straggler_words, troubles
from tui.views.nodes.gpu_page import page
from tui.views.nodes.map import LEVELS, NodeMap, arrange, legend
from tui.views.nodes.table import BY_KEY, GRAVE, Fleet, fleet_of, known_quantities, rack_of, rank_at


@register(
    "n",
    "nodes",
    "every GPU as a heat map, faults, stragglers; down to one GPU and its rank",
    place=3,
    keys=(
        FILTER,
        Key(("v",), "v", "what is shown: utilisation, memory, power, temperature, SM, tensor, own time", "quantity", "values"),
        Key(("z",), "z", "by GPU, by node, by rack, or whichever fits", "level", "roll up"),
        Key(("f",), "f", "to the next one that is faulty or slow", "fault", "faulty"),
        Key(("enter",), "Enter", "one GPU: figures, last minutes, rank, faults; a rack: its nodes", "enter", "one"),
        Key(("left",), "←", "to the left", "walk:left"),
        Key(("right",), "→", "to the right", "walk:right"),
        Key(("up",), "↑", "up; on a GPU's page to the node before", "walk:up"),
        Key(("down",), "↓", "down; on a GPU's page to the next node", "walk:down"),
        *commands("nodes"),
    ),
)
class NodesView(View):
    """The cursor is a node and a place on it, whatever the map's level; a rack that was entered is all that is shown."""

    DEFAULT_CSS = """
    NodesView #fleet-head, NodesView #fleet-legend { height: 1; }
    NodesView #fleet { height: 1fr; }
    NodesView #fleet-side { width: 0; padding: 0; }
    NodesView #fleet-below { height: 0; }
    NodesView #fleet-page { display: none; height: 1fr; }
    """
    filterable = True

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        from tui.chart.formatting import UNICODE

        self._head, self._legend = Panel(id="fleet-head"), Panel(id="fleet-legend")
        self._heat = Heat(unicode=UNICODE)
        self._side, self._below = Panel(id="fleet-side"), Panel(id="fleet-below")
        self._page = LineWindow(id="fleet-page")
        self._history = History()
        self._scene: Scene | None = None
        self._fleet: Fleet | None = None
        self._made: NodeMap | None = None
        self._key = "utilisation"
        self._level = ""
        self._rack = ""
        self._pattern: re.Pattern[str] | None = None
        self._node, self._place = "", 0
        self._paged = False

    def compose(self) -> ComposeResult:
        yield self._head
        with Horizontal(id="fleet"):
            yield self._heat
            yield self._side
        yield self._below
        yield self._legend
        yield self._page

    def learn(self, scene: Scene) -> None:
        if scene.snapshot is not None:
            self._history.record(scene.snapshot)

    def opened(self) -> None:
        self.learn(self.midwatch.scene)

    def settled(self) -> bool:
        return self._paged or (self._made is not None and self._heat.size.height > 0)

    @property
    def chosen(self) -> NodeView | None:
        nodes = self._fleet.nodes if self._fleet is not None else ()
        return next((node for node in nodes if node.name == self._node), None)

    # Drawing

    def show(self, scene: Scene) -> None:
        self._scene = scene
        width, height = self.size
        if scene.snapshot is None or not width or height < 1:
            return
        self._fleet = fleet = fleet_of(scene.snapshot, self._key, self._pattern, self._rack)
        self._settle_cursor(fleet)
        self._head.show([self._heading(fleet, width)])
        if self._paged:
            self._show_page(fleet, scene, width)
            return
        self._made = made = arrange(fleet, self._level, width, max(1, height - 2))
        self._arrange(made)
        chosen = self._cursor(made, fleet)
        if made.heat.lines:
            self._heat.show(made.heat, made.shape, chosen)
        self._heat.display = bool(made.heat.lines)
        self._legend.show([fit([(f" {legend(made, fleet)}", Ink.FAINT)], width)])
        self._show_worst(fleet, scene, made)

    def _settle_cursor(self, fleet: Fleet) -> None:
        """On a node that there is; at first on what is worst."""
        node = self.chosen
        if node is None and fleet.nodes:
            worst = troubles(fleet, 1) if not self._node else []
            node = next((n for n in fleet.nodes if worst and n.name == worst[0].node), fleet.nodes[0])
            self._node, self._place = node.name, max(0, worst[0].place) if worst else 0
        if node is not None:
            units = int((fleet.node_of == fleet.nodes.index(node)).sum())
            self._place = max(0, min(self._place, units - 1))

    def _cursor(self, made: NodeMap, fleet: Fleet) -> tuple[int, int] | None:
        node = self.chosen
        return made.find(fleet.nodes.index(node), self._place, fleet) if node is not None and made.heat.lines else None

    def _arrange(self, made: NodeMap) -> None:
        self._side.styles.width, self._side.display = made.side, made.side > 0
        self._below.styles.height, self._below.display = made.below, made.below > 0

    def _heading(self, fleet: Fleet, width: int) -> list[Run]:
        counts: dict[str, int] = {}
        for number, count in enumerate(np.bincount(fleet.node_of, minlength=len(fleet.nodes)).tolist()):
            if fleet.kinds[number]:
                counts[fleet.kinds[number]] = counts.get(fleet.kinds[number], 0) + count
        what = ", ".join(plural(count, kind) for kind, count in counts.items()) or "no figures"
        only = f" of rack {self._rack}" if self._rack else ""
        only += f" matching /{self._pattern.pattern}/" if self._pattern is not None else ""
        parts: list[Line] = [
            [(f" {fleet.quantity.title}", Ink.TITLE)],
            [(f"{what} on {plural(len(fleet.nodes), 'node')}{only}", Ink.TEXT)],
        ]
        wrong = counted(fleet)
        parts += [[(wrong, Ink.WARNING)]] if wrong else []
        known = fleet.values[np.isfinite(fleet.values)]
        if len(known):
            worst = "highest" if fleet.quantity.worst > 0 else "lowest"
            end = known.max() if fleet.quantity.worst > 0 else known.min()
            parts.append([(f"mean {fleet.words(float(known.mean()))}, {worst} {fleet.words(float(end))}", Ink.TEXT)])
        if "GPU" not in counts and counts:
            parts.append([("no GPUs", Ink.FAINT)])
        return cut(joined(parts), width)

    def _show_worst(self, fleet: Fleet, scene: Scene, made: NodeMap) -> None:
        rows = self.size.height - 2 if made.side else made.below
        panel, width = (self._side, made.side) if made.side else (self._below, self.size.width)
        if rows <= 0:
            return
        found = troubles(fleet, max(0, rows - 1))
        end = "highest" if fleet.quantity.worst > 0 else "lowest"
        title = f" the worst {len(found)}: away, faulty, slow, then {end} {fleet.quantity.title}"
        panel.show([cut([(title, Ink.FAINT)], width), *(cut(_worst_line(trouble, scene), width) for trouble in found)])

    def _show_page(self, fleet: Fleet, scene: Scene, width: int) -> None:
        node = self.chosen
        if node is not None:
            kind = fleet.kinds[fleet.nodes.index(node)]
            self._page.show(page(fleet, node, kind, self._place, self._history, scene, width))

    def status(self) -> Line:
        """The chosen unit in a line."""
        fleet, node, scene = self._fleet, self.chosen, self._scene
        if fleet is None or node is None or scene is None:
            return [("no node matches", Ink.FAINT)] if self._pattern is not None else ()
        if self._made is not None and self._made.level == "racks" and not self._paged:
            return [(f"rack {rack_of(node.name)}: Enter shows its nodes", Ink.TEXT)]
        trouble = state_trouble(node)
        number = fleet.nodes.index(node)
        kind = fleet.kinds[number]
        parts: list[Line] = [[(node.name, Ink.TITLE)]]
        parts += (
            [[(trouble.text, Ink.WARNING)]] if trouble is not None else [[(node.state, Ink.TEXT)]] if node.state != "up" else []
        )
        at = np.flatnonzero((fleet.node_of == number) & (fleet.place_of == self._place))
        if len(at) and trouble is None:
            rank = rank_at(node, kind, self._place)
            name = f"{kind} {rank if kind == 'rank' else self._place}"
            parts.append([(name + (f", rank {rank}" if rank is not None and kind != "rank" else ""), Ink.TEXT)])
            parts.append([(fleet.words(float(fleet.values[at[0]])), Ink.TEXT)])
            gpus = node.stats.gpus if node.stats is not None else ()
            if kind == "GPU" and self._place < len(gpus):
                parts += [[(fault.text, Ink.WARNING)] for fault in faults_of(gpus[self._place])[:1]]
            straggler = fleet.slow.get(rank) if rank is not None else None
            parts += [[(straggler_words(straggler.own, straggler.median), Ink.WARNING)]] if straggler is not None else []
        return joined(parts)

    # Keys

    def _again(self) -> None:
        if self._scene is not None:
            self.show(self._scene)
        self.midwatch.draw_foot()

    def do_quantity(self) -> None:
        snapshot = self._scene.snapshot if self._scene is not None else None
        known = known_quantities(snapshot) if snapshot is not None else ["utilisation"]
        self._key = known[(known.index(self._key) + 1) % len(known)] if self._key in known else known[0]
        self.midwatch.say(f"{BY_KEY[self._key].title} ({len(known)} quantities are known here)")
        self._again()

    def do_level(self) -> None:
        order = ["", *LEVELS]
        self._level = order[(order.index(self._level) + 1) % len(order)]
        self.midwatch.say(f"by {self._level.removesuffix('s')}" if self._level else "by GPU, node or rack: the first that fits")
        self._again()

    def do_walk(self, way: str) -> None:
        """An arrow: on the map to the cell beside; on a page across to the node's other GPUs, up and down to other nodes."""
        across, down = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[way]
        fleet, made, node = self._fleet, self._made, self.chosen
        if fleet is None or node is None:
            return
        if self._paged:
            number = fleet.nodes.index(node) + down
            if 0 <= number < len(fleet.nodes):
                self._node, self._place = fleet.nodes[number].name, max(0, self._place + across)
        elif made is not None and (cursor := self._cursor(made, fleet)) is not None:
            self._go(made, fleet, *made.moved(*cursor, across, down))
        self._again()

    def _go(self, made: NodeMap, fleet: Fleet, line: int, cell: int) -> None:
        number, self._place = made.node_at(line, cell)
        self._node = fleet.nodes[number].name

    def do_fault(self) -> None:
        """To the next unit with a mark, after the chosen one."""
        fleet, node = self._fleet, self.chosen
        marked = np.flatnonzero(fleet.marks != " ") if fleet is not None else np.empty(0, np.int64)
        if fleet is None or node is None or not len(marked):
            self.midwatch.say("nothing is faulty or slow here")
            return
        here = (fleet.nodes.index(node), self._place)
        places = [(int(fleet.node_of[unit]), int(fleet.place_of[unit])) for unit in marked.tolist()]
        number, self._place = next((place for place in places if place > here), places[0])
        self._node = fleet.nodes[number].name
        self._again()

    def do_enter(self) -> None:
        made, node = self._made, self.chosen
        if made is None or node is None:
            return
        if made.level == "racks" and not self._paged:
            self._rack, self._level = rack_of(node.name), ""
        else:
            self._turn(paged=True)
        self._again()

    def back(self) -> bool:
        if self._paged:
            self._turn(paged=False)
        elif self._rack:
            self._rack = ""
        else:
            return False
        self._again()
        return True

    def _turn(self, *, paged: bool) -> None:
        """To the page of one unit, or back to the map."""
        self._paged = paged
        self._page.display = paged
        for part in (self.query_one("#fleet"), self._below, self._legend):
            part.display = not paged

    def set_filter(self, pattern: str) -> str:
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            return f"/{pattern}: {error}"
        self._again()
        return ""

    def _ask(self, verb: Verb) -> Awaitable[None] | None:
        if self.chosen is None or (self._made is not None and self._made.level == "racks" and not self._paged):
            self.midwatch.say(f"{verb.removeprefix('node-')}: choose a node first (Enter opens a rack)", Ink.WARNING)
            return None
        return self.midwatch.steering.ask_node(verb, self._node)

    def give_node_drain(self) -> Awaitable[None] | None:
        return self._ask("node-drain")

    def give_node_quarantine(self) -> Awaitable[None] | None:
        return self._ask("node-quarantine")

    def give_node_add(self) -> Awaitable[None] | None:
        return self._ask("node-add")

    # The mouse

    def on_heat_pointed(self, event: Heat.Pointed) -> None:
        if self._made is not None and self._fleet is not None:
            self._go(self._made, self._fleet, event.line, event.cell)
            self._again()

    def on_heat_scrolled(self, event: Heat.Scrolled) -> None:
        self.do_walk("down" if event.by > 0 else "up")


def _worst_line(trouble: Trouble, scene: Scene) -> Line:
    now = scene.now - scene.skew
    ago = f"  {age(now - trouble.time)}" if trouble.time and now - trouble.time >= 1 else ""
    ink = Ink.ALARM if trouble.mark in f"{GRAVE}!" else Ink.TEXT if trouble.mark == " " else Ink.WARNING
    where = f"{trouble.node} {trouble.what}".strip()
    rank = f" (rank {trouble.rank})" if trouble.rank is not None and not trouble.what.startswith("rank") else ""
    return [(f" {trouble.mark} ", ink), (f"{where}{rank}  ", Ink.TITLE), (trouble.text, ink), (ago, Ink.FAINT)]
