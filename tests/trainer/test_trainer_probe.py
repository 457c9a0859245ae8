"""The probe: what a checkpoint answers is what its weights say; loaded when asked for, verified, a few at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_harness import state, tensors

from midwatch import protocol as p
from midwatch.recipe import Recipe, load_recipe
from shards.tokenization.huggingface import bundle
from shards.tokenization.tokenizer import Tokenizer
from trainer.model.decoder import Decoder
from trainer.probe.loading import Loaded, find, load
from trainer.probe.service import Service
from trainer.probe.text import Stream, pieces

torch.set_num_threads(1)
CPU = torch.device("cpu")
GREEDY: dict[str, Any] = {"temperature": 0.0, "limit": 12}


class Desk:
    """A service on a run, and what it has answered."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.told: list[p.Message] = []
        self.loads: list[str] = []
        self._recipe, self._root = load_recipe(root / "recipe.toml"), root
        self.service = Service(partial(find, root), self._load, keep, self.told.append)

    def _load(self, id: str) -> Loaded:
        self.loads.append(id)
        return load(self._recipe, self._root, id, CPU)

    def ask(self, *checkpoints: str, prompt: str = "The import statement", number: int = 1, **more: Any) -> None:
        self.service.take(p.ProbeAsk(ask=number, checkpoints=checkpoints, prompt=prompt, **{**GREEDY, **more}))

    def finish(self) -> None:
        while self.service.busy:
            self.service.work()

    def all(self, kind: type[Any], number: int = 1, which: int = 0) -> list[Any]:
        return [m for m in self.told if isinstance(m, kind) and (m.ask, m.which) == (number, which)]

    def end(self, number: int = 1, which: int = 0) -> p.ProbeEnd:
        (found,) = self.all(p.ProbeEnd, number, which)
        return found

    def text(self, number: int = 1, which: int = 0) -> str:
        return "".join(
            m.text for m in self.told if isinstance(m, p.ProbeToken | p.ProbeEnd) and (m.ask, m.which) == (number, which)
        )


