"""Annotators: who holds which name, what each is to decide next, and that a decision is on disk before the next pair is shown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
from collections import deque

from launcher.controller.annotation import agreement, pairs, prompts
from launcher.controller.annotation.annotator import Session
from launcher.controller.annotation.pair_sampling import DrawError, Drawing
from launcher.controller.annotation.records import Decision, Prompt, turns, utc
from launcher.controller.annotation.store import PreferenceError, Store, all_decisions
from launcher.controller.core.context import ControllerContext
from launcher.controller.probe.sessions import Probing
from midwatch import protocol as p

log = logging.getLogger("launcher.controller")

AHEAD = 2
"""Pairs that are ready beyond the one that is shown."""
WAIT_SECONDS = 15.0
"""After which an annotator without a pair is told why."""
RETRY_SECONDS = 10.0
"""After several pairs in a row could not be drawn."""
IN_A_ROW = 3
LAST = 50
"""Decisions whose median time is told."""

Question = p.PreferenceBegin | p.PreferenceNext | p.PreferenceMade | p.PreferenceUndo | p.PreferenceLeave | p.PreferenceQuery


class Preferring:
    """All of them. Lives in the controller's event loop."""

    def __init__(self, context: ControllerContext, probing: Probing) -> None:
        self._context = context
        self._directory = context.paths.preferences
        self._drawing = Drawing(context, probing)
        self._sessions: dict[object, Session] = {}
        """By client."""
        self._others: dict[str, list[Decision]] = {}
        """Of those who annotate now: their own lists; of all others: as their files were when somebody began."""
        self._by_pair: dict[str, dict[str, p.Choice]] = {}
        """What each annotator chose of a pair."""
        self._measured: p.Agreement | None = None
        """None: something was decided since."""
        self._stale = False
        self._exporting: asyncio.Task[None] | None = None

    async def answer(self, client: object, question: Question, author: str, *, read_only: bool = False) -> p.Message:
        """A state, or why there is none."""
        try:
            if read_only and not isinstance(question, p.PreferenceQuery):
                raise PreferenceError("this client is read-only and cannot annotate")
            match question:
                case p.PreferenceQuery():
                    measured = agreement.measure(await asyncio.to_thread(all_decisions, self._directory))
                    return p.PreferenceState(id=question.id, agreement=measured)
                case p.PreferenceBegin():
                    await self._begin(client, question, author)
                case p.PreferenceLeave():
                    self.left(client)
                case _:
                    await self._go_on(self._session(client), question)
            return self._state(question.id, self._sessions.get(client))
        except (PreferenceError, DrawError) as error:
            return p.Refused(id=question.id, reason=str(error))
        except OSError as error:
            where = error.filename or self._directory
            return p.Refused(id=question.id, reason=f"{where}: {error.strerror}; nothing is decided until it can be written")

    def left(self, client: object) -> None:
        """The client has gone, or leaves: its name is free."""
        session = self._sessions.pop(client, None)
        if session is not None:
            if session.drawing is not None:
                session.drawing.cancel()
            session.news.set()
            session.store.close()
            self._export()

    async def close(self) -> None:
        for client in list(self._sessions):
            self.left(client)
        await self._drawing.close()
        if self._exporting is not None:
            await self._exporting

    # Beginning

    async def _begin(self, client: object, begin: p.PreferenceBegin, author: str) -> None:
        if not 0 <= begin.shared <= 1:
            raise PreferenceError(f"--shared is {begin.shared:g} (use a share from 0 to 1)")
        if len(begin.checkpoints) > 2:
            raise PreferenceError("more than two checkpoints are named (name one or two)")
        if begin.checkpoints:
            self._drawing.checkpoints(begin.checkpoints)
        self.left(client)
        for other, session in list(self._sessions.items()):
            if session.begin.annotator == begin.annotator and session.begin.session == begin.session:
                self.left(other)
        since = time.strftime("%H:%M", time.localtime(self._context.clock()))
        store = Store(self._directory, begin.annotator, f"on the screen of {author}, since {since}")
        try:
            borders = self._context.ledger.borders
            stage = borders[-1].stage if borders else ""
            asked = [turns(each) for each in begin.prompts]
            found = asked or await asyncio.to_thread(prompts.of_run, self._context.recipe, begin.source, stage)
            self._others = await asyncio.to_thread(all_decisions, self._directory) | self._working()
            queue = prompts.order(found, begin.annotator, begin.shared)
        except BaseException:
            store.close()
            raise
        session = Session(begin, author, store, queue)
        session.problem = "; ".join([*store.notes, *self._drawing.drawn.notes])
        self._drawing.drawn.notes.clear()
        self._others[begin.annotator] = store.decisions
        self._by_pair, self._measured = {}, None
        for name, made in self._others.items():
            for each in made:
                self._by_pair.setdefault(each.pair, {})[name] = each.choice
        self._sessions[client] = session
        session.drawing = asyncio.create_task(self._keep_ahead(session), name=f"prefer-{begin.annotator}")
        await asyncio.sleep(0)  # a pair that is drawn already is told at once: a screen that comes back goes on showing it
        self._export()

    def _working(self) -> dict[str, list[Decision]]:
        return {session.begin.annotator: session.store.decisions for session in self._sessions.values()}

    def _session(self, client: object) -> Session:
        if client not in self._sessions:
            raise PreferenceError(p.BEGIN_FIRST)
        return self._sessions[client]

    # Deciding

    async def _go_on(self, session: Session, question: Question) -> None:
        match question:
            case p.PreferenceMade():
                self._make(session, question)
            case p.PreferenceUndo():
                self._undo(session, question)
        if isinstance(question, p.PreferenceNext) and not session.ready and not session.problem and not self._over(session):
            session.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.news.wait(), WAIT_SECONDS)

    def _make(self, session: Session, made: p.PreferenceMade) -> None:
        """Raises OSError and PreferenceError."""
        if session.store.knows(made.decision):
            return
        pair = self._drawing.drawn.get(made.pair)
        if pair is None or self._has_decided(session, made.pair):
            raise PreferenceError("that pair is decided already, or does not exist")
        swapped = pair.swapped(session.begin.annotator)
        left, right = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        decision = Decision(
            id=made.decision,
            time=utc(self._context.clock()),
            annotator=session.begin.annotator,
            author=session.author,
            pair=pair.id,
            prompt=pair.prompt,
            left=left,
            right=right,
            swapped=swapped,
            choice=made.choice,
            seconds=round(made.seconds, 3),
            shared=any(each.id == pair.id and shared for each, shared in session.ready),
        )
        session.store.add(decision)
        self._by_pair.setdefault(pair.id, {})[decision.annotator] = decision.choice
        self._measured = None
        session.ready = deque(each for each in session.ready if each[0].id != pair.id)
        session.room.set()
        self._export()

    def _undo(self, session: Session, undo: p.PreferenceUndo) -> None:
        """Raises OSError and PreferenceError."""
        if session.store.knows(undo.undo):
            return
        back = session.store.undo(undo.undo, utc(self._context.clock()))
        if back is None:
            raise PreferenceError("there is nothing to undo")
        self._by_pair.get(back.pair, {}).pop(back.annotator, None)
        self._measured = None
        pair = self._drawing.drawn.get(back.pair)
        if pair is not None:
            session.ready.appendleft((pair, back.shared))
        self._export()

    # Drawing

    async def _keep_ahead(self, session: Session) -> None:
        """Keeps pairs ready for one annotator, as long as there are prompts."""
        begin = session.begin
        put_off: set[Prompt] = set()
        failures = 0
        while session.queue:
            session.room.clear()
            if len(session.ready) > AHEAD:
                await session.room.wait()
                continue
            prompt, shared = session.queue.popleft()
            if self._is_done(session, prompt, shared):
                continue
            session.drawn_now = 1
            try:
                pair = await self._drawing.pair(prompt, begin.checkpoints, begin.temperature, begin.limit)
            except (DrawError, OSError) as error:
                failures += 1
                log.warning("no pair for %s: %s", begin.annotator, error)
                if prompt not in put_off:  # it may be the prompt, or the checkpoint: the others are tried first
                    put_off.add(prompt)
                    session.queue.append((prompt, shared))
                if failures >= IN_A_ROW or not session.queue:
                    session.problem = f"no pair can be generated: {error}"
                    session.news.set()
                    await asyncio.sleep(RETRY_SECONDS)
                continue
            finally:
                session.drawn_now = 0
            failures, session.problem = 0, "" if failures else session.problem
            if not self._has_decided(session, pair.id) and all(pair.id != each.id for each, _ in session.ready):
                session.ready.append((pair, shared))
                session.news.set()
        session.news.set()

    def _is_done(self, session: Session, prompt: Prompt, shared: bool) -> bool:
        """Whether the annotator has decided the prompt's pair; of one that is not shared, whether anybody has, or is about to."""
        begin = session.begin
        names = self._drawing.checkpoints(begin.checkpoints) if begin.checkpoints else ()
        found = {each.id for each in self._drawing.drawn.of(prompt) if not names or each.checkpoints == names}
        if any(self._has_decided(session, id) for id in found):
            return True
        if shared or not found:
            return False
        taken = {each.id for other in self._sessions.values() if other is not session for each, _ in other.ready}
        return any(id in taken or any(choice != "skip" for choice in self._by_pair.get(id, {}).values()) for id in found)

    def _has_decided(self, session: Session, pair: str) -> bool:
        return session.begin.annotator in self._by_pair.get(pair, {})

    def _over(self, session: Session) -> bool:
        return not session.ready and session.drawing is not None and session.drawing.done()

    # Telling

    def _state(self, id: int, session: Session | None) -> p.PreferenceState:
        if self._measured is None:
            self._measured = agreement.measure(self._others)
        measured = self._measured
        if session is None:
            return p.PreferenceState(id=id, agreement=measured)
        made = session.store.decisions
        midnight = utc(time.mktime((*time.localtime(self._context.clock())[:3], 0, 0, 0, 0, 0, -1)))
        note, session.problem = session.problem, ""
        return p.PreferenceState(
            id=id,
            agreement=measured,
            annotator=session.begin.annotator,
            pair=session.shown,
            today=sum(each.time >= midnight for each in made),
            total=len(made),
            seconds=statistics.median(each.seconds for each in made[-LAST:]) if made else None,
            left=len(session.queue) + session.drawn_now + len(session.ready),
            note=note,
            over=self._over(session),
        )

    def _export(self) -> None:
        """Has `pairs.jsonl` written anew; whatever is decided meanwhile has it written once more."""
        self._stale = True
        if self._exporting is None or self._exporting.done():
            self._exporting = asyncio.create_task(self._export_all(), name="prefer-export")

    async def _export_all(self) -> None:
        while self._stale:
            self._stale = False
            try:
                await asyncio.to_thread(pairs.export, self._directory)
            except OSError as error:  # the decisions are safe, and the next one tries again
                log.warning("the pairs cannot be exported: %s", error)
