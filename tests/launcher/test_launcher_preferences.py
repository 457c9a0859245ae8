"""Decisions on disk: what a kill leaves, what is taken back, who holds a name, what is exported, how agreement is counted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.controller.annotation import agreement
from launcher.controller.annotation.pairs import export
from launcher.controller.annotation.prompts import is_shared, of_file, of_run, order
from launcher.controller.annotation.records import CandidateResponse, Decision, Pair, Prompt, PromptMessage, key_of, utc
from launcher.controller.annotation.store import PreferenceError, SampledPairs, Store, all_decisions, read
from midwatch.protocol import Choice, Share
from midwatch.recipe import parse_recipe

PROMPT: Prompt = (PromptMessage("system", "Be brief."), PromptMessage("user", "What is a watch?"))


def answer(text: str, score: float | None = None) -> CandidateResponse:
    return CandidateResponse(text=text, checkpoint="step-10", seed=1, score=score)


FOUR, CLOCK = answer("four hours"), answer("a clock")


def decision(
    number: int | str, choice: Choice = "left", *, annotator: str = "anna", pair: str = "", swapped: bool = False,
    left: CandidateResponse = FOUR, right: CandidateResponse = CLOCK, moment: float = 1000.0,
) -> Decision:  # fmt: skip
    return Decision(
        id=f"{annotator}-{number}",
        time=utc(moment),
        annotator=annotator,
        author="ann",
        pair=pair or f"pair-{number}",
        prompt=PROMPT,
        left=left,
        right=right,
        swapped=swapped,
        choice=choice,
        seconds=2.5,
    )


def test_a_decision_is_a_line_that_tells_all_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path, "anna", "here")
    store.add(decision(1, left=answer("four hours", 1.5), right=answer("a clock", -0.25), moment=1_700_000_000.1239))
    store.close()
    told = json.loads((tmp_path / "anna.jsonl").read_text())
    assert told["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a watch?"}]
    assert (told["time"], told["choice"], told["seconds"]) == ("2023-11-14T22:13:20.123Z", "left", 2.5)
    assert (told["left"]["text"], told["left"]["score"], told["right"]["checkpoint"]) == ("four hours", 1.5, "step-10")
    assert (told["annotator"], told["author"]) == ("anna", "ann")


def test_undo_takes_back_one_after_another_and_rewrites_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, "anna", "here")
    for number in range(3):
        store.add(decision(number))
    size = (tmp_path / "anna.jsonl").stat().st_size
    kept = (tmp_path / "anna.jsonl").read_bytes()
    assert [getattr(store.undo(f"u{n}", utc(0)), "id", None) for n in range(4)] == ["anna-2", "anna-1", "anna-0", None]
    assert (tmp_path / "anna.jsonl").read_bytes()[:size] == kept
    store.add(decision("new"))
    store.close()
    assert [each.id for each in all_decisions(tmp_path)["anna"]] == ["anna-new"]


def test_what_is_sent_again_is_done_once(tmp_path: Path) -> None:
    store = Store(tmp_path, "anna", "here")
    for number in (1, 1, 2):
        store.add(decision(number))
    assert store.undo("u", utc(0)) is not None and store.undo("u", utc(0)) is None
    store.add(decision(2))
    store.close()
    again = Store(tmp_path, "anna", "here")
    assert [each.id for each in again.decisions] == ["anna-1"] and again.undo("u", utc(0)) is None
    assert again.knows("u") and again.knows("anna-2")
    again.close()


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_torn_last_line_is_put_aside_and_told_and_the_next_stands_whole(tmp_path: Path, cut: int) -> None:
    store = Store(tmp_path, "anna", "here")
    store.add(decision(1))
    whole = (tmp_path / "anna.jsonl").stat().st_size
    store.add(decision(2))
    store.close()
    size = (tmp_path / "anna.jsonl").stat().st_size
    os.truncate(tmp_path / "anna.jsonl", whole + cut if cut > 0 else size + cut)
    assert [each.id for each in all_decisions(tmp_path)["anna"]] == ["anna-1"], "a reader passes it over"
    again = Store(tmp_path, "anna", "here")
    assert len(again.notes) == 1 and "torn" in again.notes[0] and (tmp_path / "anna.jsonl.torn").stat().st_size
    again.add(decision(3))
    again.close()
    assert [each.id for each in all_decisions(tmp_path)["anna"]] == ["anna-1", "anna-3"]
    assert read(tmp_path / "anna.jsonl").damaged == 0


def test_a_damaged_line_costs_itself_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, "anna", "here")
    for number in range(3):
        store.add(decision(number))
    store.close()
    lines = (tmp_path / "anna.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "anna.jsonl").write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    again = Store(tmp_path, "anna", "here")
    assert "1 lines are damaged" in again.notes[0] and [each.id for each in again.decisions] == ["anna-0", "anna-2"]
    again.close()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/launcher")
from launcher.controller.annotation.store import Store
from test_launcher_preferences import decision
store = Store(Path(sys.argv[1]), "anna", f"process {sys.argv[2]}")
print("open", flush=True)
first = len(store.decisions)
for number in range(first, 100_000):
    store.add(decision(number))
    print(number, flush=True)
"""


