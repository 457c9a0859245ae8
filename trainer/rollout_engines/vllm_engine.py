"""What a server of the user's writes for the ranks: it is given the policy's weights, and each rank's share of the prompts.

The weights go through a directory that ranks and server both see: a fresh one for each version, whole before the link `latest`
points to it, and gone once the server has a newer one. While the server is away, one copy waits for it. A tied output layer is
written out: a server that loads weights into a running model keeps its old output layer otherwise. Before anything is drawn from
new weights, the server's log-probabilities of some prompts must be the trainer's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from midwatch.recipe import Recipe, Stage
from shards.tokenization.tokenizer import Tokenizer
from trainer.batches import share
from trainer.distributed.mesh import World, first_problem, gather, reduce
from trainer.generate import Request, RequestError, Response, Usage
from trainer.generate.reload import ReloadCheck
from trainer.generate.vllm_client import ConnectionPool, Server, ServerError, Under
from trainer.huggingface import export
from trainer.huggingface.tokenizer import TokenizerError
from trainer.model.sharded_model import ShardedModel
from trainer.rollout_engines.rollout_engine import Score

LATEST = "latest"
_NAMED = "policy-"
_ROUND = 0.05
"""Seconds between two looks for orders."""
_PROBE_TOKENS = 512
"""Of the prompts by which a reload is checked, about."""
Found = TypeVar("Found")


class VllmRolloutEngine:
    """As `trainer.rollout_engines.local_engine.LocalRolloutEngine` is, with the engine on the other side of a URL."""

    def __init__(self, recipe: Recipe, stage: Stage, model: ShardedModel, world: World, tokenizer: Tokenizer) -> None:
        """For a stage's context; the server has the stage's positions from the directory that it was started with."""
        given = recipe.generate
        assert given.url is not None
        assert given.weights is not None
        self._recipe, self._stage, self._model, self._world, self._tokenizer = recipe, stage, model, world, tokenizer
        self._weights, self._running = Path(given.weights), given.max_num_seqs
        self.latest = str(self._weights / LATEST)
        """What the server is to be started with."""
        self._server = Server(given.url, given.model, given.timeout, stage.context, model.vocabulary, self.latest)
        self._version = 0
        self._loaded: int | None = None
        """What the server has; none where that is not known."""
        self._gathered: int | None = None
        """The version of `_tensors`, on every rank."""
        self._tensors: dict[str, Tensor] = {}
        """On rank 0, until the server has them."""
        self._written: tuple[int, Path] | None = None
        """The version that the server is to load, and where it is; on rank 0."""
        self._beside: dict[str, bytes] = {}
        self._probe: list[tuple[int, ...]] = []
        """Prompts by which a reload is checked: the same at every reload of a stage."""
        self._check = ReloadCheck(stage.rollout_settings.mismatch)
        self.usage: list[Usage] = []
        """How the server uses its cache is its own matter."""

    @property
    def serves_from(self) -> str | None:
        return self.latest

    def refresh(self, version: int) -> None:
        """The policy's weights of now, which `hand_over` gives to the server; by all ranks."""
        self._version = version
        if version not in (self._loaded, self._gathered):
            whole = self._model.whole()
            self._tensors = {name: values.to("cpu") for name, values in whole if self._world.is_rank_zero}
            self._gathered = version

    def forget(self) -> None:
        """The server's weights are not known any more: it gets the policy's again before it is next asked. By all ranks alike."""
        self._loaded = None

    def hand_over(self, prompts: Sequence[tuple[int, ...]], score: Score, peek: Callable[[], bool]) -> bool:
        """Sees to it that the server answers with the weights of now; false if `peek` said to leave off. By all ranks alike.

        prompts: what it will be asked. score: the policy's log-probabilities [tokens] of prompts' tokens but each one's first, at
        temperature 1; called by all ranks. Raises ServerError on all of them.
        """
        if self._loaded == self._version:
            return True
        self.forget()  # from here on it may have the old ones, the new ones, or some of each
        if self._through([self._prepare], peek) is None:
            return False
        self._probe = self._probe or _probe(prompts)
        if self._probe:
            known = score(self._probe)
            jobs = [partial(self._server.prompt_log_probs, prompt=prompt) for prompt in self._probe if self._world.is_rank_zero]
            given = self._through(jobs, peek)
            if given is None:
                return False
            problem = None
            if self._world.is_rank_zero:
                wrong = self._check.problem(known.cpu(), torch.tensor([value for each in given for value in each]))
                problem = None if wrong is None else str(self._server.stale(wrong))
            problem = first_problem(problem, self._world)
            if problem is not None:
                raise ServerError(problem)
        self._loaded, self._gathered, self._tensors = self._version, None, {}
        return True

    def respond(self, requests: Sequence[Request], peek: Callable[[], bool]) -> list[Response] | None:
        """Answers to all of them, in their order, on every rank; None if `peek` said to leave off. By all ranks alike.

        After `hand_over`. Raises ServerError on all of them, with what the first of them met with.
        """
        for request in requests:
            problem = request.problem(self._stage.context, self._model.vocabulary)
            if problem is not None:
                raise RequestError(problem)
        start, stop = share(0, len(requests), self._world.rank, self._world.size)
        ask = self._server.respond
        mine = self._through([partial(ask, request=request, version=self._version) for request in requests[start:stop]], peek)
        if mine is None:
            return None
        decoder: Any = msgspec.msgpack.Decoder(list[Response])
        told = gather(msgspec.msgpack.encode(mine), self._world.control)
        return [response for body in told for response in decoder.decode(body)]

    def _through(self, jobs: Sequence[Callable[[ConnectionPool], Found]], peek: Callable[[], bool]) -> list[Found] | None:
        """What this rank's jobs give, once all ranks' are done; None if `peek` said to leave off."""
        control = self._world.control
        under = Under(jobs, self._running)
        try:
            while True:
                done = under.wait(_ROUND)
                problem = first_problem(under.problem, self._world)
                if problem is not None:
                    self.forget()  # it may have been started again, with other weights
                    raise ServerError(problem)
                if not reduce([not done], control, dist.ReduceOp.MAX)[0]:
                    return under.results()
                if peek():
                    return None
        finally:
            under.close()

    def _prepare(self, lines: ConnectionPool) -> None:
        """Makes sure that the server is what is wanted; rank 0 hands it the weights."""
        directory = self._copy() if self._world.is_rank_zero else None
        self._server.meet(lines)
        if directory is not None:
            self._server.reload(lines, str(directory))
            self._remove(directory)

    def _copy(self) -> Path:
        """The directory with the policy in it, to which `latest` points; written once. Raises ServerError."""
        if self._written is not None and self._written[0] == self._version and self._points_to(self._written[1]):
            return self._written[1]
        try:
            # What no link points to was for a server that has gone, or for one that has loaded it already.
            self._remove(self._latest())
            self._written = self._version, self._write()
            return self._written[1]
        except OSError as error:
            place = error.filename or self._weights
            raise ServerError(f"{place}: the policy cannot be written: {error.strerror or error} (make room or access)") from None
        except (export.ExportError, TokenizerError) as error:
            raise ServerError(f"{self._weights}: the policy cannot be written: {error}") from None

    def _write(self) -> Path:
        recipe, stage, model = self._recipe, self._stage, self._recipe.model
        family, dtype = export.like(model), model.dtype
        context = max(each.context for each in recipe.stage)
        tensors: export.Tensors = {name: partial(_given, values) for name, values in self._tensors.items()}
        parts, tensors = export.placed(model, family, self._model.vocabulary, tensors, stage, context, untied=True)
        self._beside = self._beside or export.described(recipe, stage, parts, context, self._tokenizer, dtype)
        self._weights.mkdir(parents=True, exist_ok=True)
        half = self._weights / f".{_NAMED}{self._version}.part-{os.getpid()}"
        try:
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            for name, body in self._beside.items():
                (half / name).write_bytes(body)
            export.write(half, parts, tensors, export.TYPES[dtype], export.SHARD_BYTES)
            to = self._unused()
            half.rename(to)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        link = self._weights / f".{LATEST}-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(to.name)
        link.replace(self._weights / LATEST)
        return to

    def _latest(self) -> Path | None:
        link = self._weights / LATEST
        return self._weights / link.readlink() if link.is_symlink() else None

    def _points_to(self, copy: Path) -> bool:
        return self._latest() == copy and copy.is_dir()

    def _remove(self, keep: Path | None) -> None:
        """All copies of policies but this one, and what a process that was killed had half written."""
        for old in [*self._weights.glob(f"{_NAMED}*"), *self._weights.glob(f".{_NAMED}*")]:
            if old != keep:
                shutil.rmtree(old, ignore_errors=True)

    def _unused(self) -> Path:
        """A server may keep a file that it has mapped, and would not notice another of the same name."""
        name, number = f"{_NAMED}{self._version}", 0
        while (self._weights / f"{name}.{number}").exists():
            number += 1
        return self._weights / f"{name}.{number}"


def _probe(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The first different ones of two tokens or more, as many as make `_PROBE_TOKENS`."""
    found: list[tuple[int, ...]] = []
    for prompt in dict.fromkeys(prompts):
        if sum(map(len, found)) >= _PROBE_TOKENS:
            break
        if len(prompt) > 1:
            found.append(prompt)
    return found


def _given(values: Tensor) -> Tensor:
    return values
