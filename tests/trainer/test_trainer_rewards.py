"""Learning from rewards where something is missing or out of range: masked places, scores, responses, large distances."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_policy import Build, build, logs, ppo, series, start_ranks, stopping_when_paused
from torch import Tensor
from trainer_harness import Told, fresh, steer, tensors

from midwatch.protocol import Metrics
from midwatch.recipe import Recipe, RecipeError, Stage, dump_recipe, load_recipe, parse_recipe
from midwatch.recipe.live_settings import stage_settings
from shards.sampling.batches import Batch
from shards.tokenization.templates import named
from shards.tokenization.tokenizer import Tokenizer, train
from trainer.batches import DeviceRows
from trainer.loop import packing_metrics
from trainer.loop.train_batch import _counted
from trainer.model.decoder import Decoder
from trainer.objectives import CRITIC, OBJECTIVES, dpo, grpo, objective_of, reward
from trainer.objectives.advantages import kl
from trainer.objectives.loss import Loss
from trainer.objectives.ppo import RolloutData, value_loss
from trainer.rollout.rollout import _as_ended, distances
from trainer.rollout.sampling import SampledResponses

__all__ = ["build"]

SETTINGS = {
    "ratio_clip": 0.2,
    "value_clip": 0.3,
    "kl_coef": 0.1,
    "beta": 0.3,
    "label_smoothing": 0.1,
    "margin": 0.2,
    "center_rewards": 0.05,
}
ROWS, TIME = 6, 7
Objective = Callable[[Tensor, DeviceRows, Any], Loss]


def of_policy(name: str) -> Objective:
    return lambda x, rows, others: OBJECTIVES[name].loss(x, rows, SETTINGS, RolloutData(*others))


OBJECTIVE: dict[str, Objective] = {
    "pretrain": lambda x, rows, others: OBJECTIVES["pretrain"].loss(x, rows, SETTINGS, None),
    "sft": lambda x, rows, others: OBJECTIVES["sft"].loss(x, rows, SETTINGS, None),
    "dpo": lambda x, rows, others: dpo.loss(x, rows, SETTINGS, others[0]),
    "ipo": lambda x, rows, others: dpo.loss(x, rows, SETTINGS, others[0], "ipo", length_normalised=True),
    "reward": lambda x, rows, others: reward.loss(x, rows, SETTINGS),
    "ppo": of_policy("ppo"),
    "critic": lambda x, rows, others: CRITIC.loss(x, rows, SETTINGS, RolloutData(*others)),
    "grpo": of_policy("grpo"),
    "grpo by sequence": lambda x, rows, others: grpo.loss(x, rows, SETTINGS, RolloutData(*others), "sequence"),
}
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38])


def rows_of(mask: Tensor) -> DeviceRows:
    nothing = torch.zeros_like(mask, dtype=torch.int64)
    return DeviceRows(nothing, nothing, mask, nothing, nothing)


@pytest.mark.parametrize("name", OBJECTIVE)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), garbage=st.lists(GARBAGE, min_size=7, max_size=7))
def test_garbage_at_masked_places_changes_neither_loss_nor_gradient(name: str, seed: int, garbage: list[float]) -> None:
    """Rows with tokens missing anywhere, empty rows among them. What a masked place holds is in the log-probabilities and in all
    that they are compared with."""
    source = torch.Generator().manual_seed(seed)
    mask = (torch.rand(ROWS, TIME, generator=source) < 0.6).float() * (torch.rand(ROWS, 1, generator=source) < 0.8)
    clean = [torch.randn(ROWS, TIME, generator=source) for _ in range(6)]
    counts = mask
    if name == "reward":  # which reads one place a row, of pairs that are there
        there = dpo.complete(mask).float().repeat(2)
        counts = torch.zeros(ROWS, TIME).scatter(1, reward.score_places(rows_of(mask))[:, None], there[:, None])
    dirty = [torch.where(counts > 0, x, value) for x, value in zip(clean, garbage, strict=False)]
    found = []
    for first, *others in (clean, dirty):
        policy = first.clone().requires_grad_()
        loss, weight, metrics = OBJECTIVE[name](policy, rows_of(mask), others)
        (slope,) = torch.autograd.grad(loss, policy)
        found.append((loss.detach(), weight, slope, *metrics.values()))
        assert slope.isfinite().all() and not slope[counts == 0].any()
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)


def test_garbage_at_masked_places_is_in_no_metric_of_packing_nor_in_a_distance() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    dirty = torch.tensor([[-1.0, math.nan, -2.0], [math.inf, -math.inf, math.nan]])
    found = packing_metrics.sums(dirty, rows_of(mask))
    assert found.isfinite().all() and float(found[2]) == 3.0
    metrics = distances(dirty, torch.where(mask > 0, dirty - 0.5, dirty), dirty, mask)
    assert metrics["policy/kl_sequence"] == 1.0
    assert metrics["policy/kl"] == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert metrics["policy/entropy"] == -1.5


def test_k3_is_exact_where_it_is_used_finite_everywhere_and_never_negative() -> None:
    """Against float64. Below -20, which no token that the policy drew comes to, it stays where it is at -20."""
    d = torch.cat([torch.linspace(-1000, 1000, 4001), torch.logspace(-12, 2, 400), -torch.logspace(-12, 1, 400)])
    policy = d.clone().requires_grad_()
    found = kl(policy, torch.zeros_like(d), "k3")
    assert found.isfinite().all() and (found >= 0).all()
    exact = torch.expm1(-d.double().clamp(min=-20)) + d.double().clamp(min=-20)
    # What is left of a small difference is what float32 rounds of the two terms.
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)
    (slope,) = torch.autograd.grad(found.sum(), policy)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope, torch.where(d < -20, 0.0, -torch.expm1(-d)), rtol=1e-5, atol=1e-6)


SCORES = st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12)


@settings(max_examples=50, deadline=None)
@given(scores=SCORES, scored=st.lists(st.booleans(), min_size=12, max_size=12), leave_one_out=st.booleans())
def test_a_group_is_what_has_scores(scores: list[float], scored: list[bool], leave_one_out: bool) -> None:
    """Each group's advantages are those of a group that never had the responses without a score."""
    there = torch.tensor(scored)
    given_scores = torch.where(there, torch.tensor(scores), math.nan)
    found = grpo.advantages(given_scores, 4, leave_one_out, there)
    learned = grpo.comparable(there, 4)
    for at in range(0, 12, 4):
        rest = [number for number in range(at, at + 4) if scored[number]]
        alone = len(rest) < 2
        expected = torch.zeros(len(rest)) if alone else grpo.advantages(given_scores[rest], len(rest), leave_one_out)
        torch.testing.assert_close(found[rest], expected)
        assert learned[rest].tolist() == [not alone] * len(rest)
        missing = [number for number in range(at, at + 4) if not scored[number]]
        assert not found[missing].any() and not learned[missing].any()


