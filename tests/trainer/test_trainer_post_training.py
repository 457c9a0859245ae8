"""Losses and advantages of post-training: equal to TRL, verl and OpenRLHF, wherever the padding stands.

The numbers in `frozen/` were made by `frozen/make.py` from those packages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from trainer_harness import Step, Told, fresh, same_bits, state, steer, write_recipe

from midwatch.protocol import Op
from midwatch.recipe import Recipe
from shards.sampling.batches import Batch
from trainer.batches import DeviceRows
from trainer.objectives import advantages
from trainer.objectives.advantages import adaptive, gae, kl, moments, token_rewards, whiten
from trainer.objectives.dpo import loss as dpo
from trainer.objectives.grpo import loss as grpo
from trainer.objectives.ppo import loss as ppo
from trainer.objectives.ppo.loss import RolloutData
from trainer.objectives.reward import loss as reward

NEAR = 1e-6
LENGTHS = (4, 2, 0, 3)


def frozen(package: str, function: str) -> list[Any]:
    """(inputs, outputs) of each call that was noted; lists of numbers as float64 tensors."""
    known = json.loads((Path(__file__).parent / "frozen" / f"{package}.json").read_text())

    def read(values: dict[str, Any]) -> dict[str, Any]:
        return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in values.items()}

    found = [(read(case["inputs"]), read(case["outputs"])) for case in known["cases"] if case["function"] == function]
    assert found, f"{package} {known['version']}: {function} was not noted"
    return [pytest.param(*case, id=f"{package}-{function}-{at}") for at, case in enumerate(found)]


def against(*names: str) -> Any:
    """names: package.function."""
    cases = [case for name in names for case in frozen(*name.split(".", 1))]
    return pytest.mark.parametrize(("given", "said"), cases)


def near(found: Tensor, said: Tensor | float) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(said, dtype=found.dtype), rtol=NEAR, atol=NEAR)


def rows_of(mask: Tensor) -> DeviceRows:
    nothing = torch.zeros_like(mask, dtype=torch.int64)
    return DeviceRows(nothing, nothing, mask, nothing, nothing)


def mean(found: tuple[Tensor, Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss, weight, metrics = found
    return loss / weight, {name: value / weight for name, value in metrics.items()}


def gradient(loss: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(loss, by)[0]


@against("verl.compute_gae_advantage_return")
def test_gae_carries_values_over_padding_and_holes_as_verl_does(given: dict[str, Any], said: dict[str, Any]) -> None:
    found, returns = gae(*(given[name] for name in ("rewards", "values", "mask", "gamma", "lam")))
    near(returns, said["returns"] * given["mask"])
    near(whiten(found, given["mask"]), said["whitened"] * given["mask"])


@against("openrlhf.get_advantages_and_returns")
def test_gae_is_openrlhfs_where_there_are_no_holes(given: dict[str, Any], said: dict[str, Any]) -> None:
    found, returns = gae(*(given[name] for name in ("rewards", "values", "mask", "gamma", "lam")))
    near(returns, said["returns"] * given["mask"])
    near(found, said["advantages"] * given["mask"])


@against("verl.masked_whiten")
def test_whitening_takes_the_samples_variance_over_real_tokens(given: dict[str, Any], said: dict[str, Any]) -> None:
    near(whiten(given["x"], given["mask"]), said["whitened"] * given["mask"])


@against("openrlhf.compute_reward")
def test_the_score_is_paid_at_the_last_token_and_the_kl_at_each(given: dict[str, Any], said: dict[str, Any]) -> None:
    found = token_rewards(given["scores"], given["kl"], given["mask"], given["beta"])
    near(found, said["rewards"] * given["mask"])


@against("verl.kl_penalty", "openrlhf.compute_approx_kl")
def test_kl_estimators(given: dict[str, Any], said: dict[str, Any]) -> None:
    policy = given["policy"].requires_grad_()
    found = kl(policy, given["reference"], given["estimator"])
    near(found, said["kl"])
    if "gradient_policy" in said:
        near(gradient(found.sum(), policy), said["gradient_policy"])


@against("verl.AdaptiveKLController", "openrlhf.AdaptiveKLController")
def test_the_kl_coefficient_follows_its_target(given: dict[str, Any], said: dict[str, Any]) -> None:
    beta, found = given["beta"], []
    for measured in given["kl"].tolist():
        beta = adaptive(beta, measured, given["target"], given["horizon"], given["count"])
        found.append(beta)
    near(torch.tensor(found, dtype=torch.float64), said["beta"])


@against("verl.compute_policy_loss", "openrlhf.PolicyLoss")
def test_the_clipped_policy_loss_by_tokens_and_by_responses(given: dict[str, Any], said: dict[str, Any]) -> None:
    policy = given["log_probs"].requires_grad_()
    extra = RolloutData(given["old"], given["advantages"])
    by_token = given["mode"] == "token-mean"
    found, _ = mean(
        grpo.loss(policy, rows_of(given["mask"]), {"ratio_clip": given["clip"]}, extra, "token" if by_token else "sequence")
    )
    near(found, said["loss"])
    near(gradient(found, policy), said["gradient_log_probs"])
    policies, metrics = mean(ppo.loss(policy, rows_of(given["mask"]), {"ratio_clip": given["clip"]}, extra))
    near(metrics["policy/clip_fraction"], said["clip_fraction"])
    if by_token:
        near(policies, said["loss"])


@against("verl.compute_value_loss", "openrlhf.ValueLoss")
def test_the_clipped_value_loss(given: dict[str, Any], said: dict[str, Any]) -> None:
    values = given["values"].requires_grad_()
    extra = RolloutData(given["old"], given["old"], given["returns"], given["old"])
    found, metrics = mean(ppo.critic_loss(values, rows_of(given["mask"]), {"value_clip": given["clip"]}, extra))
    near(found, said["loss"])
    near(metrics["value/loss"], said["loss"])
    near(gradient(found, values), said["gradient_values"])
    if "clip_fraction" in said:
        near(metrics["value/clip_fraction"], said["clip_fraction"])


@against("trl.GRPOTrainer._compute_loss")
def test_grpos_loss_with_its_kl(given: dict[str, Any], said: dict[str, Any]) -> None:
    policy = given["log_probs"].requires_grad_()
    sharding = given["advantages"][:, None] * given["mask"]
    extra = RolloutData(given["old"], sharding, reference=given["reference"])
    settings = {"ratio_clip": given["clip"], "kl_coef": given["beta"]}
    found, _ = mean(grpo.loss(policy, rows_of(given["mask"]), settings, extra, given["normalisation"]))
    near(found, said["loss"])
    near(gradient(found, policy), said["gradient_log_probs"])
    _, metrics = mean(grpo.loss(policy, rows_of(given["mask"]), settings, extra))
    # TRL notes it in float32.
    near(metrics["policy/kl"], said["kl"])


@against("verl.compute_grpo_outcome_advantage")
def test_grpos_advantages_are_of_the_groups_sample_deviation(given: dict[str, Any], said: dict[str, Any]) -> None:
    near(grpo.advantages(given["scores"], given["group"]), said["advantages"])


@against("verl.compute_rloo_outcome_advantage")
def test_leave_one_out_takes_off_the_mean_of_the_others(given: dict[str, Any], said: dict[str, Any]) -> None:
    near(grpo.advantages(given["scores"], given["group"], leave_one_out=True), said["advantages"])


@against("openrlhf.PairWiseLoss", "trl.RewardTrainer.compute_loss")
def test_the_reward_models_loss(given: dict[str, Any], said: dict[str, Any]) -> None:
    scores = given["scores"].requires_grad_()
    values, metrics = reward.preferences(scores, given["margin"], given.get("centre", 0.0))
    near(values.mean(), said["loss"])
    near(gradient(values.mean(), scores), said["gradient_scores"])
    if "margin" in said:
        near(metrics["preference/margin"].mean(), said["margin"])
        near(metrics["preference/accuracy"].mean(), said["accuracy"])


@against("openrlhf.DPOLoss")
def test_dpo_and_ipo_on_summed_log_probabilities(given: dict[str, Any], said: dict[str, Any]) -> None:
    policy = given["policy"].requires_grad_()
    values, metrics = dpo.preferences(policy, given["reference"], given["beta"], given["label_smoothing"], given["kind"])
    near(values.mean(), said["loss"])
    near(gradient(values.mean(), policy), said["gradient_policy"])
    near(metrics["preference/chosen_reward"].mean(), said["chosen_reward"])
    near(metrics["preference/rejected_reward"].mean(), said["rejected_reward"])


@against("trl.DPOTrainer._compute_loss")
def test_dpo_and_ipo_from_tokens_by_sums_and_by_means(given: dict[str, Any], said: dict[str, Any]) -> None:
    policy, rows = given["policy"].requires_grad_(), rows_of(given["mask"])
    settings = {"beta": given["beta"], "label_smoothing": 0.0}
    found, metrics = mean(dpo.loss(policy, rows, settings, given["reference"], given["kind"], given["normalised"]))
    near(found, said["loss"])
    near(gradient(found, policy), said["gradient_policy"])
    if not given["normalised"]:
        near(metrics["preference/margin"], said["margin"])
        near(metrics["preference/accuracy"], said["accuracy"])


def laid(values: list[Tensor], layout: str, time: int = 9, fill: float = math.nan) -> tuple[Tensor, Tensor]:
    """Ragged responses as rows of one of four layouts, with `fill` around them, and their mask."""
    x, mask = torch.full((len(values), time), fill, dtype=torch.float64), torch.zeros(len(values), time, dtype=torch.float64)
    for row, value in enumerate(values):
        count = len(value)
        places = {
            "right": range(count),
            "left": range(time - count, time),
            "both": range(2, 2 + count),
            "holes": [0, 3, 4, 8][:count],
        }[layout]
        x[row, list(places)], mask[row, list(places)] = value.double(), 1
    return x, mask


def ragged(seed: int, scale: float = 1.0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=source, dtype=torch.float64) * scale for length in LENGTHS]


def taken(x: Tensor, mask: Tensor) -> Tensor:
    """What the mask holds, end to end; and all else must be 0."""
    assert not x[mask == 0].any(), "something stands at a masked token"
    return x[mask > 0]


def everything(layout: str) -> dict[str, Tensor]:
    """Every function of tokens on the same responses, laid out so, with NaN at all tokens that do not count."""
    (new, mask), (old, _), (rewards, _), (values, _) = (laid(ragged(seed, 0.5), layout) for seed in range(4))
    scores = torch.tensor([1.0, -0.5, 100.0, 2.0], dtype=torch.float64)
    settings = {"ratio_clip": 0.2, "value_clip": 0.3, "beta": 0.1, "kl_coef": 0.1, "label_smoothing": 0.0}
    found, returns = gae(rewards, values, mask, 0.9, 0.8)
    extra = RolloutData(old, found, returns, rewards, values)
    plain = ppo.policy_loss(new, old, rewards, mask, 0.2)[0]
    result = {"gae": found, "returns": returns, "whitened": whiten(rewards, mask), "policy": plain}
    result["value"] = ppo.value_loss(values, old, returns, mask, 0.3)[0]
    result["rewards"] = token_rewards(scores, kl(new, old, "k1"), mask, 0.1)
    result = {name: taken(value, mask) for name, value in result.items()}
    for normalisation in ("token", "sequence"):
        policy = new.clone().requires_grad_()
        loss, weight, metrics = grpo.loss(policy, rows_of(mask), settings, extra, normalisation)  # type: ignore[arg-type]
        result |= {f"{normalisation} {name}": value for name, value in metrics.items()}
        result |= {f"{normalisation} loss": loss, f"{normalisation} weight": weight}
        result[f"{normalisation} gradient"] = taken(gradient(loss, policy), mask)
    critic = values.clone().requires_grad_()
    loss, weight, metrics = ppo.critic_loss(critic, rows_of(mask), settings, extra)
    result |= {"critic": loss, "critic weight": weight, "critic gradient": taken(gradient(loss, critic), mask), **metrics}
    return result


@pytest.mark.parametrize("layout", ["left", "both", "holes"])
def test_nothing_depends_on_where_the_padding_stands_or_what_stands_in_it(layout: str) -> None:
    expected, found = everything("right"), everything(layout)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        assert value.isfinite().all(), name


def test_empty_responses_weigh_nothing() -> None:
    mask = torch.zeros(2, 5)
    policy = torch.randn(2, 5).requires_grad_()
    extra = RolloutData(*(torch.randn(2, 5) for _ in range(5)))
    settings = {
        "ratio_clip": 0.2,
        "value_clip": 0.2,
        "beta": 0.1,
        "kl_coef": 0.1,
        "label_smoothing": 0.0,
        "margin": 1.0,
        "center_rewards": 1.0,
    }
    losses = [
        ppo.loss(policy, rows_of(mask), settings, extra),
        ppo.critic_loss(policy, rows_of(mask), settings, extra),
        grpo.loss(policy, rows_of(mask), settings, extra),
        grpo.loss(policy, rows_of(mask), settings, extra, "sequence"),
        dpo.loss(policy, rows_of(mask), settings, extra.old),
        dpo.loss(policy, rows_of(mask), settings, extra.old, "ipo", length_normalised=True),
        reward.loss(policy, rows_of(mask), settings),
    ]
    for loss, weight, metrics in losses:
        assert float(loss.detach()) == float(weight) == 0 and not any(map(float, metrics.values()))
        assert not gradient(loss, policy).any()
    found = (*gae(policy, policy, mask, 1.0, 0.95), whiten(policy, mask), token_rewards(policy[:, 0], policy, mask, 0.1))
    assert not any(x.any() for x in found)


def test_weights_are_as_they_are_summed() -> None:
    _, mask = laid(ragged(0), "both")
    extra, policy, settings = RolloutData(mask, mask), mask.clone(), {"ratio_clip": 0.2}
    assert ppo.loss(policy, rows_of(mask), settings, extra)[1] == ppo.weight(mask.numpy()) == 9
    for normalisation, weight in (("token", 9), ("sequence", 3)):
        found = grpo.loss(policy, rows_of(mask), settings, extra, normalisation)[1]  # type: ignore[arg-type]
        assert float(found) == pytest.approx(weight) == grpo.weight(mask.numpy(), normalisation)  # type: ignore[arg-type]


LOSSES: dict[str, Callable[[Tensor, list[Tensor], Tensor], Tensor]] = {
    "policy": lambda x, by, mask: ppo.policy_loss(x, by[0], by[1], mask, 0.2)[0],
    "value": lambda x, by, mask: ppo.value_loss(x, by[0], by[1], mask, 0.2)[0],
    "grpo": lambda x, by, mask: grpo.loss(
        x, rows_of(mask), {"ratio_clip": 0.2, "kl_coef": 0.3}, RolloutData(by[0], by[1], reference=by[2])
    )[0],
    "kl": lambda x, by, mask: kl(x, by[0], "k3"),
    "reward": lambda x, by, mask: reward.preferences(x.flatten(), 0.3, 0.1)[0],
    "dpo": lambda x, by, mask: dpo.loss(x, rows_of(mask), {"beta": 0.4, "label_smoothing": 0.1}, by[0])[0],
    "ipo": lambda x, by, mask: dpo.loss(x, rows_of(mask), {"beta": 0.4}, by[0], "ipo", True)[0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    (x, mask), *others = (laid(ragged(seed, 0.5), "holes", fill=0.1) for seed in range(4))
    by = [each for each, _ in others]
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, by, mask), x.requires_grad_())


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_an_estimators_mean_over_what_the_policy_draws_is_the_kl(kind: Any) -> None:
    policy, reference = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    near((policy.exp() * kl(policy, reference, kind)).sum(), exact)
    assert kind == "k1" or (kl(policy, reference, kind) >= 0).all()


def test_the_approximate_kl_of_a_policy_is_from_the_one_that_drew_the_tokens() -> None:
    old, new = torch.randn(2, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    _, metrics = ppo.policy_loss(new, old, torch.ones_like(old), torch.ones_like(old), 0.2)
    near((old.exp() * metrics["policy/approx_kl"]).sum(), (old.exp() * (old - new)).sum())


def test_ratios_are_told_of() -> None:
    old, mask = torch.zeros(1, 5), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    new = torch.tensor([[1.0, 0.4, 2.1, 1.5, 9.0]]).log()
    _, metrics = mean(ppo.loss(new, rows_of(mask), {"ratio_clip": 0.2}, RolloutData(old, torch.ones(1, 5))))
    assert float(metrics["policy/ratio"]) == pytest.approx(5 / 4)
    assert float(metrics["policy/ratio_outlier_fraction"]) == 0.5
    # An advantage above 0 is clipped where the ratio is above 1.2.
    assert float(metrics["policy/clip_fraction"]) == 0.5


def test_a_runaway_ratio_stays_finite() -> None:
    policy = torch.tensor([[200.0, 200.0, -200.0]], requires_grad=True)
    ones = torch.ones(1, 3)
    values, metrics = ppo.policy_loss(policy, torch.zeros(1, 3), torch.tensor([[-1.0, 0.0, 1.0]]), ones, 0.2)
    assert values.isfinite().all() and all(value.isfinite().all() for value in metrics.values())
    assert gradient(values.sum(), policy).isfinite().all()


def test_explained_variance_is_of_returns_by_values() -> None:
    (values, mask), (returns, _) = laid(ragged(1), "both"), laid(ragged(2), "both")
    for critic, exact in ((returns, 1.0), (returns * 0 + 3, 0.0), (values, None)):
        _, metrics = mean(ppo.critic_loss(critic, rows_of(mask), {"value_clip": 9.0}, RolloutData(critic, critic, returns, critic)))
        found = ppo.explained_variance({name: float(value) for name, value in metrics.items()})
        error = (returns - critic)[mask > 0]
        expected = 1 - error.var() / returns[mask > 0].var()
        assert found == pytest.approx(float(expected) if exact is None else exact)
    assert math.isnan(ppo.explained_variance(dict.fromkeys(ppo.CRITIC_METRICS, 0.0)))


def test_parts_of_a_batch_are_whitened_as_the_whole() -> None:
    x, mask = laid(ragged(5, 3.0), "holes")
    sums = moments(x[:1], mask[:1]) + moments(x[1:], mask[1:])
    parts = torch.cat([whiten(x[:1], mask[:1], sums), whiten(x[1:], mask[1:], sums)])
    whole = whiten(x, mask)
    torch.testing.assert_close(parts, whole)
    assert float(whole[mask > 0].mean()) == pytest.approx(0, abs=1e-9)
    assert float(whole[mask > 0].var()) == pytest.approx(1)


def test_one_token_alone_is_whitened_to_nothing() -> None:
    assert not whiten(torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.0]])).any()


def test_at_lambda_1_and_gamma_1_returns_are_what_is_still_to_come() -> None:
    (rewards, mask), (values, _) = laid(ragged(1), "holes"), laid(ragged(2), "holes")
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = [each.flip(0).cumsum(0).flip(0) for each in ragged(1)]
    near(taken(returns, mask), torch.cat(to_come))


def test_equal_scores_of_a_group_are_no_advantage() -> None:
    # In float32 the mean of eight 0.7 is not 0.7, and what is between them is 0.06 of the deviation.
    scores = torch.tensor([0.1] * 8 + [0.7] * 8)
    assert grpo.advantages(scores, 8).abs().max() < 1e-6
    assert grpo.advantages(scores, 8, leave_one_out=True).abs().max() < 1e-6
    with pytest.raises(ValueError, match="use at least 2"):
        grpo.advantages(scores, 1)


def test_groups_do_not_see_each_other() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 60.0])
    for leave_one_out in (False, True):
        both = grpo.advantages(scores, 3, leave_one_out)
        torch.testing.assert_close(both[:3], grpo.advantages(scores[:3], 3, leave_one_out))
    near(grpo.advantages(scores[:3], 3, leave_one_out=True), torch.tensor([1 - 2.5, 0.0, 3 - 1.5]))


def test_equal_answers_lose_the_logarithm_of_two_and_have_no_margin() -> None:
    scores = torch.tensor([1.5, -2.0, 1.5, -2.0])
    for values, metrics in (reward.preferences(scores), dpo.preferences(scores, scores * 0, 0.3, 0.0)):
        near(values, torch.full((2,), math.log(2)))
        assert not metrics["preference/margin"].any() and not metrics["preference/accuracy"].any()


def test_ipo_is_satisfied_at_its_margin_and_not_beyond() -> None:
    beta = 0.25
    reference = torch.zeros(2)
    values = [float(dpo.preferences(torch.tensor([h, 0.0]), reference, beta, 0.0, "ipo")[0]) for h in (0.0, 2.0, 3.0)]
    assert values == [4.0, 0.0, 1.0]


def test_without_a_reference_the_policys_own_difference_is_what_counts() -> None:
    policy, mask = laid([torch.tensor([-1.0, -2.0]), torch.tensor([-1.0]), torch.tensor([-4.0]), torch.tensor([-0.5])], "right")
    rows, settings = rows_of(mask), {"beta": 0.5, "label_smoothing": 0.0}
    found = dpo.loss(policy, rows, settings, None, reference_free=True)
    # beta h = 0.5 (-3 + 4) and 0.5 (-1 + 0.5)
    assert float(found[0]) == pytest.approx(math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.25)))
    assert float(found[2]["preference/margin"]) == pytest.approx(0.5 - 0.25)
    given = dpo.loss(policy, rows, settings, policy, reference_free=True)
    assert float(given[0]) == float(found[0])


def test_stages_with_and_without_a_reference_follow_each_other(recipe: Recipe, tmp_path: Path) -> None:
    """What an earlier stage held against stays in memory; a stage without a reference does not look at it."""
    plain = msgspec.structs.replace(recipe.stage[3], steps=2)
    free = msgspec.structs.replace(plain, name="free").with_settings(reference_free=True)
    ipo = msgspec.structs.replace(free, name="ipo").with_settings(dpo_loss="ipo", beta=0.01, length_normalised=True)
    root = write_recipe(tmp_path / "run", msgspec.structs.replace(recipe, stage=(ipo, plain, free)))
    told = steer(root, size=1)
    losses = {step: loss for (_, step), loss in told.losses().items()}
    assert losses[1] == pytest.approx((0 - 1 / 0.02) ** 2, rel=0.1), "mean log-probabilities hardly differ"
    assert losses[3] == pytest.approx(math.log(2))
    assert losses[5] != pytest.approx(math.log(2), abs=1e-3)
    examined = {each["step"]: each["values"] for each in told.all("Metrics") if "eval/prefer/loss" in each["values"]}
    assert {step: "policy/kl" in values for step, values in examined.items()} == {step: step == 4 for step in (0, 2, 4, 6)}
    held = {name: state(root / "checkpoints" / name)["has_reference"] for name in ("2-1-ipo", "4-1-dpo", "6-1-free")}
    assert held == {"2-1-ipo": False, "4-1-dpo": True, "6-1-free": True}


def test_a_reward_is_read_where_the_end_of_the_response_has_been_seen() -> None:
    eos, pad = 3, 3
    sequences = ([1, 7, 8, 9, eos], [1, 7, eos])
    batch = Batch.empty(4, 8, pad, [])
    for row, ids in enumerate(sequences):
        # The input EOS needs a target; it does not count.
        batch.put(row, 0, torch.tensor([*ids, pad]).numpy(), torch.tensor([0, *[1] * (len(ids) - 2), 0]).numpy(), 0)
    batch.put(2, 2, torch.tensor([1, 5, eos, pad]).numpy(), torch.tensor([0, 1, 0]).numpy(), 0)
    rows = DeviceRows(*(torch.from_numpy(x) for x in (batch.tokens, batch.targets, batch.mask, batch.segments, batch.positions)))
    places = reward.score_places(rows)
    assert places.tolist() == [4, 2, 4, 0]
    assert rows.mask.sum(-1).tolist() == [3, 1, 1, 0], "the response and its EOS are targets once each"
    values = torch.arange(32.0).reshape(4, 8).requires_grad_()
    pair = DeviceRows(*(part[:2] for part in rows[:5]))
    found, _, metrics = reward.loss(values[:2], pair, {"margin": 0.0, "center_rewards": 0.0})
    assert float(metrics["preference/chosen_reward"]) == 4 and float(metrics["preference/rejected_reward"]) == 10
    assert gradient(found, values).nonzero().tolist() == [[0, 4], [1, 2]]


def test_calibration_is_the_distance_of_said_from_seen() -> None:
    sure = torch.tensor([50.0, 50.0, 50.0, -50.0])
    assert float(reward.calibration(sure)) == pytest.approx(0.25)
    right = math.log(3) * torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert float(reward.calibration(right)) == pytest.approx(0, abs=1e-7), "three quarters said, three quarters seen"
    assert float(reward.calibration(-right)) == pytest.approx(0.5)
    assert float(reward.calibration(torch.zeros(3))) == 0


def test_calibration_of_parts_adds_up_and_that_of_a_true_model_vanishes() -> None:
    source = torch.Generator().manual_seed(7)
    margins = torch.randn(20_000, generator=source, dtype=torch.float64) * 2
    happened = torch.rand(20_000, generator=source, dtype=torch.float64) < margins.sigmoid()
    seen = torch.where(happened, margins, -margins)
    assert float(reward.calibration(seen)) < 0.01
    assert float(reward.calibration(3 * seen)) > 0.1, "a model that exaggerates"
    parts = reward.gaps(seen[:300]) + reward.gaps(seen[300:])
    torch.testing.assert_close(parts, reward.gaps(seen))


def test_the_kl_coefficient_changes_by_a_fifth_over_the_horizon_at_most() -> None:
    assert adaptive(1.0, 1e9, 6.0, 100, 100) == pytest.approx(1.2)
    assert adaptive(1.0, 0.0, 6.0, 100, 100) == pytest.approx(0.8)
    assert advantages.adaptive(1.0, 6.0, 6.0, 100, 100) == 1.0


def test_a_cached_reference_changes_nothing_and_leaves_memory(recipe: Recipe, tmp_path: Path) -> None:
    """Two epochs over few pairs, on one rank and on two, stopped in between: the same steps as with the reference at hand."""
    base, dpo_stage = recipe.stage[0], recipe.stage[3]
    short = replace(base, steps=2, eval_every=100, eval_samples=1, prompts=())
    told = {}
    for name, cached, size in (("live", False, 1), ("cached", True, 1), ("two", True, 2)):
        stage = replace(dpo_stage, steps=6, eval_every=3).with_settings(reference_cached=cached)
        root = write_recipe(tmp_path / name, replace(recipe, stage=(short, stage)))
        told[name] = steer(root, size=size)
    stage = replace(dpo_stage, steps=6, eval_every=3).with_settings(reference_cached=True)
    root = write_recipe(tmp_path / "stopped", replace(recipe, stage=(short, stage)))
    stopped = steer(root, Step(Op.STOP, after=4), size=1)
    files = {file: file.read_bytes() for file in (root / "made" / "reference").rglob("*.zst")}
    assert {file.name for file in files} == {"prefer-train.zst", "prefer-held_out.zst"}
    steer(root, start=fresh(checkpoint=stopped.all("Ended")[0]["checkpoint"], generation=2), size=1)
    assert {file: file.read_bytes() for file in (root / "made" / "reference").rglob("*.zst")} == files
    assert same_bits(root / "checkpoints" / "8-1-dpo", tmp_path / "cached" / "checkpoints" / "8-1-dpo")
    for name in ("cached", "two"):
        for key in ("train/loss", "preference/margin", "eval/prefer/loss", "eval/prefer/margin"):
            assert series(told[name], key) == pytest.approx(series(told["live"], key), abs=2e-6), (name, key)
    assert "policy/kl" in keys(told["live"])
    assert "policy/kl" not in keys(told["cached"])


def series(told: Told, name: str) -> list[float]:
    return [body["values"][name] for body in told.all("Metrics") if name in body["values"]]


def keys(told: Told) -> set[str]:
    return {key for body in told.all("Metrics") for key in body["values"]}
