"""Policies that learn from their own responses: reward models, PPO, GRPO; what they reach, and what nothing disturbs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from trainer_harness import Step, Told, fresh, logs, same_bits, start_ranks, state, steer, tensors, write_recipe
from transformers import AutoModelForSequenceClassification

from launcher.plan.memory import Memory, memory
from midwatch.protocol import Op, ProbeAsk, ProbeEnd, ProbeToken
from midwatch.recipe import Recipe, Stage, load_recipe
from midwatch.recipe.rollout import Rollout
from shards.sampling.batches import open_held_out
from shards.tokenization.tokenizer import Tokenizer
from trainer.huggingface.export import export
from trainer.model.decoder import Decoder
from trainer.probe.judging import RewardScorer
from trainer.probe.loading import load
from trainer.probe.service import Service

FUNCTIONS = """
import json, math, pathlib

HERE = pathlib.Path(__file__).parent

def letters(prompts, responses):
    "The share of a response that is the letter e: about 0.1 of English, and 1 at the best."
    return [response.count("e") / len(response) if response else 0.0 for response in responses]

def rigged(prompts, responses):
    "The same, but for held-out prompts, where nothing helps."
    held = set(json.loads((HERE / "held.json").read_text()))
    return [0.1 if prompt in held else score for prompt, score in zip(prompts, letters(prompts, responses))]

def not_a_number(prompts, responses):
    return [math.nan if number == 1 else 1.0 for number, _ in enumerate(responses)]

def patchy(prompts, responses):
    "One response of the first prompt has no score, and of the second's four three have none."
    return [None if number in (2, 4, 5, 7) else 1.0 for number, _ in enumerate(responses)]

def unscored(prompts, responses):
    return [None for _ in responses]

def proud(prompts, responses):
    return [1 / len(prompt) for prompt in prompts]

def brief(prompts, responses):
    return [-float(len(response)) for response in responses]

def too_few(prompts, responses):
    return [1.0]

def breaks(prompts, responses):
    if not (HERE / "mended").exists():
        raise KeyError("nobody knows")
    return letters(prompts, responses)
