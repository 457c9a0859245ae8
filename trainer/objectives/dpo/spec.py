"""What Midwatch needs to know of `dpo` without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from midwatch.objectives.setting import Problem, Setting
from midwatch.objectives.spec import ObjectiveSpec
from trainer.objectives.metrics import KL_CHART, PREFERENCE, PREFERENCE_CHART, REWARD_CHART


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of a stage with this objective."""

    beta: Annotated[float, Setting("strength of the tie to the reference", least=0.0, live=(0.0, 100.0))] = 0.1
    label_smoothing: Annotated[
        float,
        Setting(
            "share of the pairs assumed to be labelled wrongly",
            least=0.0,
            most=1.0,
            live=(0.0, 0.499),
            when=("dpo_loss", "sigmoid"),
        ),
    ] = 0.0
    dpo_loss: Annotated[
        Literal["sigmoid", "ipo"],
        Setting("DPO's own loss, or IPO's: the squared distance of the log-ratios' difference from 1 / (2 beta)"),
    ] = "sigmoid"
    length_normalised: Annotated[bool, Setting("whether a response's log-probability is its tokens' mean, not their sum")] = False
    reference_cached: Annotated[
        bool,
        Setting(
            "whether the reference's log-probabilities of all pairs are computed before the first step and kept in files; the "
            "reference then leaves memory, and the policy's distance from it on fresh responses is not reported"
        ),
    ] = False
    reference_free: Annotated[bool, Setting("whether there is no reference, as if one gave all responses the same probability")] = (
        False
    )


def check(settings: Any) -> list[Problem]:
    found: list[Problem] = []
    if settings.dpo_loss == "ipo" and settings.beta == 0:
        found.append(("beta", 'must be greater than 0 for dpo_loss "ipo", which aims at 1 / (2 beta)'))
    if settings.reference_cached and settings.reference_free:
        found.append(("reference_cached", "is for dpo with a reference (drop it)"))
    return found


SPEC = ObjectiveSpec(
    name="dpo",
    summary="Prefers the chosen response of a pair to the rejected one by more than a frozen reference does.",
    implementation="trainer.objectives.dpo.loss:objective",
    sources=("preference",),
    sample="preference",
    settings=Settings,
    check=check,
    reference="reference_free",
    evaluates="preference",
    implicit_reward="beta",
    metrics=PREFERENCE,
    charts=(KL_CHART, (REWARD_CHART, *PREFERENCE_CHART)),
)
