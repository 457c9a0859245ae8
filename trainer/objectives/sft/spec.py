"""What Midwatch needs to know of `sft` without torch."""

from __future__ import annotations

from midwatch.objectives.spec import ObjectiveSpec

SPEC = ObjectiveSpec(
    name="sft",
    summary="Predicts every next token of an assistant's answers.",
    implementation="trainer.objectives.sft.loss:objective",
    sources=("sft",),
    sample="sft",
    evaluates="sft",
)