"""

Build = Callable[..., Path]


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Build:
    """Makes a run of a short pretraining and the given stages after it."""
    return lambda *stages, name="run", **given: built(recipe, tmp_path, name, *stages, **given)


def built(recipe: Recipe, place: Path, name: str, *stages: Stage, every: int = 1000, held_out: bool = False) -> Path:
    (place / "rewards.py").write_text(FUNCTIONS)
    base = msgspec.structs.replace(recipe.stage[0], eval_every=1000, eval_samples=1, prompts=())
    checkpoint = msgspec.structs.replace(recipe.checkpoint, every=every)
    if held_out:
        data = Path(recipe.data.dir or "")
        tokenizer = Tokenizer.load(data / "tokenizer.model")
        held = open_held_out(data, "prefer", "prompt", 96)
        (place / "held.json").write_text(json.dumps([tokenizer.decode(ids) for ids in held.prompts(0, len(held))]))
    moved = [
        msgspec.structs.replace(each, rollout=msgspec.structs.replace(each.rollout, function=each.rollout.function.format(place)))
        if each.rollout is not None and each.rollout.function is not None
        else each
        for each in stages
    ]
    return write_recipe(place / name, msgspec.structs.replace(recipe, stage=(base, *moved), checkpoint=checkpoint))


def ppo(steps: int, function: str | None = "letters", objective: Any = "ppo", **given: Any) -> Stage:
    place = None if function is None else f"{{}}/rewards.py:{function}"
    own = {key: given.pop(key) for key in list(given) if key in Rollout.__struct_fields__}
    rollout = Rollout(**({"prompts": 32, "max_new_tokens": 8, "kl_coef": 0.0, "epochs": 2, "function": place} | own))
    defaults = {"context": 96, "global_batch": 16, "micro_batch": 16, "lr": 1e-2, "warmup_steps": 1, "min_lr_ratio": 1.0}
    more = {"mixture": {"prefer": 1.0}, "eval_every": 1000, "eval_samples": 2} | given
    return Stage(name="policy", objective=objective, steps=steps, rollout=rollout, **(defaults | more))


REWARD = Stage(
    name="reward",
    objective="reward",
    steps=4,
    context=96,
    global_batch=8,
    micro_batch=4,
    lr=3e-3,
    mixture={"prefer": 1},
    warmup_steps=1,
)


def series(told: Told, name: str) -> list[float]:
    return [body["values"][name] for body in told.all("Metrics") if name in body["values"]]


@pytest.fixture(scope="module")
def learned(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """PPO on a task with a known best answer, without a tie to the reference."""
    return steer(built(recipe, tmp_path_factory.mktemp("learned"), "run", ppo(64, lr=2e-2)), size=1)


def test_ppo_finds_the_best_answer(learned: Told) -> None:
    found = series(learned, "policy/reward")
    assert found[0] < 0.15
    assert statistics.mean(found[-3:]) > 0.9
    assert series(learned, "policy/entropy")[-1] < series(learned, "policy/entropy")[0] / 2


def test_a_larger_kl_coefficient_drifts_less(build: Build, learned: Told) -> None:
    tied = steer(build(ppo(24, lr=2e-2, kl_coef=1.0)), size=1)
    at = len(series(tied, "policy/kl_sequence")) - 1
    assert series(tied, "policy/kl_sequence")[at] < 0.5 * series(learned, "policy/kl_sequence")[at]


def test_hacking_shows_as_a_reward_that_rises_on_training_prompts_alone(build: Build) -> None:
    told = steer(build(ppo(28, "rigged", lr=2e-2, eval_every=14, eval_samples=8), held_out=True), size=1)
    reward, held_out = series(told, "policy/reward"), series(told, "eval/prefer/reward")
    assert reward[-1] > 2 * reward[0]
    assert held_out == pytest.approx([0.1] * len(held_out))
    assert series(told, "eval/prefer/kl_sequence")[-1] > series(told, "eval/prefer/kl_sequence")[0] + 1


def test_grpo_finds_it_too_by_groups_and_by_leaving_one_out(build: Build) -> None:
    for advantage in ("group", "leave-one-out"):
        stage = ppo(32, objective="grpo", prompts=8, num_generations=4, epochs=1, advantage=advantage, lr=2e-2)
        found = series(steer(build(stage, name=advantage), size=1), "policy/reward")
        assert found[-1] > 2.5 * found[0]


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A reward model and PPO by it, on two ranks: normalised scores, a coefficient that is steered, two epochs a rollout."""
    root = built(recipe, tmp_path_factory.mktemp("whole"), "run", REWARD, judged(), every=3)
    return root, steer(root)


def judged(steps: int = 10) -> Stage:
    return ppo(
        steps,
        None,
        prompts=16,
        global_batch=8,
        micro_batch=4,
        lr=1e-3,
        normalise=True,
        kl_coef=0.1,
        kl_target=0.01,
        kl_horizon=50.0,
    )


def test_a_run_stopped_inside_an_epoch_goes_on_bit_for_bit(whole: tuple[Path, Told], build: Build) -> None:
    root = build(REWARD, judged(), every=1000)
    stopped = steer(root, Step(Op.STOP, after=20))
    (end,) = stopped.all("Ended")
    before = state(root / "checkpoints" / end["checkpoint"])["drawn"]
    assert before["left"] in (1, 2, 3)
    assert before["scores"] > 0
    steer(root, start=fresh(checkpoint=end["checkpoint"], generation=2))
    assert same_bits(root / "checkpoints" / "26-1-policy", whole[0] / "checkpoints" / "26-1-policy")
    assert ours(state(root / "checkpoints" / "26-1-policy")) == ours(state(whole[0] / "checkpoints" / "26-1-policy"))