def writer(directory: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(directory), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_writer_that_is_killed_loses_nothing_it_acknowledged_and_lets_go_of_the_name(tmp_path: Path) -> None:
    acknowledged = -1
    for turn in range(3):
        process = writer(tmp_path, str(turn))
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        deadline = time.monotonic() + 10
        while acknowledged < 25 * (turn + 1) and time.monotonic() < deadline:
            acknowledged = int(process.stdout.readline())
        with pytest.raises(PreferenceError, match=f"anna annotates already: process {turn} .*--as NAME"):
            Store(tmp_path, "anna", "here")
        Store(tmp_path, "bob", "here").close()  # another's file is another's
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        acknowledged = max([acknowledged, *map(int, rest)])
        numbers = [int(each.id.split("-")[1]) for each in all_decisions(tmp_path)["anna"]]
        assert numbers == list(range(len(numbers))) and len(numbers) - 1 in (acknowledged, acknowledged + 1)
        acknowledged = len(numbers) - 1


@pytest.mark.parametrize("name", ["", "pairs", "pairs-drawn", "../anna", ".anna", "a b", "x" * 65])
def test_names_that_are_no_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PreferenceError, match="--as NAME"):
        Store(tmp_path, name, "here")


def test_drawn_pairs_are_found_by_prompt_and_fall_on_sides_by_annotator(tmp_path: Path) -> None:
    drawn = SampledPairs(tmp_path)
    pairs = [
        Pair(id=f"p{n}", time=utc(0), prompt=PROMPT, first=answer("a"), second=answer("b"), temperature=1.0, limit=8)
        for n in range(200)
    ]
    for pair in pairs:
        drawn.add(pair)
    drawn.close()
    again = SampledPairs(tmp_path)
    assert again.of(PROMPT) == pairs and again.get("p7") == pairs[7] and again.of(()) == []
    again.close()
    sides = [pair.swapped("anna") for pair in pairs]
    assert 70 < sum(sides) < 130 and sides != [pair.swapped("bob") for pair in pairs]
    assert "pairs-drawn" not in all_decisions(tmp_path)