def test_a_missing_score_does_not_shrink_its_groups_deviation() -> None:
    """Three of four have scores: 1 / deviation is not raised by a fifth, nor leave-one-out's 3 / 2 lowered to 4 / 3."""
    scores, scored = torch.tensor([0.0, 1.0, 5.0, math.nan]), torch.tensor([True, True, True, False])
    assert grpo.advantages(scores, 4, False, scored).tolist() == pytest.approx(
        [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0.0], rel=1e-5
    )
    assert grpo.advantages(scores, 4, True, scored).tolist() == [-3.0, -1.5, 4.5, 0.0]


def test_pairs_of_which_a_response_is_empty_are_not_learned_from() -> None:
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    policy = torch.randn(6, 2).requires_grad_()
    for loss, weight, _ in (
        dpo.loss(policy, rows_of(mask), SETTINGS, policy.detach() - 1),
        reward.loss(policy, rows_of(mask), SETTINGS),
    ):
        assert float(weight) == dpo.weight(mask.numpy()) == 1
        (slope,) = torch.autograd.grad(loss, policy)
        assert not slope[[0, 1, 3, 4]].any() and slope[2].any() and slope[5].any()


def test_samples_without_anything_to_learn_are_counted() -> None:
    """Of two pairs one has an empty rejected response; of two rows alone one has no token that counts."""
    for objective, mask, weight, empty in (("dpo", [[1, 0], [1, 1], [1, 1], [0, 0]], 1, 1), ("sft", [[1, 1], [0, 0]], 2, 1)):
        made = Batch.empty(len(mask), 2, 0, [("a", 0, 0), ("a", 0, 1)])
        made.mask[:] = mask
        stage = Stage(name="s", objective=objective, steps=1, context=2, global_batch=2, mixture={"a": 1.0})  # type: ignore[arg-type]
        run = SimpleNamespace(stage=stage, objective=objective_of(stage), feed=SimpleNamespace(named={}))
        training: Any = SimpleNamespace(stage=run, network=SimpleNamespace(is_replica_leader=True))
        assert _counted(training, made) == (0, weight, int(made.mask.sum()), empty, 2)


