"""What Midwatch needs to know of `ppo` without torch."""

from __future__ import annotations

from midwatch.objectives.spec import LEARNING, ObjectiveSpec
from trainer.objectives.metrics import POLICY, ROLLOUT_CHARTS, VALUE

SPEC = ObjectiveSpec(
    name="ppo",
    summary="Learns from scores of the model's own responses, with a value model that says what to expect of each token.",
    implementation="trainer.objectives.ppo.loss:objective",
    sources=("sft", "preference"),
    sample="prompt",
    rollout=(*LEARNING, "kl_target", "kl_horizon", "value_clip", "value_lr", "gamma", "gae_lambda", "whiten"),
    reference=True,
    reward_model=True,
    critic=True,
    metrics=POLICY | VALUE,
    charts=ROLLOUT_CHARTS,
)
