"""What Midwatch needs to know of `rejection_sampling` without torch."""

from __future__ import annotations

from midwatch.objectives.spec import SAMPLING, SCORING, ObjectiveSpec

SPEC = ObjectiveSpec(
    name="rejection_sampling",
    summary="Makes data: of several responses to a prompt the best one, and pairs of the best and the worst.",
    implementation="trainer.synthetic.methods:rejection",
    sources=("sft", "preference"),
    sample="prompt",
    rollout=(*SAMPLING, *SCORING),
    fewest_generations=2,
    makes={"best": "sft", "pairs": "preference"},
    reward_model=True,
    metrics={
        "synthetic/gain": "score of the best response less the mean of its prompt's",
        "synthetic/best": "best responses of the step",
        "synthetic/pairs": "pairs of the step",
        "synthetic/skipped": "prompts that could not be used",
        "policy/reward": "mean score",
    },
)
