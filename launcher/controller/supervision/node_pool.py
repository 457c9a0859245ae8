"""The nodes of a run: which agents are there, which may be used, and which are lost.

An agent speaks every second. One that does not is probed with connections to a port that it holds open: a machine that is slow or
loses packets answers some of them, one that is cut off or without power none, and one whose agent was killed refuses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from launcher.backends.base import Backend, StartError
from launcher.controller.core.context import ControllerContext, Node
from midwatch.journal import entries as j
from midwatch.journal.journal import Ousted
from midwatch.protocol import AgentHello, Message, NodeStats

log = logging.getLogger("launcher.controller")

Send = Callable[[Message], None]

SILENT_SECONDS = 1.5
"""Without a word from an agent before it is probed."""
CUT_SECONDS = 3.0
"""Of probes in vain before the node counts as cut off."""
LATE_SECONDS = 1.0
"""Between two looks at the nodes that are due every half second: then it is the controller that has not listened."""
PROBE_SECONDS = 0.5
"""Between two probes."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 3.0)
"""Between two tries to start an agent."""
ANSWER_SECONDS = 15.0
"""That an agent has to connect once it is started."""
RECONNECT_SECONDS = 3.0
"""That agents of a living generation have to come back to a new controller before others are started."""
PATIENCE_SECONDS = 5.0
"""That nodes beyond the fewest are waited for."""
PART_SECONDS = 15.0
"""That agents have to end when they are sent away."""
LOOK_SECONDS = 50e-6
"""A node, between two looks at all of them: many that come at once are looked at together."""


class TooFewNodes(Exception):
    """The ranks cannot be gathered; the message says what is wrong with which node."""


@dataclass
class Member:
    """A node as the pool sees it; times by the monotonic clock."""

    name: str
    send: Send | None = None
    hello: AgentHello | None = None
    heard: float = 0.0
    starting: asyncio.Task[None] | None = None
    started: float = 0.0
    """When an agent was started that has not come yet; 0: none was."""
    found: bool = False
    """That agent was there before: it may have been about to leave."""
    failures: int = 0
    """Of tries to start one, in a row."""
    next_try: float = 0.0
    problem: str = ""
    probing: asyncio.Task[None] | None = None
    probed_since: float | None = None
    """Begin of the probes that nothing has answered."""
    refused: bool = False
    """The machine is there and the agent is not."""
    out_of_reach: bool = False
    """The last try to start an agent has not reached the machine: it may not be up yet."""
    refusal: str = ""
    """Why the node's agent was turned away."""


