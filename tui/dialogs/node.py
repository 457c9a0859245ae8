"""Taking a node out of use, or into it again: what it costs the run."""

from __future__ import annotations

from midwatch.protocol import NodeView, Verb
from tui.chart.styles import Ink
from tui.core.formatting import age, plural
from tui.core.scene import Scene, newest_checkpoint
from tui.core.text_panel import Line, wrapped
from tui.dialogs.base import Answer, Dialog

HEADINGS = {"node-drain": "Drain", "node-quarantine": "Quarantine", "node-add": "Use again"}


class NodeDialog(Dialog):
    def __init__(self, scene: Scene, verb: Verb, node: str) -> None:
        super().__init__(scene)
        self._verb, self._node = verb, node
        self.heading = f"{HEADINGS[verb]}: {node}"
        self.deed = HEADINGS[verb]

    def words(self, cells: int) -> list[Line]:
        snapshot = self.scene.snapshot
        nodes = snapshot.nodes if snapshot is not None else ()
        node = next((node for node in nodes if node.name == self._node), None)
        told: list[tuple[str, Ink]] = []
        if node is not None:
            note = f" ({node.note})" if node.note else ""
            failures = f", {plural(node.failures, 'failure')} counted against it" if node.failures else ""
            told.append((f"{self._node} is {node.state}{note}{failures}.", Ink.TEXT))
        used = node is not None and node.ranks > 0 and snapshot is not None and snapshot.world > 0
        if self._verb == "node-add":
            told += self._added(snapshot is not None and snapshot.world > 0)
        elif not used:
            told.append(("No rank is on it: nothing is interrupted.", Ink.TITLE))
        elif self._verb == "node-drain":
            told.append(("Writes a checkpoint, then restarts the ranks without this node. No step is lost.", Ink.TITLE))
        else:
            told.append((self._lost(), Ink.ALARM))
        if self._verb != "node-add":
            left = sum(1 for n in nodes if n.state in ("up", "spare") and n.name != self._node)
            told.append((f"{plural(left, 'node')} can be used without it. Use again (U) puts it back.", Ink.FAINT))
        return [[], *(line for words, ink in told for line in wrapped(words, cells, ink)), []]

    def _added(self, alive: bool) -> list[tuple[str, Ink]]:
        told = [("It may be used again, and its failure count is reset.", Ink.TITLE)]
        if alive:
            told.append(("If the run has room for it: a checkpoint, and a restart with it.", Ink.WARNING))
        return told

    def _lost(self) -> str:
        """What a quarantine of a node in use undoes: what it had a share in is not saved."""
        snapshot = self.scene.snapshot
        assert snapshot is not None
        newest = newest_checkpoint(snapshot)
        since = snapshot.step - (newest.step if newest is not None else 0)
        back = "the beginning: there is no checkpoint"
        if newest is not None:
            back = f"{newest.id} ({age(self.scene.now - self.scene.skew - newest.time)} old)"
        return f"Ends all ranks at once and goes back to {back}: {plural(since, 'step')} are taken again without it."

    def answer(self) -> Answer | str:
        return self._verb, {"node": self._node}


def unknown(scene: Scene, name: str) -> str:
    """Why there is no such node; empty where there is."""
    nodes: tuple[NodeView, ...] = scene.snapshot.nodes if scene.snapshot is not None else ()
    return "" if any(node.name == name for node in nodes) else f"there is no node {name!r} (n shows them)"
