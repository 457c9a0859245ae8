"""Generations: gathering the ranks, noticing their end, and deciding what the next ones start from.

begin -> data there? -> enough nodes? -> compose Start -> journal -> Gather to node 0, then with its store's port to the others
an end that nobody asked for -> journal -> restart at the newest good checkpoint, on a new lineage if steps are repeated
a node that comes or goes -> checkpoint, end, gather anew; one that is lost -> end, gather anew without it
too many failures without a step between -> failed, and an operator decides
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import Literal

from launcher.controller.core import recovery
from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.data_build import BuildError, Building, ShortageError
from launcher.controller.core.events import AgentsStopped, GenerationBegan, NodesToSpare, RanksStopped, RanksTrain, RunFailed
from launcher.controller.core.recipe_change import note_change
from launcher.controller.supervision.failure_attribution import first_failure, only_victims
from launcher.controller.supervision.hangs import Hanging
from launcher.controller.supervision.node_pool import Pool, Send, TooFewNodes
from launcher.controller.supervision.rank_progress import Moves
from launcher.controller.supervision.restart import check_restart_point, compose, environment_of
from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError, Ousted
from midwatch.journal.run_state import differences
from midwatch.protocol import AgentHello, EndRanks, Gather, Gathered, Leave, NodeStats, RankExit, RanksEnded, Start

log = logging.getLogger("launcher.controller")

BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0)
REUNION_SECONDS = 20.0
CONCLUDE_SECONDS = 1.0
"""That the other nodes' word is waited for when one has told of its ranks' end."""
FIRST_CAUSE_SECONDS = 6.0
"""The same where all that is known looks like what the end of another node's ranks does to these: it may only just be lost."""
ENDING_SECONDS = 20.0
"""That nodes have to end their ranks when told to; one that does not is on its own."""
GATHER_SECONDS = 30.0
"""That node 0 has to open the store."""
STORAGE_SECONDS = 1.0
"""Between two looks whether storage that is away or cannot be written has come back."""
GROW_SECONDS = 1.0
"""That a node must have been there before the ranks are gathered anew for it."""

Cause = Literal["start", "crash", "go on"]