class Pool:
    """Starts agents, keeps what sends to them, and tells which nodes to gather."""

    def __init__(self, context: ControllerContext, backend: Backend) -> None:
        self._context, self._backend = context, backend
        self._members: dict[str, Member] = {}
        self.changed = asyncio.Event()
        self._looked = self._awake = time.monotonic()
        """When it last looked after the nodes, and since when it has done so in time."""
        self.wanted = False
        """Whether the run needs its nodes; a released one does not."""
        self._parting: Message | None = None
        """What agents are told that come while all are sent away."""
        for name in backend.nodes:
            self._member(name)

    def _member(self, name: str) -> Member:
        if name not in self._members:
            wait = RECONNECT_SECONDS if self._context.ledger.generation_live else 0.0
            self._members[name] = Member(name, next_try=time.monotonic() + wait)
            self._context.live.nodes.setdefault(name, Node(name))
        return self._members[name]

    # What agents do

    def came(self, hello: AgentHello, send: Send) -> None:
        member = self._member(hello.node)
        member.send, member.hello, member.heard = send, hello, time.monotonic()
        member.started, member.failures, member.problem, member.refusal = 0.0, 0, "", ""
        self._answered(member)
        if self._parting is not None:
            send(self._parting)
        node = self._context.live.nodes[hello.node]
        node.pid, node.reachable, node.problem = hello.pid, True, ""
        self._tell_change()

    def went(self, name: str, send: Send) -> None:
        member = self._member(name)
        if member.send is send:
            member.send = None
            member.next_try = time.monotonic() + (0.0 if self._gone(member) else RETRY_SECONDS[0])
            self._context.live.nodes[name].reachable = False
            self._tell_change()

    def heard(self, name: str, stats: NodeStats) -> None:
        member = self._member(name)
        member.heard = time.monotonic()
        self._answered(member)
        node = self._context.live.nodes[name]
        node.stats, node.reachable = stats, True
        self._context.touch()

    def turned_away(self, name: str, reason: str) -> None:
        """An agent came and was refused, as will be the next one: trying again is no use."""
        member = self._member(name)
        member.refusal = f"{name}: {reason}"
        self._trouble(member, member.refusal)
        member.failures = max(member.failures, 2)
        self._tell_change()

    def _trouble(self, member: Member, problem: str) -> None:
        if member.problem != problem:
            log.warning("%s", problem)
        member.problem = self._context.live.nodes[member.name].problem = problem

    def send(self, name: str, message: Message) -> bool:
        """Whether there is a connection to send over."""
        member = self._members.get(name)
        if member is None or member.send is None:
            return False
        member.send(message)
        return True

    def hello(self, name: str) -> AgentHello:
        """What a connected agent has said of itself."""
        found = self._members[name].hello
        assert found is not None
        return found

    def address(self, name: str) -> str:
        """Where a node's agent is, as it has said."""
        found = self._members[name].hello if name in self._members else None
        return found.address if found is not None else "an address that it has not reported yet"

    def connected(self, name: str) -> bool:
        member = self._members.get(name)
        return member is not None and member.send is not None

    @property
    def anybody(self) -> bool:
        return any(m.send is not None for m in self._members.values())

    def dismiss(self, message: Message) -> None:
        """Sends all agents away; from now on they take no more orders."""
        self.wanted = False
        for member in self._members.values():
            if member.starting is not None:
                member.starting.cancel()
            if member.send is not None:
                member.send(message)
                member.send = None
                self._context.live.nodes[member.name].reachable = False
        self._tell_change()

    async def part(self, message: Message) -> str:
        """Sends all agents away and waits until they have ended; names those of which that is not known in time."""
        self.wanted, self._parting = False, message
        there = [m for m in self._members.values() if not self._parted(m)]
        for member in self._members.values():
            if member.starting is not None:
                member.starting.cancel()
        for member in there:
            if member.send is not None:
                member.send(message)
        deadline = time.monotonic() + PART_SECONDS
        try:
            while left := [m.name for m in there if not self._parted(m)]:
                if time.monotonic() > deadline:
                    return ", ".join(left)
                await asyncio.sleep(0.05)
            return ""
        finally:
            self._parting = None

    def _parted(self, member: Member) -> bool:
        """Its connection is closed, which an agent does last, and its process has ended where that can be told from here."""
        agent = self._context.ledger.agents.get(member.name)
        return member.send is None and (agent is None or not self._backend.alive(agent))

    # Which nodes there are

    def known(self, name: str) -> bool:
        return name in self._members or name in self._backend.nodes

    def can_spare(self, name: str) -> bool:
        """Whether enough nodes are left without it, in reach or not."""
        left = [n for n in self._names() if n != name and self.usable(n)]
        return len(left) >= self._context.recipe.fewest_nodes

    def usable(self, name: str) -> bool:
        """Neither drained nor quarantined."""
        return self._context.ledger.node(name).mark == "in use"

    def ready(self) -> tuple[str, ...]:
        """The nodes that a generation would have now; as many as can train at once."""
        there = self.there()
        return there[: self._context.recipe.training_nodes(len(there))]

    def there(self) -> tuple[str, ...]:
        """The nodes that could be used now, spares too: those of the last generation first, so that ranks stay where they were."""
        last = dict.fromkeys(self._context.ledger.generation_nodes)
        order = [*(n for n in last if n in self._members), *(n for n in self._names() if n not in last)]
        there = [n for n in order if self.usable(n) and self._members[n].send is not None and not self._members[n].refused]
        return tuple(n for n in there if self._members[n].probed_since is None)

    def _names(self) -> list[str]:
        return list(dict.fromkeys((*self._backend.nodes, *self._members)))

    async def assemble(self, *, forever: bool) -> tuple[str, ...]:
        """Waits for enough nodes. Raises TooFewNodes when there is no hope left, or, unless `forever`, no time.

        Machines that are not up yet are waited for in any case: the run's reason names them, and a stop ends the wait.
        """
        recipe, patience = self._context.recipe, self._backend.patience
        forever = patience > 0 and (forever or math.isinf(patience))
        self.wanted = True
        began, told = time.monotonic(), 0.0
        while True:
            self.changed.clear()
            self.look()
            there, ready = self.there(), self.ready()
            waited = time.monotonic() - began
            pending = [n for n in set(self._names()) - set(there) if self.usable(n) and self._may_come(n)]
            if len(ready) >= recipe.most_nodes:
                return ready
            if len(ready) >= recipe.fewest_nodes and (not pending or waited > PATIENCE_SECONDS):
                return ready
            to_come = [n for n in pending if self._member(n).out_of_reach]
            hopeless = len(there) + len(pending) < recipe.fewest_nodes or (waited > patience and not to_come)
            if len(ready) < recipe.fewest_nodes and not forever and (not pending or hopeless):
                raise TooFewNodes(self._shortage(len(there)))
            if waited - told > PATIENCE_SECONDS and self._context.state in ("starting", "recovering"):
                told = waited
                self._context.change_state(self._context.state, self._shortage(len(there)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 0.2)
            await asyncio.sleep(len(self._members) * LOOK_SECONDS)

    def _may_come(self, name: str) -> bool:
        """Not so a node that is cut off, nor one that was reached and whose agent does not start."""
        member = self._member(name)
        return self.lost(name)[0] != "cut" and (member.starting is not None or member.failures < 2 or member.out_of_reach)

    def _shortage(self, count: int) -> str:
        fewest = self._context.recipe.fewest_nodes
        wrong = [m.problem for m in self._members.values() if m.problem and self.usable(m.name)][:3]
        unused = [f"{n} is {self._context.ledger.node(n).mark}" for n in self._names() if not self.usable(n)][:3]
        told = "; ".join([*wrong, *unused]) or self._backend.lacking
        if fewest == 1 and self._backend.nodes:
            return told or "the agent does not answer"
        return f"{count} of at least {fewest} nodes ready" + (f": {told}" if told else "")

    # What is looked after now and then

    def look(self) -> None:
        """Starts agents that are missing, and probes those that say nothing."""
        now = time.monotonic()
        if now - self._looked > LATE_SECONDS:
            self._awake = now  # what nodes have said lies unread; to probe them all would make it later still
        self._looked = now
        for member in [self._member(name) for name in self._names()]:
            if member.send is None and self.wanted and self.usable(member.name):
                self._start_missing(member, now)
            silent = member.send is None or now - max(member.heard, self._awake) > SILENT_SECONDS
            if silent and member.hello is not None and member.hello.probe_port and member.probing is None and self.wanted:
                member.probing = asyncio.create_task(self._probe(member), name=f"probe-{member.name}")
            if silent and self._context.live.nodes[member.name].reachable:
                self._context.live.nodes[member.name].reachable = False
                self._context.touch()

    def _start_missing(self, member: Member, now: float) -> None:
        if member.starting is not None or now < member.next_try:
            return
        known = self._context.ledger.agents.get(member.name)
        if known is not None and member.hello is None and self._backend.alive(known):
            return  # it is on its way
        member.starting = asyncio.create_task(self._start(member), name=f"start-{member.name}")

    async def _start(self, member: Member) -> None:
        context = self._context
        before = context.ledger.agents.get(member.name)
        alive = before is not None and self._backend.alive(before)
        try:
            if member.started and alive is False:
                member.started = 0.0
                if not member.found:
                    raise StartError(f"the agent of {member.name} ended at once; see logs/{member.name}/agent.log")
            if not (member.started and alive):
                started = await self._backend.start(member.name)
                member.found = started.found
                if before is None or (before.pid, before.birth) != started[:2]:
                    context.record(j.AgentStarted(time=context.clock(), node=member.name, pid=started.pid, birth=started.birth))
            if member.started and time.monotonic() - member.started > ANSWER_SECONDS:
                raise StartError(f"the agent of {member.name} is running but does not answer; see logs/{member.name}/agent.log")
            member.started = member.started or time.monotonic()
        except StartError as error:
            self._trouble(member, member.refusal or str(error))
            member.out_of_reach = error.out_of_reach
            member.failures += 1
        except Ousted:
            context.over.set()
        finally:
            member.starting = None
            member.next_try = time.monotonic() + RETRY_SECONDS[min(member.failures, len(RETRY_SECONDS) - 1)]
            self._tell_change()

    async def _probe(self, member: Member) -> None:
        """Connects again and again, without waiting for one to fail before the next, until the agent is heard."""
        began = time.monotonic()
        tries: set[asyncio.Task[None]] = set()
        try:
            while self.wanted and (member.send is None or time.monotonic() - member.heard > SILENT_SECONDS):
                if time.monotonic() - began > PROBE_SECONDS and member.probed_since is None and not member.refused:
                    member.probed_since = began
                task = asyncio.create_task(self._try(member))
                tries.add(task)
                task.add_done_callback(tries.discard)
                await asyncio.sleep(PROBE_SECONDS)
                if member.probed_since is None:
                    began = time.monotonic() - PROBE_SECONDS
        finally:
            member.probing = None
            for task in list(tries):
                task.cancel()

    async def _try(self, member: Member) -> None:
        assert member.hello is not None
        try:
            opening = asyncio.open_connection(member.hello.address, member.hello.probe_port)
            _, writer = await asyncio.wait_for(opening, CUT_SECONDS)
            writer.close()
        except ConnectionRefusedError:
            member.refused = True
            member.probed_since = None
        except (OSError, TimeoutError):
            return
        else:
            self._answered(member)

    def _answered(self, member: Member) -> None:
        member.probed_since, member.refused = None, False

    def _gone(self, member: Member) -> bool:
        agent = self._context.ledger.agents.get(member.name)
        return member.send is None and agent is not None and self._backend.alive(agent) is False

    def lost(self, name: str) -> tuple[Literal["", "gone", "cut"], str]:
        """Whether a node's agent is gone for certain, or out of reach for so long that it may be, and in words."""
        member = self._member(name)
        if self._gone(member) or (member.refused and member.send is None):
            return "gone", f"the agent of {name} died"
        if member.probed_since is not None and time.monotonic() - member.probed_since > CUT_SECONDS:
            return "cut", f"{name} is out of reach for {time.monotonic() - member.heard:.0f} s"
        return "", ""

    def _tell_change(self) -> None:
        self.changed.set()
        self._context.touch()
