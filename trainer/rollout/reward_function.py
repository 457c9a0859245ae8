"""Rewards by a Python function of the user's: `reward(prompts, responses) -> numbers`, lists of texts in, a list of floats out.

None in the place of a number is a response that could not be scored.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainer.batches import share
from trainer.distributed.mesh import gather
from trainer.rollout.sampling import SampledResponses
from trainer.stage.training import Training

log = logging.getLogger("trainer")

Function = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]


class RewardError(Exception):
    """The function cannot be had, or failed; the message says which, where, and the way out."""


def by_function(training: Training, drawn: SampledResponses) -> list[float]:
    """The scores of all responses, on every rank; each calls the function for its share. Raises RewardError on all.

    NaN where there is none: the function gave None, or was not asked, because the response is empty.
    """
    world, place, tokenizer = training.world, training.stage.stage.rollout_settings.function, training.tokenizer
    assert place is not None
    start, stop = share(0, len(drawn.responses), world.rank, world.size)
    scores = [math.nan] * (stop - start)
    problem = ""
    written = [number for number in range(start, stop) if drawn.responses[number]]
    try:
        prompts = [tokenizer.decode(drawn.prompts[number]) for number in written]
        responses = [tokenizer.decode(drawn.responses[number]) for number in written]
        for number, value in zip(written, _called(load(place), place, prompts, responses) if written else [], strict=True):
            scores[number - start] = value
    except RewardError as error:
        problem = str(error)
    told = gather(msgspec.msgpack.encode((problem, scores)), world.control)
    answers = [msgspec.msgpack.decode(body) for body in told]
    for said, _ in answers:
        if said:
            raise RewardError(said)
    return [float(score) for _, part in answers for score in part]


def load(place: str) -> Function:
    """The function at FILE.py:NAME. Raises RewardError."""
    file, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("midwatch_reward", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise RewardError(f"{file}: there is no such file (correct policy.function)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        log.exception("%s: cannot be imported:", file)
        raise RewardError(f"{_line_of(error, file)}: cannot be imported: {type(error).__name__}: {error}") from None
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"{file}: has no function {name!r} (correct policy.function)")
    found: Function = function
    return found


def _called(function: Function, place: str, prompts: list[str], responses: list[str]) -> list[float]:
    try:
        found = [math.nan if score is None else float(score) for score in function(prompts, responses)]
    except Exception as error:  # whatever the user's code raises
        log.exception("%s: failed:", place)
        where = _line_of(error, place.rpartition(":")[0])
        raise RewardError(f"{place}: failed: {type(error).__name__}: {error}, at {where} (correct it and resume)") from None
    if len(found) != len(responses):
        raise RewardError(f"{place}: gave {len(found)} numbers for {len(responses)} responses (give one for each)")
    return found


def _line_of(error: Exception, file: str) -> str:
    """FILE:LINE where the user's file was when the error came up."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else file
