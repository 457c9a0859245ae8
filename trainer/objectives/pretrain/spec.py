"""What Midwatch needs to know of `pretrain` without torch."""

from __future__ import annotations

from midwatch.objectives.spec import ObjectiveSpec

SPEC = ObjectiveSpec(
    name="pretrain",
    summary="Predicts every next token of a text.",
    implementation="trainer.objectives.pretrain.loss:objective",
    sources=("text",),
    sample="text",
    evaluates="text",
)