def test_a_response_that_was_cut_off_is_scored_as_if_it_ended_there() -> None:
    """Behind it, or in the place of its last token where the row is full; what ended by itself, and what is empty, stays."""
    end, pad = 2, 0
    tokens = torch.tensor([[5, 6, 7, pad, pad], [5, 6, 7, 8, 9], [5, 6, end, pad, pad], [pad] * 5])
    segments = torch.tensor([[0, 0, 0, -1, -1], [0] * 5, [0, 0, 0, -1, -1], [-1] * 5])
    rows = rows_of((segments == 0).float())._replace(tokens=tokens, segments=segments)
    prompts, responses = [[5], [5], [5], []], [[6, 7], [6, 7, 8, 9], [6, end], []]
    drawn = SampledResponses(prompts, responses, [False, False, True, False], rows, torch.zeros(4, 5), 0)
    found = _as_ended(drawn, end)
    assert found.tokens.tolist() == [[5, 6, 7, end, pad], [5, 6, 7, 8, end], [5, 6, end, pad, pad], [pad] * 5]
    assert found.tokens.gather(1, reward.score_places(found)[:, None])[:3, 0].tolist() == [end] * 3
    assert drawn.rows.tokens is tokens and tokens[0, 3] == pad


@pytest.mark.parametrize(
    ("template", "said"), [("midwatch", "[EOS]"), ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("zephyr", "[EOS]")]
)
def test_a_turn_ends_with_what_the_template_teaches(template: str, said: str) -> None:
    model = train(["to be or not to be, that is the question " * 20], vocab=300, kind="bpe", template=named(template))
    tokenizer = Tokenizer(model, template=named(template))
    assert tokenizer.decode([tokenizer.turn_end], reserved=True).strip() == said


def test_held_out_kl_is_that_of_the_distributions_that_the_responses_were_drawn_from(build: Build) -> None:
    """A policy far from its reference, at temperature 0.3: equal to log-probabilities worked out from the checkpoints."""
    root = build(ppo(8, lr=2e-2, temperature=0.3, eval_samples=8))
    steer(root, size=1)
    ranks = start_ranks(root, 1, evaluated, "20-1-policy")
    assert ranks.wait() == [0], logs(root)
    known = json.loads((root / "evaluated.json").read_text())
    recipe = load_recipe(root / "recipe.toml")
    far, near = (by_hand(recipe, root / "checkpoints" / id, known, 0.3) for id in ("20-1-policy", "12-1-pretrain"))
    apart = [float((one - other).sum()) for one, other in zip(far, near, strict=True)]
    exact = sum(apart) / len(apart)
    assert exact > 4
    assert known["values"]["eval/prefer/kl_sequence"] == pytest.approx(exact, rel=1e-4)
    d = torch.cat([one - other for one, other in zip(far, near, strict=True)])
    assert known["values"]["eval/prefer/kl"] == pytest.approx(float((torch.expm1(-d) + d).mean()), rel=1e-4)
    at_one = [by_hand(recipe, root / "checkpoints" / id, known, 1.0) for id in ("20-1-policy", "12-1-pretrain")]
    wrong = sum(float((one - other).sum()) for one, other in zip(*at_one, strict=True)) / len(apart)
    assert abs(wrong - exact) > 1, "at temperature 1 it is another number"


