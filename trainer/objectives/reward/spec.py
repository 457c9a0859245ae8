"""What Midwatch needs to know of `reward` without torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from midwatch.objectives.setting import Setting
from midwatch.objectives.spec import ObjectiveSpec
from trainer.objectives.metrics import PREFERENCE, PREFERENCE_CHART


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of a stage with this objective."""

    margin: Annotated[float, Setting("by which the chosen response is to score higher", live=(-1000.0, 1000.0))] = 0.0
    center_rewards: Annotated[
        float, Setting("weight of the squared sum of a pair's scores, which keeps them about 0", least=0.0, live=(0.0, 1000.0))
    ] = 0.0


SPEC = ObjectiveSpec(
    name="reward",
    summary="Trains a model that scores responses, from pairs of a better and a worse one.",
    implementation="trainer.objectives.reward.loss:objective",
    sources=("preference",),
    sample="scored",
    settings=Settings,
    scalar=True,
    evaluates="preference",
    metrics=PREFERENCE,
    charts=(PREFERENCE_CHART,),
)
