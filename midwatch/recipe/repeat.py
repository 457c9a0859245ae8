"""Stages in rounds: a recipe that says `repeat` becomes one in which each round's stages stand one after the other.

Each stage's name, and that of each source that one of them makes, gets the round's number: `dpo-1`, `dpo-2`. Within a round they
speak of their own; what comes after the last round speaks of that.
"""

from __future__ import annotations

import msgspec

from midwatch.recipe.recipe import Recipe
from midwatch.recipe.stage import Stage

MOST_TIMES = 1000
"""Each round has stages and sources of its own, and a recipe is read in a moment."""

Names = dict[str, str]
"""Of stages and sources: what each is called from here on."""


class RepeatError(ValueError):
    """The rounds cannot be made; `index` is that of the stage that asks for them."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def expanded(recipe: Recipe) -> tuple[Recipe, list[int]]:
    """The recipe without `repeat`, and for each of its stages the index that it had. Raises RepeatError."""
    stages: list[Stage] = []
    originals: list[int] = []
    sources = list(recipe.data.source)
    named: Names = {}
    for index, stage in enumerate(recipe.stage):
        stages.append(_named(stage, named))
        originals.append(index)
        if stage.repeat is None:
            continue
        first = _first(recipe, index)
        count = index - first + 1
        if originals[-count:] != list(range(first, index + 1)):
            raise RepeatError(index, f'stage "{stage.name}": repeat reaches into other rounds (let it begin after them)')
        group = [msgspec.structs.replace(each, repeat=None) for each in stages[-count:]]
        del stages[-count:], originals[-count:]
        inside = {each.name for each in group}
        made = [source for source in sources if source.origin == "stage" and source.stage in inside]
        sources = [source for source in sources if source not in made]
        for number in range(1, stage.repeat.times + 1):
            named = named | {name: f"{name}-{number}" for name in (*inside, *(source.name for source in made))}
            stages += [_named(each, named) for each in group]
            originals += range(first, index + 1)
            sources += [msgspec.structs.replace(each, name=named[each.name], stage=named[each.stage or ""]) for each in made]
    data = msgspec.structs.replace(recipe.data, source=tuple(sources))
    return msgspec.structs.replace(recipe, stage=tuple(stages), data=data), originals


def _first(recipe: Recipe, index: int) -> int:
    stage = recipe.stage[index]
    assert stage.repeat is not None
    names = [each.name for each in recipe.stage[: index + 1]]
    if stage.repeat.since not in names:
        raise RepeatError(index, f'stage "{stage.name}": repeat.since: "{stage.repeat.since}" is not an earlier stage')
    if not 1 <= stage.repeat.times <= MOST_TIMES:
        raise RepeatError(index, f'stage "{stage.name}": repeat.times must be 1 to {MOST_TIMES}')
    return names.index(stage.repeat.since)


def _named(stage: Stage, names: Names) -> Stage:
    """With all names in it as they are from here on."""
    policy = stage.rollout
    if policy is not None and policy.reward is not None:
        policy = msgspec.structs.replace(policy, reward=names.get(policy.reward, policy.reward))
    return msgspec.structs.replace(
        stage,
        name=names.get(stage.name, stage.name),
        base=None if stage.base is None else names.get(stage.base, stage.base),
        mixture=_mixture(stage.mixture, names),
        max_epochs=_mixture(stage.max_epochs, names),
        anneal=tuple(msgspec.structs.replace(each, mixture=_mixture(each.mixture, names)) for each in stage.anneal),
        rollout=policy,
    )


def _mixture(mixture: dict[str, float], names: Names) -> dict[str, float]:
    return {names.get(name, name): value for name, value in mixture.items()}