def by_hand(recipe: Recipe, checkpoint: Path, known: dict[str, Any], temperature: float) -> list[Tensor]:
    """Log-probabilities of each response's tokens."""
    held = {name.removeprefix("model."): torch.from_numpy(values) for name, values in tensors(checkpoint).items()}
    model = Decoder(recipe.model, len(held["embedding.weight"]))
    model.load_state_dict({name: held[name] for name, _ in model.named_parameters()})
    found = []
    for prompt, response in zip(known["prompts"], known["responses"], strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None], torch.zeros_like(ids[:, :-1]))
        every = (logits[0].double() / temperature).log_softmax(-1)
        found.append(every.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
    return found


def evaluated(root: Path, id: str) -> None:
    """Loads a checkpoint and evaluates it, noting what was drawn."""
    from trainer.control.reporting import NoLink
    from trainer.distributed.mesh import join, open_store, settle
    from trainer.loop import text_samples
    from trainer.loop.evaluate import evaluate
    from trainer.stage.training import Training

    class Noting(NoLink):
        def send(self, body: Any) -> None:
            if isinstance(body, Metrics):
                known["values"] = body.values

    def draw(*arguments: Any) -> Any:
        drawn = drawing(*arguments)
        known.update(prompts=drawn.prompts, responses=drawn.responses)
        return drawn

    known: dict[str, Any] = {}
    drawing, text_samples.sample_responses = text_samples.sample_responses, draw
    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "test", recipe.cluster, recipe.parallel)
    assert recipe.data.dir is not None
    training = Training(recipe, root, Path(recipe.data.dir), world, Noting(), fresh())
    training.load(id)
    evaluate(training)
    (root / "evaluated.json").write_text(json.dumps(known))
    training.close()


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_responses_that_the_function_has_no_score_for_are_left_out_and_counted(objective: str, build: Build) -> None:
    """The function gives None to four of 32: to one response of a prompt, and to three of another's four."""
    stage = ppo(2, "patchy", objective=objective, prompts=8, num_generations=4, lr=1e-3, global_batch=32, epochs=1)
    told = steer(build(stage), size=1)
    lone = 1.0 if objective == "grpo" else 0.0
    assert series(told, "policy/unscored") == [4.0] * 2
    assert series(told, "policy/skipped") == [4.0 + lone] * 2
    assert series(told, "policy/groups_skipped") == ([1.0] * 2 if objective == "grpo" else [])
    assert series(told, "policy/empty") == [0.0] * 2
    assert all(map(math.isfinite, series(told, "train/loss") + series(told, "train/grad_norm")))
    tokens = series(told, "train/tokens")[-2:]
    assert tokens[1] - tokens[0] <= 8 * (32 - 4 - lone), "what is left out weighs nothing in the update"
    # All that are scored score 1: a missing score that counted as 0 would show in the mean.
    assert series(told, "policy/reward") == [1.0] * 2
    assert series(told, "policy/reward_std") == [0.0] * 2
    shown = [body["reward"] for body in told.all("Sampled") if body["stage"] == "policy"]
    assert None in shown and set(shown) == {None, 1.0}


