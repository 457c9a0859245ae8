"""Metrics and charts that several objectives have. No torch here: specs read it."""

from __future__ import annotations

from midwatch.objectives.spec import GRADIENT_NORM, LOSS, Chart

PREFERENCE = {
    "preference/accuracy": "share of pairs whose chosen response has the higher reward",
    "preference/margin": "reward of the chosen response less that of the rejected one",
    "preference/chosen_reward": "reward of the chosen response",
    "preference/rejected_reward": "reward of the rejected response",
}
"""Of objectives that learn from pairs."""
POLICY = {
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "policy/ratio": "probability of a token under the policy over that under the policy that wrote it",
    "policy/ratio_outlier_fraction": "share of tokens whose ratio lies outside 0.5 to 2",
    "policy/approx_kl": "KL of the policy that wrote the tokens from the one that learns, in nats a token (k3)",
}
"""Of objectives that take a clipped ratio."""
VALUE = {
    "value/loss": "loss of the value model",
    "value/clip_fraction": "share of tokens whose value was clipped",
    "value/return": "mean return",
    "value/explained_variance": "share of the returns' variance that the values explain",
}
KL_CHART = (Chart("policy/kl", "KL per token"), Chart("policy/kl_sequence", "KL per response"))
REWARD_CHART = Chart("policy/reward", "reward")
PREFERENCE_CHART = (Chart("preference/margin", "margin"), Chart("preference/accuracy", "accuracy"))
ROLLOUT_CHARTS = (
    (Chart("policy/reward", "reward", held_out="reward"),),
    (Chart("policy/kl_sequence", "KL per response", held_out="kl_sequence", setting="kl_coef"),),
    (Chart("policy/entropy", "entropy"),),
    (Chart(LOSS, "loss"),),
    (Chart("policy/response_length", "response length"),),
    (Chart("value/explained_variance", "variance explained by the value model"),),
    (Chart(GRADIENT_NORM, "gradient norm"),),
    (Chart("policy/truncated_fraction", "responses cut off"),),
)
"""Reward and KL, each with what held-out prompts give, before the loss, which says little here."""