def test_pairs_are_exported_and_what_teaches_nothing_is_counted(tmp_path: Path) -> None:
    store, other = Store(tmp_path, "anna", "here"), Store(tmp_path, "bob", "here")
    for number, choice in enumerate(("left", "right", "tie", "both-bad", "skip", "left")):
        store.add(decision(number, choice, moment=number))  # type: ignore[arg-type]
    store.undo("u", utc(9))
    store.add(decision("empty", "left", right=answer(" \n")))
    other.add(decision(1, "right", annotator="bob", moment=0.5))
    store.close()
    other.close()
    assert export(tmp_path) == {"pairs": 3, "tie": 1, "both-bad": 1, "skip": 1, "empty": 1}
    told = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(each["annotator"], each["chosen"], each["rejected"]) for each in told] == [
        ("anna", "four hours", "a clock"),
        ("bob", "a clock", "four hours"),
        ("anna", "a clock", "four hours"),
    ]
    assert {(each["chosen_finish_reason"], each["rejected_finish_reason"]) for each in told} == {("stop", "stop")}
    assert told[0]["prompt"][1] == {"role": "user", "content": "What is a watch?"}
    assert export(tmp_path, tmp_path / "elsewhere.jsonl")["pairs"] == 3
    assert (tmp_path / "elsewhere.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
    assert set(all_decisions(tmp_path)) == {"anna", "bob"}, "a file of pairs is no annotator's"


# Agreement


def test_cohens_kappa_is_the_one_that_a_hand_computes() -> None:
    # 20 and 15 alike of 50, 5 and 10 apart: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    units = [("first", "first")] * 20 + [("first", "second")] * 5 + [("second", "first")] * 10 + [("second", "second")] * 15
    assert agreement.cohen(units) == pytest.approx(0.4)
    assert agreement.cohen([]) is None and agreement.cohen([("first", "first")] * 3) is None
    assert agreement.cohen([("first", "second"), ("second", "first")]) == pytest.approx(-1.0)


def test_krippendorffs_alpha_is_that_of_its_own_worked_example() -> None:
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", C: four observers, twelve units, missing data: 0.743
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = [[label for label in unit if label != "."] for unit in zip(*observers, strict=True)]
    assert agreement.krippendorff(units) == pytest.approx(0.743, abs=0.0005)
    assert agreement.krippendorff([]) is None and agreement.krippendorff([["first", "first"]]) is None


def test_wilsons_interval_is_the_known_one() -> None:
    found = agreement.share(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert agreement.share(0, 0) == Share(0, 0, None, None)
    assert agreement.share(0, 5).low == pytest.approx(0.0) and not math.isnan(agreement.share(5, 5).high or 0)


def test_labels_are_the_pairs_own_whichever_side_an_answer_was_on() -> None:
    anna = [decision(n, c, pair=f"p{n}") for n, c in enumerate(("left", "right", "tie", "left", "skip"))]  # type: ignore[arg-type]
    bob = [
        decision(0, "right", annotator="bob", pair="p0", swapped=True),  # the first again: alike
        decision(1, "right", annotator="bob", pair="p1", swapped=True),  # the first, where anna took the second
        decision(2, "both-bad", annotator="bob", pair="p2"),  # neither: alike
        decision(3, "left", annotator="bob", pair="p3"),
        decision(4, "left", annotator="bob", pair="p4"),  # anna has skipped it
        decision(5, "left", annotator="bob", pair="p5"),
    ]
    found = agreement.measure({"anna": anna, "bob": bob})
    # labels: anna first second neither first; bob first first neither first. Observed 3/4, expected (2*3 + 1*0 + 1*1)/16
    assert (found.measure, found.pairs, found.annotators) == ("Cohen's kappa", 4, 2)
    assert found.value == pytest.approx((0.75 - 7 / 16) / (1 - 7 / 16))
    assert (found.alike.hits, found.alike.count) == (3, 4)
    assert (found.left.hits, found.left.count) == (5, 8)
    alone = agreement.measure({"anna": anna})
    assert (alone.measure, alone.value, alone.pairs) == ("", None, 0)
    more = agreement.measure({"anna": anna, "bob": bob, "cem": [decision(9, annotator="cem", pair="p0")]})
    assert (more.measure, more.annotators, more.pairs) == ("Krippendorff's alpha", 3, 4)


def test_the_reward_model_agrees_where_it_scores_the_chosen_one_higher() -> None:
    high, low = answer("h", 2.0), answer("l", -1.0)
    made = [
        decision(1, "left", left=high, right=low),
        decision(2, "right", left=high, right=low),
        decision(3, "right", left=low, right=high),
        decision(4, "tie", left=low, right=high),
        decision(5, "left", left=high, right=high),
        decision(6, "left", left=high, right=answer("none")),
    ]
    assert agreement.reward_model(made) == agreement.share(2, 3)


# Prompts


def test_prompts_of_a_file_are_lines_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    lines = [
        "What is a list?",
        "",
        json.dumps({"prompt": "p"}),
        json.dumps({"messages": messages}),
        json.dumps({"prompt": messages[:2]}),
    ]
    file.write_text("\n".join(lines) + "\nWhat is a list?\n")
    both = (PromptMessage("system", "s"), PromptMessage("user", "u"))
    assert of_file(file) == [(PromptMessage("user", "What is a list?"),), (PromptMessage("user", "p"),), both]
    for wrong, words in (
        ("{", "not JSON"),
        ('{"text": "x"}', "neither"),
        ('{"prompt": " "}', "empty"),
        ('{"messages": []}', "user's"),
    ):
        file.write_text(f"one\n{wrong}\n")
        with pytest.raises(PreferenceError, match=f":2: .*{words}"):
            of_file(file)
    with pytest.raises(PreferenceError, match="No such file"):
        of_file(tmp_path / "no")


RECIPE = """
[run]
name = "r"
[model]
num_layers = 1
hidden_size = 8
num_heads = 2
[data]
held_out = 0.5
[[data.source]]
name = "asked"
kind = "sft"
origin = "jsonl"
path = "PLACE/asked.jsonl"
[[data.source]]
name = "pairs"
kind = "preference"
origin = "jsonl"
path = "PLACE/pairs.jsonl"
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[[stage]]
name = "first"
objective = "pretrain"
steps = 5
global_batch = 1
context = 8
mixture = { text = 1.0 }
[[stage]]
name = "second"
objective = "sft"
steps = 5
global_batch = 1
context = 8
mixture = { asked = 1.0 }
[[stage]]
name = "third"
objective = "dpo"
steps = 5
global_batch = 1
context = 8
mixture = { pairs = 1.0 }
"""


def test_prompts_of_a_run_are_the_held_in_ones_of_its_newest_stage(tmp_path: Path) -> None:
    asked = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(40)]
    pairs = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    recipe = parse_recipe(RECIPE.replace("PLACE", str(tmp_path)))
    for source, stage, letter in (
        ("", "third", "p"),
        ("", "second", "q"),
        ("asked", "third", "q"),
        ("", "first", "q"),
        ("", "", "q"),
    ):
        found = of_run(recipe, source, stage)
        assert 5 < len(found) < 35 and {prompt[-1].content[0] for prompt in found} == {letter}, (source, stage)
    for source, words in (("text", "asked, pairs"), ("none", "--prompts FILE")):
        with pytest.raises(PreferenceError, match=words):
            of_run(recipe, source, "third")
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(PreferenceError, match="--prompts FILE"):
        of_run(recipe, "pairs", "third")


def test_the_shared_prompts_are_the_same_for_all_and_come_evenly() -> None:
    prompts: list[Prompt] = [(PromptMessage("user", f"q{n}"),) for n in range(500)]
    anna, bob = order(prompts, "anna", 0.2), order(reversed(prompts), "bob", 0.2)
    assert [p for p, shared in anna if shared] == [p for p, shared in bob if shared]
    assert [p for p, shared in anna if not shared] != [p for p, shared in bob if not shared]
    assert set(anna) == set(bob) and 70 < sum(shared for _, shared in anna) < 130
    assert 10 <= sum(shared for _, shared in anna[:100]) <= 30
    assert order(prompts, "anna", 0.2) == anna
    assert {p for p, shared in anna if shared} <= {p for p, shared in order(prompts, "anna", 0.5) if shared}
    assert all(shared for _, shared in order(prompts, "anna", 1.0)) and not any(s for _, s in order(prompts, "anna", 0.0))
    assert not is_shared(key_of(prompts[0]), 0.0)
