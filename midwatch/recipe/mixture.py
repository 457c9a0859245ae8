"""What a stage reads beside its `mixture`: how the weights are taken, limits of epochs, and `[[stage.anneal]]`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import msgspec

from shards.sampling.mixing import covers


class Anneal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mixture to come."""

    at: int | float
    """Steps of the stage after which it holds; below 1, the share of the stage's steps."""
    mixture: dict[str, float]
    """As the stage's own; what is left out is not read."""

    def step(self, steps: int) -> int:
        """Steps of a stage of so many after which it holds."""
        return int(self.at) if self.at >= 1 else max(1, round(self.at * steps))


class MixedStage(Protocol):
    """What of a stage these checks read."""

    @property
    def objective(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def mixture(self) -> Mapping[str, float]: ...
    @property
    def mixture_by(self) -> str: ...
    @property
    def mixture_temperature(self) -> float: ...
    @property
    def max_epochs(self) -> Mapping[str, float]: ...
    @property
    def anneal(self) -> Sequence[Anneal]: ...
    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def data_kinds(self) -> Sequence[str]: ...


def problems(stage: MixedStage) -> list[tuple[str, str]]:
    """(key, what is wrong and the way out) for each impossible setting."""
    found: list[tuple[str, str]] = []
    for key, mixture in _mixtures(stage):
        if not all(0 <= weight < math.inf for weight in mixture.values()) or not sum(mixture.values()) > 0:
            found.append((key, "needs at least one source with a weight above 0, and none below"))
        for name in mixture:
            whole = next((other for other in mixture if other != name and covers(other, name)), None)
            if whole is not None:
                found.append((key, f'"{name}" is part of "{whole}", which it names too (name the whole, or its parts)'))
    if not 0 < stage.mixture_temperature < math.inf:
        found.append(("mixture_temperature", "must be greater than 0 and finite"))
    elif stage.mixture_temperature != 1 and stage.mixture_by != "tokens":
        found.append(("mixture_temperature", 'is for mixture_by = "tokens" (set that, or drop it)'))
    for name, times in stage.max_epochs.items():
        if not 0 < times < math.inf:
            found.append(("max_epochs", f'of "{name}" must be greater than 0 and finite (or left out: no limit)'))
        if not any(covers(name, source) or covers(source, name) for source in stage.sources):
            found.append(("max_epochs", f'names "{name}", which the mixture does not (it has: {", ".join(stage.sources)})'))
    for at, each in enumerate(stage.anneal):
        if not 0 < each.at < stage.steps or (each.at >= 1 and each.at != int(each.at)):
            way = f"use 1 to {stage.steps - 1} steps, or a share such as 0.9"
            found.append((f"anneal.{at}", f"at = {each.at} is no step within a stage of {stage.steps} ({way})"))
    steps = [each.step(stage.steps) for each in stage.anneal]
    found += [
        (f"anneal.{at + 1}", f"at step {b} comes after step {a} (put them in order)")
        for at, (a, b) in enumerate(pairwise(steps))
        if a >= b
    ]
    return found


def _mixtures(stage: MixedStage) -> Iterator[tuple[str, Mapping[str, float]]]:
    yield "mixture", stage.mixture
    for at, each in enumerate(stage.anneal):
        yield f"anneal.{at}.mixture", each.mixture


def declared(name: str, kinds: Mapping[str, str]) -> str | None:
    """The `[[data.source]]` that a mixture's name is of: itself, or the one that it is a part of by its label."""
    return max((source for source in kinds if covers(source, name)), key=len, default=None)


def name_problems(stage: MixedStage, kinds: Mapping[str, str]) -> list[tuple[tuple[str | int, ...], str]]:
    """(path of the key within the stage, what is wrong) for each source that is none, or not of a kind that is read."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    for key, mixture in _mixtures(stage):
        for name in mixture:
            path = (*(int(part) if part.isdigit() else part for part in key.split(".")), name)
            source = declared(name, kinds)
            if source is None:
                close = difflib.get_close_matches(name, kinds, 1)
                hint = f' (did you mean "{close[0]}"?)' if close else f" (there are: {', '.join(kinds) or 'none'})"
                found.append((path, f'mixture names a source "{name}" that [[data.source]] lacks{hint}'))
            elif kinds[source] not in stage.data_kinds:
                reads = " and ".join(stage.data_kinds)
                found.append((path, f'{stage.objective} reads {reads} sources, "{name}" is {kinds[source]}'))
    return found