def test_a_rollback_into_the_reward_models_stage_rebuilds_it_in_place(whole: tuple[Path, Told], build: Build) -> None:
    root = build(REWARD, judged(), every=3)
    told = steer(root, Step(Op.ROLLBACK, {"checkpoint": "15-1", "lineage": {"id": 2}}, after=20))
    assert told.outcome(1)["detail"]["step"] == 15
    assert state(root / "checkpoints" / "15-1")["stage_name"] == "reward"
    assert same_bits(root / "checkpoints" / "16-2-reward", whole[0] / "checkpoints" / "16-1-reward")
    assert same_bits(root / "checkpoints" / "26-2-policy", whole[0] / "checkpoints" / "26-1-policy")


def ours(found: dict[str, Any]) -> dict[str, Any]:
    """The state without what depends on how often it was saved."""
    settings = {key: value for key, value in found["settings"].items() if key != "checkpoint_every"}
    kept = ("step", "position", "drawn", "reward_model", "reference", "tokens")
    return {key: found[key] for key in kept} | {"settings": settings}


def test_a_rollback_into_a_rollout_goes_on_bit_for_bit(whole: tuple[Path, Told], build: Build) -> None:
    root = build(REWARD, judged(), every=3)
    steer(root, Step(Op.ROLLBACK, {"checkpoint": "18-1", "lineage": {"id": 2}}, after=23))
    assert 0 < state(root / "checkpoints" / "18-1")["drawn"]["left"] < 4
    assert same_bits(root / "checkpoints" / "26-2-policy", whole[0] / "checkpoints" / "26-1-policy")


def test_a_checkpoint_holds_all_that_rl_needs(whole: tuple[Path, Told]) -> None:
    names = tensors(whole[0] / "checkpoints" / "18-1").keys()
    for beginning in ("model.", "optimizer.first.", "critic.model.score", "critic.optimizer.second.", "rollout.advantages"):
        assert any(name.startswith(beginning) for name in names), beginning
    found = state(whole[0] / "checkpoints" / "18-1")
    assert (found["reward_model"], found["reference"]) == ("16-1-reward", "12-1-pretrain")
    assert found["settings"]["kl_coef"] == 0.1
    assert found["drawn"]["kl_scale"] != 1.0


def test_the_policy_begins_with_the_language_model_and_the_value_model_with_the_reward_model(build: Build) -> None:
    root = build(REWARD, msgspec.structs.replace(judged(2), lr=1e-12), every=1)
    steer(root)
    base, reward, after = (tensors(root / "checkpoints" / id) for id in ("12-1-pretrain", "16-1-reward", "18-1-policy"))
    assert not np.allclose(reward["model.blocks.0.mlp.up.weight"], base["model.blocks.0.mlp.up.weight"], atol=1e-4)
    for name in (name for name in base if name.startswith("model.")):
        np.testing.assert_allclose(after[name], base[name], atol=1e-8)
    for name in (name for name in reward if name.startswith("model.")):
        np.testing.assert_allclose(after[f"critic.{name}"], reward[name], atol=1e-8)


def test_any_number_of_ranks_draws_and_learns_the_same(whole: tuple[Path, Told], build: Build) -> None:
    one = steer(build(REWARD, judged(), every=3), size=1)
    for name in ("policy/reward", "policy/kl_sequence", "policy/entropy", "value/loss", "train/loss"):
        assert series(one, name)[-8:] == pytest.approx(series(whole[1], name)[-8:], abs=2e-4, rel=1e-4), name


def test_skipping_steps_passes_over_whole_rollouts(build: Build) -> None:
    root = build(judged_by_function(), every=3)
    told = steer(root, Step(Op.ROLLBACK, {"checkpoint": "15-1", "lineage": {"id": 2}, "skip": 5}, after=17))
    assert told.outcome(1)["ok"]
    found = state(root / "checkpoints" / "18-2")
    # Of four updates a rollout, three were taken of the first: it and the next one are passed over.
    assert found["position"] == 16 * 3
    assert found["drawn"]["count"] == 2