class Generations:
    """Supervises the ranks through their agents."""

    def __init__(self, context: ControllerContext, commits: Commits, building: Building, pool: Pool) -> None:
        self._context, self._commits, self._building, self._pool = context, commits, building, pool
        self._work: asyncio.Task[None] | None = None
        self._parting: asyncio.Task[None] | None = None
        """Waits for the agents to end after a stop."""
        self._failures = 0
        self._progressed = False
        self._trained = False
        """This generation has begun to train, so its restart may repeat steps."""
        self._ending: Literal["", "stop", "restart", "failure"] = ""
        """Why the ranks are being ended."""
        self._ending_since = 0.0
        self._told: dict[str, RanksEnded] = {}
        """What each node has told of the end of its ranks."""
        self._concluding: asyncio.TimerHandle | None = None
        self._awaited: Start | None = None
        """What the other nodes will be told when node 0 has opened the store."""
        self._gathered_at = 0.0
        self._moves = Moves(context)
        self._grow_since: float | None = None
        self._told_of: set[str] = set()
        """Nodes that the journal says stand by in this generation."""
        self._hang = Hanging(context, pool, self.ranks_hang)

    # Beginning

    def begin(self, cause: Cause) -> None:
        """Starts to gather a new generation, unless one is being gathered already."""
        self._context.over.clear()
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._begin(cause), name="generation")
            self._work.add_done_callback(self._begun)

    def take_over(self) -> None:
        """Goes on where the last term left off."""
        ledger = self._context.ledger
        if ledger.generation_live:
            self._pool.wanted = True
            self._work = asyncio.create_task(self._reunite(), name="takeover")
            self._work.add_done_callback(self._begun)
        elif ledger.state in ("building", "starting", "training", "paused", "recovering"):
            self.begin("crash" if ledger.generation else "start")
        elif ledger.state == "released" and any(c.verb in ("stop", "stop-now") for c in ledger.open_commands()):
            self._send_agents_away()
        elif ledger.state in ("released", "failed") and ledger.resumes():
            self.restart()

    async def _reunite(self) -> None:
        """Waits for an agent of the living generation; where all are gone, its ranks are too."""
        context, pool = self._context, self._pool
        deadline = time.monotonic() + REUNION_SECONDS
        while time.monotonic() < deadline:
            nodes = context.ledger.generation_nodes
            if not context.ledger.generation_live:  # an agent came and told of its end
                if context.state not in ("finished", "failed", "released"):
                    await self._begin("crash")
                return
            if any(pool.connected(n) and pool.hello(n).generation == context.ledger.generation for n in nodes):
                log.info("took over generation %d", context.ledger.generation)
                self._moves.seen()
                return
            if all(pool.connected(n) or pool.lost(n)[0] == "gone" for n in nodes):  # agents that know of no ranks
                break
            await asyncio.sleep(0.1)
        context.note("warning", "the agents of the last generation are gone; restarting its ranks")
        self._trained = True
        self._generation_ended("controller and agents were both gone")
        await self._begin("crash")

    def _begun(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("starting the ranks failed", exc_info=error)
            self._failed(f"internal error: {error!r}; see controller.log")

    async def _begin(self, cause: Cause) -> None:
        context = self._context
        if context.ledger.data_seconds is None:
            context.change_state("building")
        try:
            await self._building.ensure()
        except BuildError as error:
            self._fail(f"the data cannot be built: {error}")
            return
        except ShortageError as error:
            self._fail(str(error))
            return
        context.change_state("recovering" if cause == "crash" else "starting")
        if cause == "crash":
            await asyncio.sleep(BACKOFF_SECONDS[min(max(self._failures - 1, 0), len(BACKOFF_SECONDS) - 1)])
        if await recovery.look_for(context):
            await self._wait_for_storage()
        try:
            several = context.recipe.cluster.backend != "local"
            nodes = await self._pool.assemble(forever=several and context.ledger.generation > 0)
        except TooFewNodes as error:
            self._fail(str(error))
            return
        while context.directory.missing():  # its checkpoints are out of sight; the controller ends if that lasts
            await asyncio.sleep(0.2)
        await recovery.adopt(context)
        while problem := await check_restart_point(context, self._commits, thorough=self._failures > 0):
            if not context.live.storage_fault:
                self._fail(problem)
                return
            await self._wait_for_storage()
        await self._start(nodes, repeats=cause == "crash" and self._trained)

    async def _wait_for_storage(self) -> None:
        """Until the checkpoints are in sight again: to start from the beginning because a disk is not mounted helps nobody."""
        context, state = self._context, self._context.state
        context.change_state(state, context.live.storage_fault)
        while await recovery.look_for(context):
            await asyncio.sleep(STORAGE_SECONDS)
        context.change_state(state)
        await recovery.adopt(context)

    async def _start(self, nodes: tuple[str, ...], *, repeats: bool) -> None:
        """Journals the new generation, durably: were its number given twice, two generations could commit."""
        context, state = self._context, self._context.state
        while True:
            try:
                start = compose(context, repeats=repeats)
                repeats = False  # its lineage is open
                self._gather(start, nodes)
                return
            except Ousted:
                raise
            except JournalError as error:
                context.change_state(state, str(error))
                await asyncio.sleep(STORAGE_SECONDS)

    def _fail(self, problem: str) -> None:
        self._context.note("alarm", problem)
        self._failed(problem)

    def _failed(self, reason: str) -> None:
        self._context.change_state("failed", reason)
        self._context.events.publish(RunFailed(reason))

    def _gather(self, start: Start, nodes: tuple[str, ...]) -> None:
        """Raises JournalError, and nothing is begun, where the journal cannot be written."""
        context = self._context
        world = len(nodes) * context.recipe.cluster.ranks_per_node
        note_change(context)  # the ranks read the file, which may have been edited under a living controller
        context.promise(
            j.GenerationBegan(
                time=context.clock(),
                generation=start.generation,
                lineage=start.lineage.id,
                checkpoint=start.checkpoint,
                nodes=nodes,
                world=world,
                environment=environment_of(nodes, world),
            )
        )
        self._progressed = self._trained = False
        self._ending, self._told = "", {}
        self._grow_since = None
        self._told_of.clear()
        self._moves.begin()
        self._hang.forget()
        context.live.phase = None
        context.live.step = context.ledger.checkpoints[start.checkpoint].step if start.checkpoint else 0
        context.events.publish(GenerationBegan(start.generation))
        self._gathered_at = time.monotonic()
        self._awaited = start if len(nodes) > 1 else None
        self._tell_to_gather(start, 0, 0)

    def _tell_to_gather(self, start: Start, rank: int, port: int) -> None:
        nodes, cluster = self._context.ledger.generation_nodes, self._context.recipe.cluster
        self._pool.send(
            nodes[rank],
            Gather(
                start=start,
                node_rank=rank,
                nodes=len(nodes),
                ranks_per_node=cluster.ranks_per_node,
                store_host=self._pool.hello(nodes[0]).address,
                store_port=port,
                environment=cluster.env,
            ),
        )

    # What agents and ranks tell

    def agent_came(self, hello: AgentHello, send: Send) -> None:
        self._pool.came(hello, send)
        ledger = self._context.ledger
        if hello.generation and (hello.generation != ledger.generation or not ledger.generation_live):
            send(EndRanks(generation=hello.generation, reason="this generation is over"))
        elif (
            not self._busy() and self._member(hello.node) and hello.generation != ledger.generation and not self._awaits(hello.node)
        ):
            reason = f"the agent of {hello.node} was restarted"
            self.ranks_ended(hello.node, RanksEnded(generation=ledger.generation, ok=False, reason=reason))

    def _awaits(self, node: str) -> bool:
        """Whether the node is still to be told of the living generation."""
        return self._awaited is not None and node != self._context.ledger.generation_nodes[0]

    def _member(self, node: str) -> bool:
        return self._context.ledger.generation_live and node in self._context.ledger.generation_nodes

    def agent_went(self, node: str, send: Send) -> None:
        self._pool.went(node, send)
        if self._ending and self._told:
            self._conclude_if_all()

    def agent_told(self, node: str, message: p.Message) -> None:
        """Anything that an agent says after its hello. Raises ProtocolError for what it may not say."""
        if isinstance(message, NodeStats):
            self._pool.heard(node, message)
            self._moves.see(message)
        elif isinstance(message, RanksEnded):
            self.ranks_ended(node, message)
        elif isinstance(message, Gathered):
            self._store_opened(node, message)
        elif isinstance(message, p.Hung | p.StacksTaken):
            self._hang.told(node, message)
        else:
            raise p.ProtocolError(f"an agent may not send a {type(message).__name__}")

    def _store_opened(self, node: str, gathered: Gathered) -> None:
        context = self._context
        if not self._member(node) or gathered.generation != context.ledger.generation:
            return
        before = context.ledger.node(node).environment
        if gathered.environment and gathered.environment != before:
            if changed := differences(before, gathered.environment):
                context.note("warning", f"the ranks' environment on {node} has changed: {'; '.join(changed[:5])}")
            context.record(
                j.RanksEnvironment(
                    time=context.clock(), node=node, generation=gathered.generation, environment=gathered.environment
                )
            )
        if self._awaited is not None and node == context.ledger.generation_nodes[0]:
            start, self._awaited = self._awaited, None
            for rank in range(1, len(context.ledger.generation_nodes)):
                self._tell_to_gather(start, rank, gathered.store_port)

    def ranks_ended(self, node: str, message: RanksEnded) -> None:
        """All ranks of a node have ended, or are lost with their agent."""
        if not self._member(node) or message.generation != self._context.ledger.generation:
            return
        self._told.setdefault(node, message)
        if not self._ending:
            self._ending, self._ending_since = "failure", time.monotonic()
            self._end_ranks(f"ranks of {node} ended")
            self._concluding = asyncio.get_running_loop().call_later(CONCLUDE_SECONDS, self._conclude)
        self._conclude_if_all()

    def _end_for(self, why: Literal["stop", "restart"], reason: str) -> None:
        self._ending = why
        self._end_ranks(reason)
        self._concluding = asyncio.get_running_loop().call_later(ENDING_SECONDS, self._conclude)

    def ranks_hang(self, node: str, reason: str, stuck: bool) -> None:
        """Their stacks are taken: they are ended and gathered anew. `node` is to blame where a rank of it is stuck."""
        generation = self._context.ledger.generation
        if self._ending or not self._member(node):
            return
        self._pool.send(node, EndRanks(generation=generation, reason=reason))
        code = -signal.SIGSTOP if stuck else 0  # it had to be ended from outside
        exits = (RankExit(rank=-1, code=code, message=reason),) if stuck else ()
        self.ranks_ended(node, RanksEnded(generation=generation, ok=False, exits=exits, reason=reason))

    def _end_ranks(self, reason: str) -> None:
        ledger = self._context.ledger
        for name in ledger.generation_nodes:
            if name not in self._told:
                self._pool.send(name, EndRanks(generation=ledger.generation, reason=reason))

    def _conclude_if_all(self) -> None:
        if self._all_told():
            self._conclude()

    def _all_told(self) -> bool:
        return all(n in self._told or not self._pool.connected(n) for n in self._context.ledger.generation_nodes)

    def _conclude(self) -> None:
        """The generation is over: what follows."""
        if self._concluding is not None:
            self._concluding.cancel()
            self._concluding = None
        context, why = self._context, self._ending
        waited = time.monotonic() - self._ending_since
        if why == "failure" and only_victims(self._told) and waited < FIRST_CAUSE_SECONDS and not self._all_told():
            # Another node has the first cause: it tells it, or turns out to be lost.
            self._concluding = asyncio.get_running_loop().call_later(CONCLUDE_SECONDS / 4, self._conclude)
            return
        if not context.ledger.generation_live or not why:
            return
        self._ending = ""
        if why == "stop":
            self._generation_ended("stopped")
            self._stopped()
        elif why == "restart":
            self._generation_ended("ended for a restart")
            self.begin("crash")
        else:
            failure = first_failure(self._told, self._gone())
            context.note("alarm", f"the ranks ended: {failure.reason}", context.live.step)
            self._generation_ended(failure.reason)
            if failure.hard and len(context.ledger.generation_nodes) > 1:
                self._count_against(failure.node, failure.reason)
            self._after_failure(failure.reason, certain=failure.certain)

    def _gone(self) -> dict[str, str]:
        """Nodes of the generation that have not told of the end of their ranks and cannot, and why."""
        silent = [n for n in self._context.ledger.generation_nodes if n not in self._told]
        lost = {n: self._pool.lost(n)[1] for n in silent}
        return {
            n: why or f"the agent of {n} is gone (its connection broke)"
            for n, why in lost.items()
            if why or not self._pool.connected(n)
        }

    def _count_against(self, node: str, reason: str) -> None:
        """A failure of the node itself; after a few of them it is quarantined."""
        context, cluster = self._context, self._context.recipe.cluster
        context.record(j.NodeFailed(time=context.clock(), node=node, generation=context.ledger.generation, reason=reason))
        record = context.ledger.node(node)
        if record.failures >= cluster.quarantine_after and record.mark == "in use" and self._pool.can_spare(node):
            told = f"failed {record.failures} times; the last failure: {reason}"
            context.record(j.NodeMarked(time=context.clock(), node=node, mark="quarantined", reason=told))
            context.note("alarm", f"{node} is quarantined: it {told} (midwatch node add uses it again)")

    def training(self) -> None:
        """The ranks have reported that they train or hold."""
        self._moves.seen()
        if not self._trained:
            self._trained = True
            self._context.events.publish(RanksTrain())

    def progressed(self) -> None:
        """A step was taken."""
        self._moves.seen()
        self._progressed = True
        self._failures = 0

    def ended(self, cause: Literal["finished", "stopped", "stopped-now", "released", "regrouped"]) -> None:
        """Rank 0 says that the ranks leave by themselves."""
        context = self._context
        self._generation_ended(cause)
        if cause == "finished":
            context.change_state("finished")
            self.dismiss()
            context.over.set()
        elif cause == "released":
            context.change_state("released", "the GPUs are released; resume continues")
            self._pool.wanted = False
        elif cause == "regrouped":
            self.begin("go on")
        else:
            self._stopped()

    # What is looked after every half second

    def look(self) -> None:
        """Starts agents that are missing; acts on nodes that are lost, and on those that could be used and are not."""
        self._pool.look()
        ledger = self._context.ledger
        if not ledger.generation_live or self._busy() or self._ending:
            return
        lost = {n: self._pool.lost(n) for n in ledger.generation_nodes}
        gone = {n: why for n, (how, why) in lost.items() if how == "gone" or (how == "cut" and self._moves.stalled())}
        if gone:
            self._lose(gone)
        elif self._awaited is not None and time.monotonic() - self._gathered_at > GATHER_SECONDS:
            first = ledger.generation_nodes[0]
            self.ranks_ended(
                first, RanksEnded(generation=ledger.generation, ok=False, reason=f"the agent of {first} did not open a store")
            )
        else:
            self._grow()

    def _lose(self, gone: dict[str, str]) -> None:
        context = self._context
        generation = context.ledger.generation
        several = len(context.ledger.generation_nodes) > 1
        reason = "; ".join(gone.values())
        context.note("alarm", f"the ranks are lost: {reason}", context.live.step)
        for node in gone:
            self._told[node] = RanksEnded(generation=generation, ok=False, reason=gone[node])
        self._end_ranks(reason)
        self._generation_ended(reason)
        if several and len(gone) < len(context.ledger.generation_nodes):  # what has ended all at once is no node's fault
            for node, why in gone.items():
                self._count_against(node, why)
        self._after_failure(reason)

    def _grow(self) -> None:
        """Asks for the nodes that are there and not in use, once they have been there for a moment and training goes on."""
        ledger = self._context.ledger
        self._tell_of_spares()
        ready = self._pool.ready()
        more = [n for n in ready if n not in ledger.generation_nodes]
        if not (more and len(ready) > len(ledger.generation_nodes) and self._progressed and self._context.state == "training"):
            self._grow_since = None
        elif self._grow_since is None:
            self._grow_since = time.monotonic()
        elif time.monotonic() - self._grow_since > GROW_SECONDS:
            self._grow_since = None
            self._context.events.publish(NodesToSpare(", ".join(more)))

    def _tell_of_spares(self) -> None:
        """Says, once a generation, which nodes stand by only because the ranks must be a multiple of the model's."""
        context = self._context
        there, ready = self._pool.there()[: context.recipe.cluster.most_nodes], self._pool.ready()
        waiting = [n for n in there if n not in (*ready, *context.ledger.generation_nodes, *self._told_of)]
        if waiting:
            self._told_of.update(waiting)
            words = "stand by as spares" if len(waiting) > 1 else "stands by as a spare"
            context.note("info", f"{', '.join(waiting)} {words}: the ranks must be a multiple of {context.recipe.ranks_multiple}")

    # What commands ask for

    def stop(self, force: bool = False) -> None:
        """Ends the run without the ranks' help, where there are none or they do not answer."""
        context = self._context
        if self.parting:
            return
        if self._work is not None and not self._work.done():
            self._work.cancel()
        if context.ledger.generation_live and any(self._pool.connected(n) for n in context.ledger.generation_nodes):
            self._end_for("stop", "stopped")
        else:
            if context.ledger.generation_live:
                self._generation_ended("stopped")
            self._stopped()

    def restart(self) -> None:
        """Ends the ranks, if there are any, and gathers anew from the restart point."""
        context = self._context
        self._failures = 0
        if context.ledger.generation_live and any(self._pool.connected(n) for n in context.ledger.generation_nodes):
            self._end_for("restart", "a restart was requested")
        else:
            self.begin("go on")

    def mark(self, node: str, mark: Literal["in use", "drained", "quarantined"], author: str) -> str:
        """Decides what a node may be used for; why not, or empty."""
        context = self._context
        if not self._pool.known(node):
            return f"there is no node {node!r} (midwatch node list names them)"
        if mark != "in use" and not self._pool.can_spare(node):
            return f"{node} is needed: at least {context.recipe.fewest_nodes} nodes train ([cluster] nodes)"
        if context.ledger.node(node).mark != mark or mark == "in use":
            context.record(
                j.NodeMarked(time=context.clock(), author=author, node=node, mark=mark, reason=f"by {author}" if author else "")
            )
        return ""

    def agent_refused(self, node: str, reason: str) -> None:
        """An agent was turned away: its node is short of one for that reason."""
        self._pool.turned_away(node, reason)

    @property
    def gathering(self) -> bool:
        """Whether new ranks are being gathered, or waited for."""
        return self._busy()

    def uses(self, node: str) -> bool:
        """Whether ranks of the living generation are on the node."""
        return self._member(node)

    def address(self, node: str) -> str:
        """Where the node's agent is, as it has said."""
        return self._pool.address(node)

    @property
    def generation(self) -> int:
        return self._context.ledger.generation

    def dismiss(self) -> None:
        """Sends the agents away; a resume starts new ones."""
        self._pool.dismiss(Leave())

    def abandon(self, why: str) -> None:
        """The run's directory is no longer at its path: agents and ranks end. What lies in the directory says so, if it can."""
        context, ledger = self._context, self._context.ledger
        if self._work is not None:
            self._work.cancel()
        if ledger.generation_live:
            self._end_ranks(why)
        self.dismiss()
        with contextlib.suppress(JournalError):
            context.note("alarm", f"{why}; the ranks are ended")
            if ledger.generation_live:
                self._generation_ended("the run directory was moved or deleted")
            if context.state not in ("finished", "failed", "released"):
                context.change_state("released", "its directory was moved; resume continues from the newest checkpoint")

    # Inside

    def _busy(self) -> bool:
        return self._work is not None and not self._work.done()

    def _after_failure(self, reason: str, *, certain: bool = False) -> None:
        context = self._context
        if certain:
            self._failed(f"{reason}; restarting would fail in the same way")
            return
        self._failures = 1 if self._progressed else self._failures + 1
        if self._failures > context.recipe.run.restarts:
            self._failed(f"{self._failures} starts in a row failed without a step; the last one: {reason}")
        else:
            self.begin("crash")

    def _generation_ended(self, cause: str) -> None:
        context = self._context
        context.live.phase = None
        self._awaited = None
        context.record(
            j.GenerationEnded(time=context.clock(), generation=context.ledger.generation, cause=cause, step=context.live.step)
        )

    def _stopped(self) -> None:
        """The ranks have ended; who asked for the stop is answered when the agents have ended, too."""
        context = self._context
        failed = f" (it had failed: {context.ledger.reason})" if context.state == "failed" else ""
        context.change_state("released", f"stopped; resume continues from the newest checkpoint{failed}")
        context.events.publish(RanksStopped())
        self._send_agents_away()

    def _send_agents_away(self) -> None:
        self._parting = asyncio.create_task(self._part(), name="parting")

    @property
    def parting(self) -> bool:
        """Whether a stop waits for the agents' end."""
        return self._parting is not None and not self._parting.done()

    async def _part(self) -> None:
        left = await self._pool.part(Leave())
        self.dismiss()
        try:
            if left:
                self._context.note("warning", f"the agent of {left} has not reported its end; it ends when it is reachable again")
            self._context.events.publish(AgentsStopped())
        except Ousted:
            pass
        self._context.over.set()