def test_a_reward_function_that_scores_nothing_pauses_the_run(build: Build) -> None:
    """Already at the evaluation before the first step, which draws two responses."""
    root = build(ppo(1, "unscored", objective="grpo", prompts=8, num_generations=4, global_batch=32, epochs=1, lr=1e-3))
    ranks = start_ranks(root, 1, stopping_when_paused, "none of 2 responses has a score")
    assert ranks.wait() == [0], logs(root)
    told = Told.read(root)
    (alarm,) = [note["text"] for note in told.all("Note") if note["level"] == "alarm"]
    assert "rewards.py:unscored: none of 2 responses has a score (correct it and resume)" in alarm
    assert not series(told, "policy/reward")


def test_an_empty_response_is_not_shown_to_the_function(build: Build) -> None:
    """`proud` fails on an empty text; prompts without room for a response have one."""
    told = steer(build(ppo(2, "proud", context=64, max_new_tokens=24, prompts=16, global_batch=16, lr=1e-3)), size=1)
    empty = series(told, "policy/empty")
    assert all(0 < count < 16 for count in empty)
    assert series(told, "policy/skipped") == empty
    assert series(told, "policy/unscored") == [0.0] * len(empty)


def test_grpo_weighs_by_responses_where_the_recipe_says_so(build: Build) -> None:
    """Before the first update every ratio is 1, so the loss is the advantages' mean over tokens, or over responses: of groups 0."""
    given = {
        "prompts": 4,
        "num_generations": 4,
        "micro_batch": 8,
        "epochs": 1,
        "max_new_tokens": 60,
        "context": 96,
        "temperature": 10,
    }
    told = []
    for normalisation, size in (("token", 1), ("sequence", 2)):
        stage = ppo(1, "brief", objective="grpo", normalisation=normalisation, lr=1e-3, **given)
        told.append(steer(build(stage, name=normalisation), size=size))
    by_token, by_response = told
    assert min(series(by_token, "policy/response_length")) < 60, "some responses end before others"
    assert abs(series(by_token, "train/loss")[12]) > 1e-3
    assert abs(series(by_response, "train/loss")[12]) < 1e-6
    assert series(by_response, "train/tokens")[12] == series(by_token, "train/tokens")[12]


def test_what_a_recipes_policy_says_is_checked(recipe: Recipe) -> None:
    for stage, says in (
        (ppo(1, normalisation="sequence"), 'rollout.normalisation: is for objective "grpo", this stage\'s is "ppo" (drop it)'),
        (ppo(1, objective="grpo", num_generations=2, normalisation="batch"), "normalisation"),
        (ppo(1, advantage="leave-one-out"), 'rollout.advantage: is for objective "grpo", this stage\'s is "ppo" (drop it)'),
        # Read by nobody, the coefficient stays as it is.
        (ppo(1, objective="grpo", num_generations=2, kl_target=6.0), 'rollout.kl_target: is for objective "ppo"'),
        (ppo(1, objective="grpo", num_generations=2, value_clip=0.2), 'rollout.value_clip: is for objective "ppo"'),
        (ppo(1, objective="grpo", num_generations=2, gamma=0.99), 'rollout.gamma: is for objective "ppo"'),
        (ppo(1, temperature=0.001), "rollout.temperature: must lie between 0.01 and 100"),
    ):
        text = dump_recipe(msgspec.structs.replace(recipe, stage=(recipe.stage[0], stage))).replace("{}/rewards", "/tmp/rewards")
        with pytest.raises(RecipeError, match=re.escape(says)):
            parse_recipe(text, base=Path.cwd())


def test_values_are_not_clipped_unless_the_recipe_says_so(recipe: Recipe) -> None:
    values, old, returns, mask = torch.zeros(1, 3), torch.full((1, 3), -9.0), torch.full((1, 3), -3.0), torch.ones(1, 3)
    for limit, clipped in ((None, 0.0), (0.2, 3.0)):
        clip = stage_settings(recipe, ppo(1, value_clip=limit))["value_clip"]
        loss, metrics = value_loss(values, old, returns, mask, clip)
        assert float(metrics["value/clip_fraction"].sum()) == clipped
        assert limit is not None or loss.tolist() == [[4.5] * 3]