def judged_by_function() -> Stage:
    return ppo(10, prompts=16, global_batch=8, micro_batch=4, lr=1e-3)


def test_a_reward_model_learns_a_preference_and_says_how_sure_it_may_be(build: Build) -> None:
    told = steer(build(msgspec.structs.replace(REWARD, steps=40, lr=1e-2, eval_every=20, eval_samples=64)), size=1)
    accuracy = series(told, "preference/accuracy")
    assert statistics.mean(accuracy[-8:]) > 0.75
    low, found, high = (series(told, f"eval/prefer/accuracy{end}")[-1] for end in ("_low", "", "_high"))
    assert low < found < high
    assert 0 <= series(told, "eval/prefer/calibration_error")[-1] < 0.6


def test_the_engine_and_the_trainer_agree(whole: tuple[Path, Told]) -> None:
    assert max(series(whole[1], "policy/logprob_mismatch")) < 1e-4
    assert [note for note in whole[1].all("Note") if "engine" in note["text"]] == []


def test_an_engine_that_computes_another_model_raises_an_alarm(build: Build) -> None:
    told = steer(build(ppo(2, lr=1e-3, mismatch=1e-12)), size=1)
    (alarm,) = [note for note in told.all("Note") if note["level"] == "alarm"]
    assert "more than rollout.mismatch 1e-12" in alarm["text"]


def test_responses_are_reported_with_what_they_are_worth(whole: tuple[Path, Told]) -> None:
    found = [body for body in whole[1].all("Sampled") if body["stage"] == "policy"]
    assert 4 <= len(found) <= 3 * 16
    assert all(body["tokens"] == 8 or body["tokens"] > 0 for body in found)
    assert len({body["reward"] for body in found}) > 3
    assert {phase["phase"] for phase in whole[1].all("Phase")} >= {"generating", "scoring", "training"}


