"""What a server of the user's writes for the ranks: it is given the policy's weights, and each rank's share of the prompts.

The weights go through a directory that ranks and server both see: a fresh one for each version, whole before the link `latest`
points to it, and gone once the server has a newer one.
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
import torch.distributed as dist
from torch import Tensor

from launcher.recipe import Recipe, Stage
from shards.tokenizer import Tokenizer
from trainer import export
from trainer.batch import share
from trainer.generate import Request, RequestError, Response, Usage
from trainer.generate.served import Lines, Server, ServerError, Under
from trainer.hf_tokenizer import TokenizerError
from trainer.network import Network
from trainer.parallel import World, first_problem, gather, reduce

LATEST = "latest"
_NAMED = "policy-"
_ROUND = 0.05
"""Seconds between two looks for orders."""
Found = TypeVar("Found")


class Outside:
    """As `trainer.responder.Responder` is, with the engine on the other side of a URL."""

    def __init__(self, recipe: Recipe, stage: Stage, network: Network, world: World, tokenizer: Tokenizer) -> None:
        """For a stage's context; the server has the stage's positions from the directory that it was started with."""
        given = recipe.generate
        assert given.url is not None
        assert given.weights is not None
        self._recipe, self._stage, self._network, self._world, self._tokenizer = recipe, stage, network, world, tokenizer
        self._weights, self._running = Path(given.weights), given.running
        latest = str(self._weights / LATEST)
        self._server = Server(given.url, given.model, given.timeout, stage.context, network.vocabulary, latest)
        self._version = 0
        self._loaded: int | None = None
        """What the server has; none where that is not known."""
        self._tensors: dict[str, Tensor] = {}
        """On rank 0, until the server has them."""
        self._beside: dict[str, bytes] = {}
        self.usage: list[Usage] = []
        """How the server uses its cache is its own matter."""

    def refresh(self, version: int) -> None:
        """The policy's weights of now, which the server gets when it is next asked; by all ranks."""
        self._version = version
        if self._loaded != version:
            whole = self._network.whole()
            self._tensors = {name: values.to("cpu") for name, values in whole if self._world.leads}

    def respond(self, requests: Sequence[Request], peek: Callable[[], bool]) -> list[Response] | None:
        """Answers to all of them, in their order, on every rank; None if `peek` said to leave off. By all ranks alike.

        Raises ServerError on all of them, with what the first of them met with.
        """
        for request in requests:
            problem = request.problem(self._stage.context, self._network.vocabulary)
            if problem is not None:
                raise RequestError(problem)
        if self._loaded != self._version:
            if self._through([self._prepare], peek) is None:
                return None
            self._loaded, self._tensors = self._version, {}
        start, stop = share(0, len(requests), self._world.rank, self._world.size)
        ask = self._server.respond
        mine = self._through([partial(ask, request=request, version=self._version) for request in requests[start:stop]], peek)
        if mine is None:
            return None
        decoder: Any = msgspec.msgpack.Decoder(list[Response])
        told = gather(msgspec.msgpack.encode(mine), self._world.control)
        return [response for body in told for response in decoder.decode(body)]

    def _through(self, jobs: Sequence[Callable[[Lines], Found]], peek: Callable[[], bool]) -> list[Found] | None:
        """What this rank's jobs give, once all ranks' are done; None if `peek` said to leave off."""
        control = self._world.control
        under = Under(jobs, self._running)
        try:
            while True:
                done = under.wait(_ROUND)
                problem = first_problem(under.problem, self._world)
                if problem is not None:
                    # It may have been started anew, with other weights.
                    self._loaded = None
                    raise ServerError(problem)
                if not reduce([not done], control, dist.ReduceOp.MAX)[0]:
                    return under.results()
                if peek():
                    return None
        finally:
            under.close()

    def _prepare(self, lines: Lines) -> None:
        """Makes sure that the server is what is wanted; rank 0 hands it the weights."""
        directory = self._written() if self._world.leads else None
        self._server.meet(lines)
        if directory is not None:
            self._server.reload(lines, str(directory))
            for old in self._weights.glob(f"{_NAMED}*"):
                if old != directory:
                    shutil.rmtree(old, ignore_errors=True)

    def _written(self) -> Path:
        """The directory with the policy in it, to which `latest` points. Raises ServerError."""
        try:
            return self._write()
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
        parts, tensors = export.placed(model, family, self._network.vocabulary, tensors, stage, context)
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

    def _unused(self) -> Path:
        """A server may keep a file that it has mapped, and would not notice another of the same name."""
        name, number = f"{_NAMED}{self._version}", 0
        while (self._weights / f"{name}.{number}").exists():
            number += 1
        return self._weights / f"{name}.{number}"


def _given(values: Tensor) -> Tensor:
    return values
