"""The objectives that train, each with its default settings."""

from __future__ import annotations

from midwatch.objectives.registry import built_in
from midwatch.recipe import Stage
from trainer.objectives.objective import Objective, objective_of


def stage_of(name: str) -> Stage:
    return Stage(name=name, objective=name, steps=1, context=8, global_batch=1, mixture={"a": 1.0})


OBJECTIVES = {spec.name: objective_of(stage_of(spec.name)) for spec in built_in() if not spec.makes}
_critic = OBJECTIVES["ppo"].critic
assert _critic is not None
CRITIC: Objective = _critic
