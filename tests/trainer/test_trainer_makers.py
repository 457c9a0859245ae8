"""Stages that make data: what they keep, that it can be read again, and that nothing disturbs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainer_harness import Step, Told, same_bits, state, steer, tensors, write_recipe

from midwatch.protocol import Op
from midwatch.recipe import Recipe, RecipeError, Source, Stage, parse_recipe
from midwatch.recipe.repeat import expanded
from midwatch.recipe.rollout import Rollout
from midwatch.recipe.stage import Repeat
from shards.format.corpus import Corpus
from shards.tokenization.tokenizer import Tokenizer
from trainer.synthetic.methods import turns_of

FUNCTION = """
def letters(prompts, responses):
    return [response.count("e") / len(response) if response else 0.0 for response in responses]
"""


def made(name: str, stage: str, part: str) -> Source:
    return Source(name=name, kind="sft" if part in ("best", "revisions") else "preference", origin="stage", stage=stage, part=part)


def dpo(name: str, source: str, **more: Any) -> Stage:
    given = {"steps": 4, "context": 96, "global_batch": 4, "micro_batch": 4, "lr": 1e-3, "eval_samples": 2, "sample_tokens": 4}
    return Stage(name=name, objective="dpo", mixture={source: 1.0}, **(given | more))


def rejection(place: Path, steps: int = 3, **more: Any) -> Stage:
    rollout = Rollout(max_new_tokens=8, num_generations=4, function=f"{place}/rewards.py:letters")
    given = {"context": 96, "global_batch": 8, "mixture": {"prefer": 1.0}, "rollout": rollout}
    return Stage(name="rejection", objective="rejection_sampling", steps=steps, **(given | more))


def run(recipe: Recipe, place: Path, name: str, sources: list[Source], *stages: Stage, every: int = 1000) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "rewards.py").write_text(FUNCTION)
    base = msgspec.structs.replace(recipe.stage[0], steps=4, eval_every=1000, eval_samples=1, prompts=())
    changed, _ = expanded(
        msgspec.structs.replace(
            recipe,
            stage=(base, *stages),
            data=msgspec.structs.replace(recipe.data, source=(*recipe.data.source, *sources)),
            checkpoint=msgspec.structs.replace(recipe.checkpoint, every=every),
        )
    )
    return write_recipe(place / name, changed)


def records(root: Path, stage: str, part: str) -> list[dict[str, Any]]:
    files = sorted((root / "made" / stage).glob(f"{part}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


PAIRS = [made("best", "rejection", "best"), made("pairs", "rejection", "pairs")]


@pytest.fixture(scope="module")
def rejected(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    place = tmp_path_factory.mktemp("rejected")
    root = run(recipe, place, "run", PAIRS, rejection(place), dpo("dpo", "pairs"), every=2)
    return root, steer(root)


def test_the_best_of_several_responses_is_kept_and_the_worst_beside_it(rejected: tuple[Path, Told]) -> None:
    best, pairs = (records(rejected[0], "rejection", part) for part in ("best", "pairs"))
    assert len(best) == 24
    assert 12 < len(pairs) <= 24
    for pair in pairs:
        assert pair["chosen_reward"] == pytest.approx(pair["chosen"].count("e") / len(pair["chosen"]), abs=0.1)
        assert pair["chosen_reward"] > pair["rejected_reward"]
    rewards = [values["policy/reward"] for values in values_of(rejected[1]) if "synthetic/gain" in values]
    kept = sum(record["reward"] for record in best) / len(best)
    assert kept > 1.3 * sum(rewards) / len(rewards)


def values_of(told: Told) -> list[dict[str, float]]:
    return [body["values"] for body in told.all("Metrics")]


def test_what_is_made_becomes_shards_that_the_next_stage_reads(rejected: tuple[Path, Told]) -> None:
    root, told = rejected
    product = root / "made" / state(root / "checkpoints" / "11-1-dpo")["made"]["rejection"]
    corpora = [Corpus(product, "pairs", split) for split in ("train", "held_out")]
    pairs = records(root, "rejection", "pairs")
    assert sum(corpus.documents for corpus in corpora) == len(pairs)
    tokenizer = Tokenizer.load(product / "tokenizer.model")
    texts = {tokenizer.decode(corpus.read(*corpus.span(n)).tolist()) for corpus in corpora for n in range(corpus.documents)}
    drawn = {
        pair["prompt"][0]["content"] + tokenizer.decode(pair["chosen_ids"]) + tokenizer.decode(pair["rejected_ids"])
        for pair in pairs
    }
    assert texts == drawn
    assert [values["train/loss"] for values in values_of(told) if "preference/margin" in values]
    assert any("eval/pairs/accuracy" in values for values in values_of(told))
    assert state(root / "checkpoints" / "11-1-dpo")["origin"]["shards"]["dpo"].keys() == {"pairs"}


@pytest.mark.parametrize("part", ["best", "pairs"])
def test_what_is_learned_are_the_ids_that_were_drawn_with_an_end_only_where_they_had_one(
    rejected: tuple[Path, Told], part: str
) -> None:
    root = rejected[0]
    product = root / "made" / state(root / "checkpoints" / "11-1-dpo")["made"]["rejection"]
    names = ["response"] if part == "best" else ["chosen", "rejected"]
    wanted, cut = [], 0
    tokenizer = Tokenizer.load(product / "tokenizer.model")
    for record in records(root, "rejection", part):
        for mask, name in enumerate(names, 1):
            ids, finish = record[f"{name}_ids"], record["finish_reason" if part == "best" else f"{name}_finish_reason"]
            assert (ids[-1] in tokenizer.stops) == (finish == "stop") and len(ids) <= 8
            cut += finish == "length"
            wanted.append((mask, ids))
    assert cut > len(wanted) / 2, "else there is nothing to see"
    found = []
    for corpus in (Corpus(product, part, split) for split in ("train", "held_out")):
        for number in range(corpus.documents):
            span = corpus.span(number)
            ids, masks = corpus.read(*span), corpus.read(*span, "mask")
            found += [(mask, ids[masks == mask].tolist()) for mask in range(1, len(names) + 1)]
    assert sorted(found) == sorted(wanted)


def test_a_stage_that_makes_data_leaves_the_weights_alone(rejected: tuple[Path, Told]) -> None:
    before, after = (tensors(rejected[0] / "checkpoints" / id) for id in ("4-1-pretrain", "7-1-rejection"))
    assert all((before[name] == after[name]).all() for name in before if name.startswith("model."))


def test_a_stop_and_a_rollback_inside_it_change_nothing_of_what_is_made(
    rejected: tuple[Path, Told], recipe: Recipe, tmp_path: Path
) -> None:
    root = run(recipe, tmp_path, "again", PAIRS, rejection(tmp_path), dpo("dpo", "pairs"), every=2)
    back = {"checkpoint": "6-1", "lineage": {"id": 2}}
    pause, resume = Step(Op.PAUSE, phase="generating"), Step(Op.RESUME, looks=5)
    told = steer(root, pause, resume, Step(Op.ROLLBACK, back, after=8))
    assert told.outcome(3)["ok"]
    assert same_bits(root / "checkpoints" / "11-2-dpo", rejected[0] / "checkpoints" / "11-1-dpo")
    files = state(root / "checkpoints" / "7-2-rejection")["files"]
    assert [(part["lineage"], part["first"], part["last"]) for part in files] == [(1, 1, 2), (2, 3, 3)]


def test_rounds_of_rejection_and_dpo_each_learn_from_their_own(recipe: Recipe, tmp_path: Path) -> None:
    stages = [rejection(tmp_path, steps=1), dpo("dpo", "pairs", repeat=Repeat(times=2, since="rejection"))]
    root = run(recipe, tmp_path, "rounds", PAIRS, *stages)
    told = steer(root, size=1)
    assert told.all("Ended")[-1]["cause"] == "finished"
    assert [border["stage"] for border in told.all("StageBorder") if border["event"] == "begin"] == [
        "pretrain",
        "rejection-1",
        "dpo-1",
        "rejection-2",
        "dpo-2",
    ]
    assert records(root, "rejection-1", "best") != records(root, "rejection-2", "best")


def test_a_constitution_revises_and_judges(recipe: Recipe, tmp_path: Path) -> None:
    principles = ("Say what it does, not how.", "Be brief.")
    stage = Stage(
        name="constitution",
        objective="constitutional",
        steps=2,
        context=512,
        global_batch=4,
        mixture={"prefer": 1.0},
        rollout=Rollout(max_new_tokens=8),
    ).with_settings(principles=principles)
    sources = [made(part, "constitution", part) for part in ("revisions", "pairs", "judged")]
    later = [dpo("dpo", "judged", context=512), dpo("dpo2", "pairs", context=512)]
    root = run(recipe, tmp_path, "run", sources, stage, *later)
    told = steer(root, size=1)
    revisions, pairs, judged = (records(root, "constitution", part) for part in ("revisions", "pairs", "judged"))
    for record in (*revisions, *pairs, *judged):
        for name, finish in (("response", "finish_reason"), *((each, f"{each}_finish_reason") for each in ("chosen", "rejected"))):
            assert name not in record or (0 < len(record[f"{name}_ids"]) <= 8 and record[finish] in ("stop", "length"))
    assert len(revisions) == 8
    assert {record["principle"] for record in revisions} == set(principles)
    assert all(record["critique"] and record["original"] for record in revisions)
    chosen = {(pair["chosen"], pair["rejected"]) for pair in pairs}
    assert chosen == {(each["response"], each["original"]) for each in revisions if each["response"] != each["original"]}
    assert judged
    assert all(0.5 <= record["probability"] <= 1 for record in judged)
    assert told.all("Ended")[-1]["cause"] == "finished"


def test_a_source_whose_stage_was_passed_over_is_not_advanced_to(recipe: Recipe, tmp_path: Path) -> None:
    root = run(recipe, tmp_path, "run", PAIRS, rejection(tmp_path), dpo("dpo", "pairs"))
    told = steer(root, Step(Op.ADVANCE, {"to": "dpo"}, after=2), Step(Op.STOP_NOW), size=1)
    assert not told.outcome(1)["ok"]
    assert 'reads "pairs", and the stage that makes it was passed over' in told.outcome(1)["reason"]


CONVERSATIONS = [
    [("user", "What is 2 + 2?")],
    [("system", "Be brief."), ("user", "Hello")],
    [("user", "Hello"), ("assistant", "Hi."), ("user", "And you?\n\nReally?")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["one", "system", "several"])
def test_a_prompts_turns_come_back_from_its_ids(turns: list[tuple[str, str]], recipe: Recipe) -> None:
    tokenizer = Tokenizer.load(Path(recipe.data.dir or "") / "tokenizer.model")
    ids, _ = tokenizer.chat(turns)
    found = turns_of(tokenizer, ids)
    if len(turns) == 3:  # an answer's end is an id that decodes to nothing
        assert found is None or found == turns
    else:
        assert found == turns
    assert turns_of(tokenizer, ids[3:]) is None


MADE = """
[run]
name = "x"
[model]
num_layers = 1
hidden_size = 8
num_heads = 1
[data]
[[data.source]]
name = "asked"
kind = "sft"
origin = "stdlib-sft"
[[data.source]]
name = "pairs"
kind = "preference"
origin = "stage"
stage = "rejection"
part = "{part}"
[[stage]]
name = "base"
objective = "sft"
steps = 1
context = 64
global_batch = 1
mixture = {{asked = 1}}
[[stage]]
name = "rejection"
objective = "rejection_sampling"
steps = 1
context = 64
global_batch = 1
mixture = {{asked = 1}}
rollout = {{max_new_tokens = 8, num_generations = {num_generations}, function = "rewards.py:f"}}
[[stage]]
name = "dpo"
objective = "dpo"
steps = 1
context = 64
global_batch = 1
mixture = {{pairs = 1}}
{repeat}
"""


def parsed(part: str = "pairs", num_generations: int = 2, repeat: str = "") -> Recipe:
    return parse_recipe(MADE.format(part=part, num_generations=num_generations, repeat=repeat), base=Path("/"))


def test_a_recipe_says_what_its_stages_make() -> None:
    found = parsed()
    assert [source.name for source in found.build("/data").data.source] == ["asked"]
    assert found.stage[1].rollout is not None
    assert found.stage[1].rollout.function == "/rewards.py:f"


def test_rounds_are_written_out_with_names_of_their_own() -> None:
    found = parsed(repeat='repeat = {times = 2, since = "rejection"}')
    assert [stage.name for stage in found.stage] == ["base", "rejection-1", "dpo-1", "rejection-2", "dpo-2"]
    assert found.stage[4].mixture == {"pairs-2": 1.0}
    assert [(source.name, source.stage) for source in found.data.source][1:] == [
        ("pairs-1", "rejection-1"),
        ("pairs-2", "rejection-2"),
    ]


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"part": "best"},
        'rejection_sampling makes "best" of kind "sft", "pairs" of kind "preference", not "best" of kind "preference"',
    ),
    ({"num_generations": 1}, "responses to one prompt are compared with each other"),
    ({"repeat": 'repeat = {times = 2, since = "nowhere"}'}, '"nowhere" is not an earlier stage'),
    ({"repeat": 'repeat = {times = 0, since = "rejection"}'}, "repeat.times must be 1 to 1000"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_what_cannot_be_made_is_said_with_the_way_out(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        parsed(**changes)
    assert says in str(error.value)
