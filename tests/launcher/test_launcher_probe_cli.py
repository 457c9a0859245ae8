"""`midwatch probe`: what is written where, the conversation, and a run whose controller is gone."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from launcher_model import talking_recipe, write_model, write_tokenizer

from launcher.cli.chat_repl import Talk
from launcher.cli.probe import show
from midwatch import protocol as p
from midwatch.recipe import dump_recipe

ASK = p.ProbeAsk(ask=0, checkpoints=("newest",), prompt="")


def token(text: str, which: int = 0) -> p.ProbeToken:
    return p.ProbeToken(ask=1, which=which, text=text, piece=text, log_prob=-1.0)


def began(which: int = 0, checkpoint: str = "a") -> p.ProbeBegan:
    return p.ProbeBegan(ask=1, which=which, checkpoint=checkpoint, stage="sft", form="chat", prompt_tokens=3)


def ended(which: int = 0, problem: str = "", text: str = "") -> p.ProbeEnd:
    finish = "failed" if problem else "stop"
    return p.ProbeEnd(
        ask=1,
        which=which,
        checkpoint="a",
        finish=finish,
        problem=problem,
        text=text,
        tokens=2,
        seconds=0.5,  # type: ignore[arg-type]
    )


def test_one_answer_is_its_text_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    found = show(iter([began(), token("all "), token("is"), ended(text="\ufffd")]), ASK, out)
    assert (out.getvalue(), found) == ("all is\ufffd\n", (0, ["all is\ufffd"]))
    assert show(iter([ended(problem="it is gone")]), ASK, out)[0] == 1
    assert capsys.readouterr().err == "midwatch: it is gone\n"


def test_two_answers_that_come_mixed_are_written_one_after_the_other() -> None:
    out = io.StringIO()
    mixed = [began(1, "b"), token("well", 1), began(), token("all"), token(" done", 1), ended(1), token(" is"), ended()]
    show(iter(mixed), p.ProbeAsk(ask=0, checkpoints=("a", "b"), prompt=""), out)
    figures = "2 tokens, 4.0 a second, stop"
    assert out.getvalue() == f"--- a (sft)\nall is\n--- {figures}\n--- b (sft)\nwell done\n--- {figures}\n"


def test_a_conversation_remembers_what_was_said_until_it_is_cleared() -> None:
    asked: list[p.ProbeAsk] = []
    lines = iter(
        ["hello", "/temperature 0", "//x", "/again", "/clear", "new", "/against b", "/form text", "/nothing", "/seed x", "both"]
    )

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def answer(ask: p.ProbeAsk, out: io.StringIO) -> tuple[int, list[str]]:
        asked.append(ask)
        return 0, [f"re {ask.prompt}"] * len(ask.checkpoints)

    out = io.StringIO()
    assert Talk(ASK, answer, read, out).run() == 0  # type: ignore[arg-type]
    hello = (p.ProbeTurn("user", "hello"), p.ProbeTurn("assistant", "re hello"))
    assert [each.prompt for each in asked] == ["hello", "/x", "/x", "new", "both"]
    assert [each.turns for each in asked[1:3]] == [(hello,), (hello,)], "again asks the same once more"
    assert (asked[1].temperature, asked[1].seed, asked[2].seed) == (0.0, 0, 1)
    assert asked[3].turns == ((),)
    assert (asked[4].checkpoints, asked[4].form, asked[4].turns) == (("newest", "b"), "text", ((), ()))
    assert "/against ID" in out.getvalue() and "'x' is not a number" in out.getvalue()


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A run that nothing of runs any more."""
    root, recipe = tmp_path / "run", talking_recipe()
    (root / "journal").mkdir(parents=True)
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    write_tokenizer(root)
    write_model(recipe, root, "a", "a", 10)
    write_model(recipe, root, "b", "b", 20, seed=1)
    return root


def midwatch(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "midwatch", "probe", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)  # type: ignore[call-overload, no-any-return]


def test_without_a_controller_the_process_is_asked_directly(left: Path) -> None:
    words = ("--temperature", "0", "--limit", "5", "--json", "--against", "77", "--alternatives", "3")
    done = midwatch(str(left), *words, input="the watch")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [t["checkpoint"] for t in told if t["type"] == "ProbeBegan"] == ["b"], "newest"
    assert [len(t["alternatives"]) for t in told if t["type"] == "ProbeToken"] == [3] * 5
    ends = {t["which"]: t for t in told if t["type"] == "ProbeEnd"}
    assert ends[0]["tokens"] == 5 and ends[0]["tokens_per_second"] > 0
    assert done.returncode == 1 and 'there is no checkpoint "77" (there are: a, b)' in done.stderr
    assert midwatch(str(left / "no"), "--prompt", "x").returncode == 2


def test_at_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_conversation(left: Path) -> None:
    file = left / "recipe.toml"
    file.write_text(re.sub(r"\ncontext = \d+", "\ncontext = 20000", file.read_text()))  # for an answer that takes its time
    words = ["-P", "-m", "midwatch", "probe", str(left), "--limit", "19000", "--temperature", "1"]
    terminal = pexpect.spawn(sys.executable, words, timeout=40)
    terminal.expect("Ctrl-D ends\r\n.*> ")
    terminal.send("the watxx\x7f\x7fch\r")
    terminal.expect("\n[^>]{40}")
    terminal.sendintr()
    terminal.expect_exact(" (stopped)")
    terminal.expect("> ")
    terminal.send("/limit 2\r")
    terminal.expect("> ")
    terminal.send("all\r")
    terminal.expect("all\r\n.*\n.*> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
