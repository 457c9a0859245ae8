"""Asks in, tokens out: which checkpoints are loaded, which answers are under way, a bit of work at a time."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.protocol import Message, ProbeAsk, ProbeBegan, ProbeEnd, ProbeStop, ProbeToken
from shards.common.errors import ShardError
from trainer.generate import Event, Finish, RequestError
from trainer.probe.loading import Loaded
from trainer.probe.text import Stream, pieces

log = logging.getLogger("trainer.probe")


@dataclass
class CheckpointReply:
    """One checkpoint's, under way."""

    ask: ProbeAsk
    which: int
    stream: Stream
    began: float
    tokens: int = 0
    ids: list[int] = field(default_factory=list)
    """Of the prompt and the answer so far."""


class Service:
    """Not thread-safe. `send` gets what is answered; `find` gives a checkpoint's id by what it was called, `load` it by its id."""

    def __init__(
        self,
        find: Callable[[str], str],
        load: Callable[[str], Loaded],
        keep: int,
        send: Callable[[Message], None],
        score: Callable[[list[int]], float | None] = lambda ids: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """keep: checkpoints that are kept loaded. score: what the run's reward model makes of a conversation's ids."""
        self._find, self._load, self._keep, self._send, self._clock = find, load, keep, send, clock
        self._judged = score
        self._waiting: list[tuple[ProbeAsk, int, str]] = []
        """What is asked, of which of its checkpoints, and that one's id."""
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        """By id, the one used last at the end."""
        self._answers: dict[tuple[str, int], CheckpointReply] = {}
        """By checkpoint and the number of its engine's request."""

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._answers)

    @property
    def loaded(self) -> list[str]:
        return list(self._loaded)

    def take(self, message: Message) -> None:
        if isinstance(message, ProbeAsk):
            for which, name in enumerate(message.checkpoints):
                try:
                    self._waiting.append((message, which, self._find(name)))
                except CheckpointError as error:
                    self._fail(message, which, str(error))
        elif isinstance(message, ProbeStop):
            self._stop(message.ask)

    def work(self) -> None:
        """Begins the next answer that can begin, and takes those under way a step further."""
        self._begin_next()
        for id, loaded in list(self._loaded.items()):
            if loaded.engine.busy:
                self._step(id, loaded)

    def _stop(self, number: int) -> None:
        for waiting in [each for each in self._waiting if each[0].ask == number]:
            self._waiting.remove(waiting)
            self._send(ProbeEnd(ask=number, which=waiting[1], checkpoint=waiting[2], finish="aborted"))
        for (id, request), answer in list(self._answers.items()):
            if answer.ask.ask == number:
                self._loaded[id].engine.abort(request)
                self._end(id, request, "aborted")

    def _begin_next(self) -> None:
        for at, (ask, which, id) in enumerate(self._waiting):
            if id not in self._loaded and not self._make_room():
                continue  # an answer of each that is loaded is under way
            del self._waiting[at]
            try:
                self._begin(ask, which, id)
            except (CheckpointError, ShardError, RequestError) as error:
                self._fail(ask, which, str(error))
            except (MemoryError, torch.OutOfMemoryError):
                self._loaded.pop(id, None)
                self._fail(
                    ask, which, f"there is no memory for checkpoint {id} ([probe] device and checkpoints decide what it takes)"
                )
            except Exception as error:  # a bug must not end the other answers; the log has it whole
                log.exception("an ask failed")
                self._fail(ask, which, f"{type(error).__name__}: {error} (logs/probe.log has more)")
            return

    def _make_room(self) -> bool:
        while len(self._loaded) >= self._keep:
            idle = next((id for id, loaded in self._loaded.items() if not loaded.engine.busy), None)
            if idle is None:
                return False
            log.info("checkpoint %s is let go", idle)
            del self._loaded[idle]
        return True

    def _begin(self, ask: ProbeAsk, which: int, id: str) -> None:
        loaded = self._loaded.get(id)
        if loaded is None:
            began = self._clock()
            loaded = self._load(id)
            log.info("checkpoint %s is loaded, in %.1f s", id, self._clock() - began)
            self._loaded[id] = loaded
        self._loaded.move_to_end(id)
        request = loaded.request(ask, ask.turns[which] if which < len(ask.turns) else ())
        number = loaded.engine.add(request)
        stream = Stream(loaded.tokenizer.decode, request.prompt)
        self._answers[id, number] = CheckpointReply(ask, which, stream, self._clock(), ids=list(request.prompt))
        self._send(
            ProbeBegan(
                ask=ask.ask,
                which=which,
                checkpoint=id,
                stage=loaded.stage.name,
                form=loaded.form(ask),
                prompt_tokens=len(request.prompt),
            )
        )

    def _step(self, id: str, loaded: Loaded) -> None:
        try:
            events = loaded.engine.step()
        except Exception as error:  # of the device, most likely: this checkpoint is loaded anew when it is asked again
            log.exception("checkpoint %s failed", id)
            del self._loaded[id]
            for at in [at for at in self._answers if at[0] == id]:
                answer = self._answers.pop(at)
                self._fail(answer.ask, answer.which, f"{type(error).__name__}: {error} (logs/probe.log has more; ask again)")
            return
        for event in events:
            self._tell(id, loaded, event)

    def _tell(self, id: str, loaded: Loaded, event: Event) -> None:
        answer = self._answers[id, event.id]
        answer.tokens += 1
        answer.ids.append(event.token)
        known = [number for number, _ in event.alternatives]
        piece, *others = pieces(loaded.tokenizer, [event.token, *known])
        chances = torch.tensor([chance for _, chance in event.alternatives]).exp().tolist()
        self._send(
            ProbeToken(
                ask=answer.ask.ask,
                which=answer.which,
                text=answer.stream.add(event.token),
                piece=piece,
                log_prob=event.log_prob,
                alternatives=tuple(zip(others, chances, strict=True)),
            )
        )
        if event.finish is not None:
            self._end(id, event.id, event.finish)

    def _end(self, id: str, request: int, finish: Finish) -> None:
        answer = self._answers.pop((id, request))
        self._send(
            ProbeEnd(
                ask=answer.ask.ask,
                which=answer.which,
                checkpoint=id,
                finish=finish,
                text=answer.stream.rest(),
                tokens=answer.tokens,
                seconds=self._clock() - answer.began,
                score=self._score(id, answer, finish),
            )
        )

    def _score(self, id: str, answer: CheckpointReply, finish: Finish) -> float | None:
        """What a reward model of the run makes of the answer; None where there is none, or nobody was answered.

        It is read where a turn ends, as that is where a reward model has learned to say it; an answer that was cut off is ended.
        """
        loaded = self._loaded.get(id)
        if loaded is None or loaded.form(answer.ask) != "chat" or finish == "aborted":
            return None
        try:
            ended = answer.ids[-1:] and answer.ids[-1] in loaded.tokenizer.stops
            return self._judged(answer.ids if ended else [*answer.ids, loaded.tokenizer.turn_end])
        except (CheckpointError, MemoryError, RuntimeError) as error:
            log.warning("the answer is not scored: %s", error)
            return None

    def _fail(self, ask: ProbeAsk, which: int, problem: str) -> None:
        log.warning("%s: %s", ask.checkpoints[which], problem)
        self._send(ProbeEnd(ask=ask.ask, which=which, checkpoint=ask.checkpoints[which], finish="failed", problem=problem))
