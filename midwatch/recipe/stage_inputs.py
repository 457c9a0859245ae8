"""Which earlier stage's product a stage begins with, and which one's scores it learns from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from midwatch.recipe.stage import Stage


def base(stages: Sequence[Stage], index: int, taken: Collection[str] | None = None) -> int | None:
    """The stage whose product this one begins with; None for the one that begins with the model as it is.

    That before it, unless the stage's `from` names another; a reward model is nothing to go on from. taken: names of the stages
    that were not passed over, where that is known.
    """
    wanted = stages[index].base
    for earlier in reversed(range(index)):
        stage = stages[earlier]
        if stage.name == wanted or (wanted is None and not stage.scalar and (taken is None or stage.name in taken)):
            return earlier
    return None


def reward_model_stage(stages: Sequence[Stage], index: int, taken: Collection[str] | None = None) -> int | None:
    """The reward stage whose product scores this one's responses; None where nothing does, or a function."""
    stage = stages[index]
    if not judged(stage):
        return None
    for earlier in reversed(range(index)):
        name, wanted = stages[earlier].name, stage.rollout_settings.reward
        if stages[earlier].scalar and (name == wanted or (wanted is None and (taken is None or name in taken))):
            return earlier
    return None


def judged(stage: Stage) -> bool:
    """Whether a reward model scores its responses."""
    return stage.spec.reward_model and stage.rollout_settings.function is None


def passed_over(stages: Sequence[Stage], index: int, taken: Collection[str]) -> str | None:
    """Why a stage cannot begin when only these were taken before it."""
    stage = stages[index]
    for needed in (stage.base, stage.rollout_settings.reward if judged(stage) else None):
        if needed is not None and needed not in taken:
            return f'"{stage.name}" rests on "{needed}", which was passed over (advance to "{needed}" first)'
    if judged(stage) and reward_model_stage(stages, index, taken) is None:
        return f'"{stage.name}" needs a reward model, and every stage that trains one was passed over'
    return None


def problems(stages: Sequence[Stage], index: int) -> list[tuple[str, str]]:
    """(key, what is wrong and the way out) of where a stage comes from."""
    stage, found = stages[index], []
    models = [each.name for each in stages[:index] if not each.scalar]
    rewards = [each.name for each in stages[:index] if each.scalar]
    if stage.base is not None and stage.base not in models:
        found.append(("from", f'"{stage.base}" is not an earlier stage with a language model (there are: {_listed(models)})'))
    if judged(stage) and reward_model_stage(stages, index) is None:
        wanted = "" if stage.rollout_settings.reward is None else f'"{stage.rollout_settings.reward}" is none: '
        way = f"there are: {_listed(rewards)}" if rewards else "put one before it, or set policy.function"
        found.append(("rollout", f"{wanted}it needs an earlier stage with objective reward ({way})"))
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
