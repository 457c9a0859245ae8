"""What Midwatch needs to know of `constitutional` without torch."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from midwatch.objectives.setting import Problem, Setting
from midwatch.objectives.spec import SAMPLING, ObjectiveSpec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of a stage with this objective."""

    principles: Annotated[tuple[str, ...], Setting("what responses are revised by, one at a time")] = ()


def check(settings: Any) -> list[Problem]:
    return [] if settings.principles else [("principles", "are what constitutional revises responses by (give some)")]


SPEC = ObjectiveSpec(
    name="constitutional",
    summary="Makes data: the model criticises and revises its responses by principles, and compares two of them.",
    implementation="trainer.synthetic.methods:constitution",
    sources=("sft", "preference"),
    sample="prompt",
    settings=Settings,
    check=check,
    rollout=SAMPLING,
    makes={"revisions": "sft", "pairs": "preference", "judged": "preference"},
    metrics={
        "synthetic/revisions": "revised responses of the step",
        "synthetic/changed": "share of responses that the revision changed",
        "synthetic/judged": "pairs of the step that the model compared",
        "synthetic/certainty": "mean log-odds with which it preferred one of two",
        "synthetic/skipped": "prompts that could not be used",
    },
)