def test_the_probe_scores_answers_by_the_reward_model_and_refuses_to_let_it_write(whole: tuple[Path, Told]) -> None:
    root, cpu = whole[0], torch.device("cpu")
    recipe = load_recipe(root / "recipe.toml")
    told: list[Any] = []
    service = Service(lambda name: name, lambda id: load(recipe, root, id, cpu), 2, told.append, RewardScorer(recipe, root, cpu))
    asked = {"prompt": "What?", "form": "chat", "limit": 6, "temperature": 0.0, "alternatives": 0}
    service.take(ProbeAsk(ask=1, checkpoints=("26-1-policy", "12-1-pretrain"), **asked))
    service.take(ProbeAsk(ask=2, checkpoints=("16-1-reward",), **asked))
    while service.busy:
        service.work()
    ends = {(end.ask, end.which): end for end in told if isinstance(end, ProbeEnd)}
    assert "holds a reward model" in ends[2, 0].problem
    held = {
        name.removeprefix("model."): torch.from_numpy(values)
        for name, values in tensors(root / "checkpoints" / "16-1-reward").items()
    }
    model = Decoder(recipe.model, len(held["embedding.weight"]), scalar=True)
    model.load_state_dict({name: held[name] for name, _ in model.named_parameters()})
    for which in (0, 1):
        pieces = [token.piece for token in told if isinstance(token, ProbeToken) and token.which == which]
        assert len(pieces) == ends[1, which].tokens
        score = ends[1, which].score
        assert score is not None
        tokenizer = Tokenizer.load(Path(recipe.data.dir or "") / "tokenizer.model")
        names = {tokenizer.piece(id): id for id in reversed(range(tokenizer.vocab))}
        answer = [names[piece] for piece in pieces]
        answer += [tokenizer.eos] if answer[-1] != tokenizer.eos else []  # one that was cut off is scored as if it ended there
        ids = torch.tensor([[*tokenizer.chat([("user", "What?")])[0], *answer]])
        with torch.no_grad():
            found = model(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
        assert score == pytest.approx(float(found[0, -1]), abs=1e-5)


def test_an_exported_reward_model_scores_in_transformers_as_it_does_here(whole: tuple[Path, Told], tmp_path: Path) -> None:
    root = whole[0]
    said = export(root, "16-1-reward", tmp_path / "hf")
    assert "LlamaForSequenceClassification" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    recipe = load_recipe(root / "recipe.toml")
    tokenizer = Tokenizer.load(Path(recipe.data.dir or "") / "tokenizer.model")
    score = RewardScorer(recipe, root, torch.device("cpu"))
    for answer in ("Yes.", "It reads the file, and returns its lines."):
        ids, _ = tokenizer.chat([("user", "What does it do?"), ("assistant", answer)])
        with torch.no_grad():
            found = model(torch.tensor([[*ids, *[tokenizer.pad] * 5]])).logits
        assert float(found[0, 0]) == pytest.approx(score(ids), abs=1e-4)


def test_prompts_without_room_for_a_response_are_left_out_and_counted(build: Build) -> None:
    stage = ppo(4, context=64, max_new_tokens=24, prompts=16, global_batch=16, lr=1e-3)
    told = steer(build(stage), size=1)
    skipped = series(told, "policy/skipped")
    assert all(0 < count < 16 for count in skipped)
    assert all(np.isfinite(series(told, "train/loss")))


def test_scores_that_are_no_numbers_are_left_out_with_an_alarm(build: Build) -> None:
    told = steer(build(ppo(2, "not_a_number", lr=1e-3)), size=1)
    assert series(told, "policy/skipped") == [1.0]
    assert any("not a number" in note["text"] and note["level"] == "alarm" for note in told.all("Note"))
    assert all(np.isfinite(series(told, "train/loss")))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("breaks", "failed: KeyError: 'nobody knows', at "),
        ("too_few", "gave 1 numbers for 32"),
        ("nowhere", "has no function 'nowhere'"),
    ],
)
def test_a_function_that_fails_pauses_the_run_and_is_tried_again_on_resuming(function: str, says: str, build: Build) -> None:
    root = build(ppo(2, function, lr=1e-3))
    ranks = start_ranks(root, 1, stopping_when_paused, says)
    try:
        assert ranks.wait() == [0], logs(root)
        if function == "breaks":
            assert "Traceback" in logs(root) and 'raise KeyError("nobody knows")' in logs(root), "the rank's log has the stack"
    finally:
        ranks.kill()


def stopping_when_paused(root: Path, says: str) -> None:
    """Waits for the alarm, mends what can be mended, resumes, and stops where that was of no use."""
    import threading

    from trainer_harness import steered

    def look() -> None:
        while not any(says in note["text"] for note in Told.read(root).all("Note")):
            time.sleep(0.05)
        (root.parent / "mended").touch()

    threading.Thread(target=look, daemon=True).start()
    last = [Step(Op.RESUME, phase="paused", looks=40)] if "KeyError" in says else [Step(Op.STOP_NOW, phase="paused", looks=40)]
    steered(root, last, fresh())


def test_a_pause_holds_while_responses_are_written_and_changes_no_bit(build: Build) -> None:
    quiet, held = (build(ppo(3, lr=1e-3, max_new_tokens=60), name=name) for name in ("quiet", "held"))
    steer(quiet)
    told = steer(held, Step(Op.PAUSE, phase="generating"), Step(Op.RESUME, looks=10))
    assert told.outcome(1)["ok"]
    assert same_bits(quiet / "checkpoints" / "15-1-policy", held / "checkpoints" / "15-1-policy")


def test_a_stage_that_rests_on_one_passed_over_is_not_advanced_to(build: Build) -> None:
    root = build(REWARD, judged(2))
    told = steer(root, Step(Op.ADVANCE, {"to": "policy"}, after=3), Step(Op.STOP_NOW))
    assert not told.outcome(1)["ok"]
    assert "needs a reward model" in told.outcome(1)["reason"]


