"""What Midwatch needs to know of `kto` without torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from midwatch.objectives.setting import Setting
from midwatch.objectives.spec import Chart, ObjectiveSpec
from trainer.objectives.metrics import KL_CHART, REWARD_CHART


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of a stage with this objective."""

    beta: Annotated[float, Setting("strength of the tie to the reference", least=0.0, live=(0.0, 100.0))] = 0.1
    desirable_weight: Annotated[float, Setting("weight of the loss of desirable responses", least=0.0, live=(0.0, 1000.0))] = 1.0
    undesirable_weight: Annotated[float, Setting("weight of the loss of undesirable responses", least=0.0, live=(0.0, 1000.0))] = (
        1.0
    )


SPEC = ObjectiveSpec(
    name="kto",
    summary="Makes desirable responses likelier and undesirable ones less likely than a frozen reference does, without pairs.",
    implementation="trainer.objectives.kto.loss:objective",
    sources=("preference", "unpaired"),
    evaluates="unpaired",
    sample="labelled",
    settings=Settings,
    fewest_samples=2,
    reference=True,
    implicit_reward="beta",
    extra_forwards=2.0,
    metrics={
        "preference/desirable_fraction": "share of the responses that are desirable",
        "preference/chosen_reward": "reward of the desirable responses",
        "preference/rejected_reward": "reward of the undesirable responses",
        "preference/margin": "reward of the desirable responses less that of the undesirable ones",
        "preference/reference_point": "KL of the policy from the reference on mismatched prompts and responses, in nats a response",
    },
    charts=(KL_CHART, (REWARD_CHART, Chart("preference/margin", "margin"))),
)