@torch.no_grad()
def naive(root: Path, id: str, prompt: list[int], limit: int, stop: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens and their log-probabilities, each by a forward over all before it; weights read by the format alone."""
    recipe = load_recipe(root / "recipe.toml")
    held = tensors(root / "checkpoints" / id)
    model = Decoder(recipe.model, len(held["model.embedding.weight"]))
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(held[f"model.{name}"]))
    stage = recipe.stage[state(root / "checkpoints" / id)["stage"]]
    model.set_positions(stage.rope or recipe.model.rope, recipe.stage[0].context, stage.position_factor)
    ids, chances = list(prompt), []
    while len(ids) - len(prompt) < limit and ids[-1] != stop:
        tokens = torch.tensor([ids])
        found = model(tokens, torch.arange(len(ids))[None], torch.zeros_like(tokens))[0, -1].log_softmax(-1)
        ids.append(int(found.argmax()))
        chances.append(float(found.max()))
    return ids[len(prompt) :], chances


@pytest.fixture
def tokenizer(recipe: Recipe) -> Tokenizer:
    assert recipe.data.dir is not None
    return Tokenizer.load(Path(recipe.data.dir) / "tokenizer.model")


def ids_of(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir() if not path.name.startswith("."))


def of_stage(root: Path, stage: str) -> str:
    return next(name for name in ids_of(root) if name.endswith(f"-{stage}"))


@pytest.mark.parametrize("stage", ["pretrain", "extend", "sft"])
def test_a_greedy_answer_is_that_of_naive_decoding_with_the_stages_positions(
    finished: Path, tokenizer: Tokenizer, stage: str
) -> None:
    id, desk = of_stage(finished, stage), Desk(finished)
    desk.ask(id)
    desk.finish()
    chat = stage == "sft"
    prompt = (
        tokenizer.chat([("user", "The import statement")])[0]
        if chat
        else [tokenizer.bos, *tokenizer.encode("The import statement")]
    )
    wanted, chances = naive(finished, id, prompt, 12, tokenizer.eos)
    tokens = desk.all(p.ProbeToken)
    assert [each.piece for each in tokens] == pieces(tokenizer, wanted)
    assert [each.log_prob for each in tokens] == pytest.approx(chances, abs=1e-4)
    assert desk.text() == tokenizer.decode(wanted)
    (began,) = desk.all(p.ProbeBegan)
    assert (began.form, began.stage, began.checkpoint, began.prompt_tokens) == ("chat" if chat else "text", stage, id, len(prompt))
    for each in tokens:
        assert len(each.alternatives) == 10 and each.alternatives[0][0] == each.piece
        assert each.alternatives[0][1] == pytest.approx(float(torch.tensor(each.log_prob).exp()), abs=1e-4)
        assert sum(chance for _, chance in each.alternatives) <= 1.0001
    assert desk.end().tokens == len(tokens) and desk.end().score is None


def test_two_checkpoints_answer_one_prompt_side_by_side(finished: Path, tokenizer: Tokenizer) -> None:
    first, second = of_stage(finished, "pretrain"), of_stage(finished, "sft")
    desk = Desk(finished)
    desk.ask(first, second, form="text")
    desk.finish()
    prompt = [tokenizer.bos, *tokenizer.encode("The import statement")]
    for which, id in enumerate((first, second)):
        assert desk.text(which=which) == tokenizer.decode(naive(finished, id, prompt, 12, tokenizer.eos)[0])


def test_what_was_said_before_is_part_of_the_prompt(finished: Path, tokenizer: Tokenizer) -> None:
    id, desk = of_stage(finished, "sft"), Desk(finished)
    turns = (p.ProbeTurn("user", "What is a list?"), p.ProbeTurn("assistant", "A sequence."))
    desk.ask(id, prompt="And a tuple?", turns=(turns,))
    desk.finish()
    prompt = tokenizer.chat([("user", "What is a list?"), ("assistant", "A sequence."), ("user", "And a tuple?")])[0]
    assert desk.text() == tokenizer.decode(naive(finished, id, prompt, 12, tokenizer.eos)[0])


def test_the_same_seed_draws_the_same_and_another_something_else(quiet: Path) -> None:
    desk = Desk(quiet)
    for number, seed in ((1, 5), (2, 5), (3, 6)):
        desk.ask("newest", number=number, temperature=1.0, seed=seed, limit=20)
    desk.finish()
    assert desk.text(1) == desk.text(2) != desk.text(3)
    assert len(desk.loads) == 1, "asks at once share the weights"


def test_only_so_many_stay_loaded_those_used_last(stopped: Path) -> None:
    shutil.copytree(stopped / "checkpoints" / "4-1", stopped / "checkpoints" / "5-1")
    desk = Desk(stopped, keep=2)
    for number, id in enumerate(("4-1", "7-1", "4-1", "5-1", "4-1", "7-1")):
        desk.ask(id, number=number, limit=2)
        desk.finish()
    assert desk.loads == ["4-1", "7-1", "5-1", "7-1"]
    assert desk.service.loaded == ["4-1", "7-1"]


def test_with_room_for_one_the_second_waits_for_the_first(stopped: Path) -> None:
    desk = Desk(stopped, keep=1)
    desk.ask("4-1", "7-1", limit=3)
    desk.finish()
    assert [m.which for m in desk.told] == sorted(m.which for m in desk.told)  # type: ignore[union-attr]
    assert desk.end(which=0).tokens == desk.end(which=1).tokens == 3


def test_a_stop_ends_what_is_under_way_and_what_waits(stopped: Path) -> None:
    desk = Desk(stopped, keep=1)
    desk.ask("4-1", "7-1", limit=30)
    for _ in range(4):
        desk.service.work()
    desk.service.take(p.ProbeStop(ask=1))
    assert (desk.end(which=0).finish, desk.end(which=1).finish) == ("aborted", "aborted")
    assert 0 < desk.end(which=0).tokens < 30 and not desk.service.busy
    desk.ask("7-1", number=2, limit=3)
    desk.finish()
    assert desk.end(2).finish == "length"


def test_what_cannot_be_answered_says_why_and_the_way_out(stopped: Path) -> None:
    desk = Desk(stopped)
    file = next((stopped / "checkpoints" / "4-1").glob("*.bin"))
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    for number, (id, more) in enumerate(
        (
            ("4-1", {}),
            ("99-1", {}),
            ("../run", {}),
            ("golden", {}),
            ("7-1", {"prompt": "word " * 200}),
            ("7-1", {"temperature": -1.0}),
            ("7-1", {"limit": 0}),
            ("7-1", {"prompt": "", "limit": 2}),
        ),
        1,
    ):
        desk.ask(id, number=number, **more)
    desk.finish()
    problems = [desk.end(number).problem for number in range(1, 9)]
    assert str(file) in problems[0] and "use another checkpoint" in problems[0]
    assert all('there is no checkpoint "' in problems[at] and "4-1, 7-1" in problems[at] for at in (1, 2, 3))
    assert "and the context 32 (shorten it to 31 or less)" in problems[4]
    assert "temperature is -1.0" in problems[5] and "limit is 0" in problems[6]
    assert problems[7] == "" and desk.end(8).tokens == 2, "BOS alone is a prompt"
    (stopped / "checkpoints" / "7-1" / "manifest.msgpack").write_bytes(b"\xc1")
    again = Desk(stopped)
    again.ask("7-1")
    again.finish()
    assert "manifest.msgpack" in again.end().problem


def test_a_step_that_fails_ends_its_answers_and_no_others(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(stopped)
    desk.ask("4-1", limit=8)
    desk.ask("7-1", number=2, limit=8)
    desk.service.work()
    desk.service.work()
    broken = desk.service._loaded["4-1"].engine

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(broken, "step", fail)
    desk.finish()
    assert "the device is gone" in desk.end(1).problem and desk.end(2).finish == "length"
    desk.ask("4-1", number=3, limit=2)
    desk.finish()
    assert desk.end(3).problem == "" and desk.loads == ["4-1", "7-1", "4-1"]


TEXTS = ("naïve café", "日本語のテキスト", "🙂🙃 ok 🙂", "a\n\tb  c", "Ελλάδα und Straße", "\u200b✓ — “q”")


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text * 8)
    stream = Stream(tokenizer.decode, [tokenizer.bos, *tokenizer.encode("So: ")])
    parts = [stream.add(id) for id in ids]
    assert "".join(parts) + stream.rest() == text * 8
    assert all("\ufffd" not in part for part in parts)


def test_what_never_becomes_a_character_comes_in_the_end() -> None:
    def decode(ids: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    stream = Stream(decode, [65])
    assert [stream.add(byte) for byte in (0xF0, 0x9F, 0x99, 0x82)] == ["", "", "", "🙂"]
    parts = [stream.add(byte) for byte in (0xFF, 0x66, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xE2, 0x82)]
    assert "".join(parts) + stream.rest() == decode([0xFF, 0x66, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xE2, 0x82])
    assert parts[1] == "\ufffdf" and "".join(parts) != "", "it does not wait for ever"


def test_tokens_of_a_tokenizer_json_stream_and_are_told_as_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast: Any = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(["the cat the hat"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    fast.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(bundle(tmp_path / "tokenizer.json"))
    ids = ours.encode("cat the 日本 🙂 the")
    stream = Stream(ours.decode, ours.prompt(""))
    parts = [stream.add(id) for id in ids]
    assert "".join(parts) == "cat the 日本 🙂 the" and all("\ufffd" not in part for part in parts)
    assert " the" in pieces(ours, ids) and pieces(ours, [ours.eos]) == ["[EOS]"]


@pytest.fixture
def process(stopped: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    begun: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "trainer.probe", str(stopped)]
        begun.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()
        each.wait()


def test_the_process_answers_over_pipes_gives_way_and_ends_with_its_standard_input(
    process: Callable[[], subprocess.Popen[bytes]],
) -> None:
    running = process()
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write(p.framed(p.ProbeAsk(ask=7, checkpoints=("newest",), prompt="import", limit=5, temperature=0.0)))
    running.stdin.flush()
    told: list[p.Message] = []
    while not told or not isinstance(told[-1], p.ProbeEnd):
        told.append(p.decode(running.stdout.read(p.frame_length(running.stdout.read(p.LENGTH_BYTES)))))
    assert [type(m).__name__ for m in told] == ["ProbeBegan", *["ProbeToken"] * 5, "ProbeEnd"]
    assert os.getpriority(os.PRIO_PROCESS, running.pid) >= 10
    assert Path(f"/proc/{running.pid}/oom_score_adj").read_text().strip() == "1000"
    running.stdin.write(p.framed(p.ProbeAsk(ask=8, checkpoints=("newest",), prompt="import", limit=20, temperature=0.0)))
    running.stdin.close()
    assert running.wait(5) == 0