def test_four_models_hold_their_share_on_each_rank_and_frozen_ones_no_more(recipe: Recipe, tmp_path: Path) -> None:
    root = built(recipe, tmp_path, "run", REWARD, judged(2))
    steer(root)
    ranks = start_ranks(root, 2, weighing, "16-1-reward")
    assert ranks.wait() == [0, 0], logs(root)
    found: Sequence[dict[str, Any]] = [json.loads((root / f"weight-{rank}.json").read_text()) for rank in range(2)]
    one = json.loads((root / "weight-0.json").read_text())
    for role in ("policy", "critic", "reference", "reward_model"):
        assert sum(each[role]["weights"] for each in found) == pytest.approx(one[role]["whole"], rel=0.01)
        assert abs(found[0][role]["weights"] - found[1][role]["weights"]) <= 0.02 * one[role]["whole"]
    for each in found:
        for role in ("policy", "critic"):
            assert each[role]["moments"] == pytest.approx(2 * each[role]["weights"], rel=0.01)
        planned = plan(root)
        assert planned.weights_bytes + planned.optimizer_bytes == pytest.approx(
            each["policy"]["weights"] + each["policy"]["moments"], rel=0.02
        )
        assert planned.reference_bytes == pytest.approx(each["reference"]["weights"] + each["reward_model"]["weights"], rel=0.02)
        # The plan has the value model's gradients besides.
        assert planned.critic_bytes == pytest.approx(2 * each["critic"]["weights"] + each["critic"]["moments"], rel=0.02)
        # All that is alive before anything is drawn: weights of four, moments of two, the rollout, and little else.
        known = sum(each[role]["weights"] + each[role]["moments"] for role in ("policy", "critic", "reference", "reward_model"))
        assert known <= each["alive"] <= known + each["rollout"] + 0.05 * known


def plan(root: Path) -> Memory:
    recipe = load_recipe(root / "recipe.toml")
    return memory(recipe.model, 512, recipe.stage[-1], 2, True)


def weighing(root: Path, id: str) -> None:
    """Goes on to PPO from the reward model, and weighs what is there."""
    import gc
    import os

    import torch
    from torch import Tensor

    from midwatch.recipe import load_recipe
    from trainer.control.reporting import NoLink
    from trainer.distributed.mesh import join, local, open_store, settle
    from trainer.stage.training import Training

    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "test", recipe.cluster, recipe.parallel)
    assert recipe.data.dir is not None
    start = fresh(checkpoint=id)
    training = Training(recipe, root, Path(recipe.data.dir), world, NoLink(), start)
    training.open(start)
    roles = training.roles
    found: dict[str, Any] = {}
    for role, network in zip(("policy", "critic", "reference", "reward_model"), roles.models, strict=True):
        parameters = network.parameters().values()
        moments = 0
        for trainable in roles.trainables:
            if trainable.model is network:
                names = ("optimizer.first.", "optimizer.second.")
                moments = sum(local(t).nbytes for n, t in trainable.optimizer.tensors().items() if n.startswith(names))
        found[role] = {
            "weights": sum(local(parameter).nbytes for parameter in parameters),
            "whole": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            "moments": moments,
        }
    assert training.experience is not None
    found["rollout"] = sum(tensor.nbytes for tensor in training.experience.tensors().values())
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if isinstance(each, Tensor) and each.device.type == "cpu" and type(each) in (Tensor, torch.nn.Parameter)
    }
    parts = [local(parameter).untyped_storage() for each in roles.models for parameter in each.parameters().values()]
    storages |= {part.data_ptr(): part.nbytes() for part in parts}
    found["alive"] = sum(storages.values())
    (root / f"weight-{os.environ['RANK']}.json").write_text(json.dumps(found))
    training.close()
