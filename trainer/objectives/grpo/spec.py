"""What Midwatch needs to know of `grpo` without torch."""

from __future__ import annotations

from midwatch.objectives.spec import LEARNING, ObjectiveSpec
from trainer.objectives.metrics import POLICY, ROLLOUT_CHARTS

SPEC = ObjectiveSpec(
    name="grpo",
    summary="Learns from scores of the model's own responses, each compared with others to the same prompt.",
    implementation="trainer.objectives.grpo.loss:objective",
    sources=("sft", "preference"),
    sample="prompt",
    rollout=(*LEARNING, "advantage", "normalisation"),
    fewest_generations=2,
    reference=True,
    reward_model=True,
    metrics=POLICY
    | {"policy/kl": "KL of the policy from the reference, in nats a token (k3)"}
    | {"policy/groups_skipped": "prompts of which fewer than two responses have a score"},
    charts=ROLLOUT_CHARTS,
)
