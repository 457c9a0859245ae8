"""The command line: help for everything, exit statuses a script can rely on, and no weight where none is needed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_desk import desk_at, make_recipe

from launcher.cli.parser import make_parser
from launcher.cli.runs import NoSuchRun, find_run, known_runs, line_of, prepare, remember
from launcher.controller import __main__ as controller
from launcher.preflight.logout import kills_at_logout
from midwatch.journal import entries as j
from midwatch.journal.journal import Journal, JournalError, read_journal
from midwatch.recipe import RecipeError
from midwatch.run_directory import RunPaths, runtime_directory
from shards.common.files import write_atomically
from tui.script import ScriptError, ScriptStep, parse_script

ROOT = Path(__file__).parents[2]
GOOD = """
[run]
name = "cli"
[model]
num_layers = 1
hidden_size = 8
num_heads = 2
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[[stage]]
name = "first"
objective = "pretrain"
steps = 5
context = 8
global_batch = 1
mixture = { text = 1.0 }
"""


def midwatch(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "midwatch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, stdin=subprocess.DEVNULL)


def leaves(parser: object = None, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and subcommand there is."""
    found = [words]
    for action in (parser or make_parser())._actions:  # type: ignore[attr-defined]
        if isinstance(action.choices, dict):
            for name, below in action.choices.items():
                found += leaves(below, (*words, name))
    return found


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args([*words, "--help"])
    assert end.value.code == 0
    assert "usage: midwatch" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['midwatch', '--help']\n"
        "try:\n    runpy.run_module('midwatch', run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'textual', 'rich', 'numpy', 'websockets', 'asyncio', 'shtab', 'psutil'}\n"
        "found = sorted(heavy & set(sys.modules))\n"
        "print(found, file=sys.stderr)\nsys.exit(bool(found))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "good.toml"
    file.write_text(GOOD)
    return file


def test_a_bad_recipe_ends_with_2_before_anything_is_made(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(GOOD.replace("steps = 5", "steps = 0"))
    done = midwatch("run", str(bad), "--headless", "--dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert f"{bad}:15: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "nowhere.toml"), "no such recipe"),
        (("check", "nowhere.toml"), "no such recipe"),
        (("status", "nobody"), "neither a run directory nor the name of a run"),
        (("pause", "nobody"), "neither a run directory nor the name of a run"),
        (("attach", "nobody"), "neither a run directory nor the name of a run"),
        (("logs", "nobody"), "neither a run directory nor the name of a run"),
        (("status",), "there is no run yet"),
        (("run", "good.toml", "--headless", "--script", "pause"), "does not begin with a step"),
        (("run", "good.toml", "--headless", "--script", "5: dance"), "dance"),
        (("run", "good.toml", "--headless", "--script", ";"), "it is empty"),
        (("set", "run", "lr"), "set: VALUE is missing (usage: midwatch set RUN KEY VALUE)"),
        (("rollback", "run", "golden", "--skip", "-3"), "skip: -3 must be at least 0 (usage: midwatch rollback RUN ID"),
        (("set", "run", "lr", "much"), "'much' is not a number"),
        (("dance",), "invalid choice"),
        ((), "usage"),
    ],
)
def test_wrong_arguments_end_with_2_and_say_why(words: tuple[str, ...], says: str, tmp_path: Path, recipe: Path) -> None:
    done = midwatch(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_good_recipe_checks(recipe: Path) -> None:
    done = midwatch("check", str(recipe))
    assert (done.returncode, done.stdout) == (0, f"{recipe}: good (1 stage, 5 steps)\n")


def test_a_run_directory_that_is_taken_is_not_written_into(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        prepare(recipe, tmp_path / "run")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_source_that_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(GOOD.replace('origin = "stdlib-topics"', 'origin = "text"\npath = "none/*.txt"'))
    with pytest.raises(RecipeError, match=r'source "text": there is nothing at .*none'):
        prepare(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_of_a_name_get_directories_of_their_own(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [prepare(recipe, None).root.name for _ in range(3)] == ["cli", "cli-2", "cli-3"]
    assert sorted(r.name for r in known_runs()) == ["cli", "cli-2", "cli-3"]
    assert find_run("cli-2") == tmp_path / "runs" / "cli-2"


def test_ps_lists_runs_as_json_even_where_one_cannot_be_read(tmp_path: Path, recipe: Path) -> None:
    good, broken, gone = (prepare(recipe, tmp_path / name) for name in ("good", "broken", "gone"))
    (gone.recipe).unlink()
    (broken.journal / "000001.log").mkdir()
    done = midwatch("ps", "--json")
    assert done.returncode == 0, done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert set(lines) == {"good", "broken"}
    assert lines["good"]["controller"] is False
    assert "cannot be read" in lines["broken"]["state"]
    assert midwatch("ps").returncode == 0
    assert good.root == tmp_path / "good"


def test_status_and_logs_need_no_controller(tmp_path: Path, recipe: Path) -> None:
    paths = prepare(recipe, tmp_path / "run")
    (paths.logs / "node").mkdir()
    (paths.logs / "node" / "0.log").write_text("alpha\nbeta\n")
    done = midwatch("status", str(paths.root), "--json")
    said = json.loads(done.stdout)
    assert (said["run"], said["state"], said["step"], said["stage"], said["archived"]) == ("cli", "building", 0, "data", True)
    assert "no controller has run yet" in said["reason"]
    assert midwatch("logs", str(paths.root), "--list").stdout == "node/0.log\n"
    assert midwatch("logs", "run", "--grep", "^b").stdout == "beta\n"
    assert midwatch("logs", "run", "-n", "1").stdout == "beta\n"
    for words, says in [(("--grep", "("), "--grep"), (("--file", "../recipe.toml"), "there is no log")]:
        bad = midwatch("logs", "run", *words)
        assert bad.returncode == 2
        assert says in bad.stderr and "Traceback" not in bad.stderr


def test_a_command_for_a_run_that_has_not_begun_is_refused_and_begins_nothing(tmp_path: Path, recipe: Path) -> None:
    paths = prepare(recipe, tmp_path / "run")
    done = midwatch("pause", str(paths.root))
    assert done.returncode == 1
    assert "midwatch attach starts one" in done.stderr
    assert list(paths.journal.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_the_shell(shell: str) -> None:
    done = midwatch("completion", shell)
    assert done.returncode == 0
    assert "rollback" in done.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    shell = f"{sys.executable} -P -m midwatch completion bash | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


# A whole controller process


def test_a_signal_ends_the_controller_and_not_the_run(tmp_path: Path, recipe: Path) -> None:
    """A real process over a run that has failed: it leaves its socket and lock in order."""
    paths = prepare(recipe, tmp_path / "run")
    journal = Journal(paths.journal, 1.0, "h", 1)
    journal.append(j.RunBegan(time=1.0, name="cli", recipe="x"), j.StateChanged(time=1.0, state="failed", reason="by a test"))
    journal.close()
    refused = midwatch("checkpoint", str(paths.root))
    assert refused.returncode == 1 and "no ranks are alive" in refused.stdout, refused
    done = midwatch("journal", str(paths.root), "--json")
    assert done.returncode == 0, done.stderr
    assert "term 2 began on " + os.uname().nodename in [json.loads(line)["text"] for line in done.stdout.splitlines()]
    pid = json.loads(paths.address.read_text())["pid"]
    os.kill(pid, signal.SIGTERM)
    for _ in range(200):
        if not line_of(paths.root).controller:
            break
        subprocess.run(["sleep", "0.05"])
    assert not line_of(paths.root).controller
    assert line_of(paths.root).state == "failed"
    assert not list(runtime_directory().glob("*.sock"))


async def test_a_run_on_a_full_disk_trains_on_and_journals_what_it_owes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of 600 KiB that somebody fills: the ballast carries the journal, and nothing is forgotten."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        async with desk_at(disk / "run", monkeypatch, "training", make_recipe()) as desk:
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            for number in range(20):
                desk.context.note("info", f"{number}" + "y" * 4000)
            assert (await given(desk)).state == "sent", "the ballast has made room"
            for number in range(20, 120):
                desk.context.note("info", f"{number}" + "y" * 4000)
            with pytest.raises(JournalError):
                desk.give("checkpoint")
            filler.unlink()
            desk.context.retry_backlog()
            desk.give("checkpoint")
        notes = [e.text.rstrip("y") for _, e in read_journal(disk / "run" / "journal").entries if isinstance(e, j.Noted)]
        assert [n for n in notes if n.isdigit()] == [str(n) for n in range(120)]
        assert read_journal(disk / "run" / "journal").damaged == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


async def given(desk: object) -> object:
    view = desk.give("pause")  # type: ignore[attr-defined]
    await desk.until(lambda: desk.orders)  # type: ignore[attr-defined]
    return desk.view(view)  # type: ignore[attr-defined]


def test_the_controller_says_in_its_log_why_it_cannot_begin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.create()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launcher.controller", str(paths.root)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "there is no such recipe" in done.stderr and "Traceback" not in done.stderr
    assert controller.LINGER_SECONDS > 0


# Places


def test_the_runtime_directory_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = runtime_directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)
    with pytest.raises(PermissionError, match="chmod 700"):
        runtime_directory()


def test_a_relative_runtime_directory_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "here")
    assert runtime_directory() == Path(f"/tmp/midwatch-{os.getuid()}"), "a controller has another working directory"


@pytest.mark.parametrize("home", [None, "", "relative", "/proc/no/home"])
def test_without_a_home_runs_are_remembered_beside_the_sockets(
    home: str | None, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    made = prepare(recipe, tmp_path / "run")
    assert find_run("run") == made.root and known_runs() == [made.root]
    assert {p for p in set(tmp_path.rglob("*")) - before if "cache" in p.name} == set(), "none in the working directory"
    assert list((runtime_directory() / "cache" / "runs").iterdir())


def test_a_home_that_is_not_known_is_told_of(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + '[tokenizer]\npath = "~nobody-of-that-name/t.model"\n')
    done = midwatch("check", str(recipe))
    assert done.returncode == 2 and "~nobody-of-that-name/t.model: there is no such home directory" in done.stderr


def test_a_directory_whose_name_is_not_utf8_is_told_of_before_anything_is_made(recipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "caf\udce9"
    done = midwatch("run", str(recipe), "--dir", str(place), "--headless")
    assert (done.returncode, place.exists()) == (2, False)
    assert "caf\\xe9: holds a file name that is not UTF-8; rename" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["ps"], ["ps", "--json"], ["check", "RECIPE"], ["run", "--help"], ["--version"]], ids=" ".join)
def test_a_full_disk_under_any_command_is_a_plain_reason(words: list[str], recipe: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-m", "midwatch", *(str(recipe) if word == "RECIPE" else word for word in words)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "midwatch: standard output cannot be written: No space left on device\n")


def test_arguments_are_quoted_safely_in_errors() -> None:
    bad_option = ["logs", "--nosuch\u202e"]
    for words in (["\x1b]0;t\x07"], ["status", "\x1b[2J"], bad_option, ["check", "r\x1b[2J.toml"], ["set", "r", "k", "\x1b"]):
        done = midwatch(*words)
        assert done.returncode == 2 and "\\" in done.stderr
        assert not {"\x1b", "\x07", "\u202e"} & set(done.stderr), done.stderr


def test_logs_are_shown_and_not_obeyed(recipe: Path, tmp_path: Path) -> None:
    paths = prepare(recipe, tmp_path / "run")
    (paths.logs / "n").mkdir()
    (paths.logs / "n" / "0.log").write_bytes(b"\x1b[31mred\x1b[0m \x1b]52;c;bHM=\x07 wrong\rright \xe9\n")
    done = midwatch("logs", str(paths.root), "--file", "n/0.log")
    assert done.stdout == "red \\x1b]52;c;bHM=\\x07 wrong\nright \ufffd\n"


def test_writing_atomically_leaves_the_old_or_the_new_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d" / "f"
    write_atomically(file, b"old")

    def fails(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no"):
        write_atomically(file, b"new")
    assert [f.read_bytes() for f in (tmp_path / "d").iterdir()] == [b"old"]


def test_a_note_that_cannot_be_read_hides_no_other_run(tmp_path: Path, recipe: Path) -> None:
    paths = prepare(recipe, tmp_path / "run")
    notes = Path(os.environ["XDG_CACHE_HOME"]) / "midwatch" / "runs"
    (notes / "0000").mkdir()
    (notes / "0001").write_bytes(b"\xff\xfe")
    remember(paths.root)
    assert known_runs() == [paths.root]
    with pytest.raises(NoSuchRun, match="runs: run"):
        find_run("other")


def test_killing_at_logout_is_seen_in_logind_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    monkeypatch.setenv("LOGNAME", "ann")
    assert not kills_at_logout(tmp_path)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf.d").mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text("[Login]\n#KillUserProcesses=no\n")
    assert not kills_at_logout(tmp_path)
    (tmp_path / "etc/systemd/logind.conf.d/x.conf").write_text("[Login]\nKillUserProcesses=yes\n")
    assert kills_at_logout(tmp_path)
    (tmp_path / "var/lib/systemd/linger").mkdir(parents=True)
    (tmp_path / "var/lib/systemd/linger/ann").touch()
    assert not kills_at_logout(tmp_path)


# Scripts


def test_a_script_is_read_as_it_is_typed() -> None:
    text = (
        "20: checkpoint, golden; 30: pause; 32: resume; 40: rollback golden --skip 5; "
        "50: set lr 1e-4; 60: advance --to dpo; 70: stop --now"
    )
    entries = parse_script(text)
    assert [e.step for e in entries] == [20, 30, 32, 40, 50, 60, 70]
    assert entries[0] == ScriptStep(20, (("checkpoint", {}), ("golden", {"checkpoint": "latest"})), "20: checkpoint, golden")
    assert entries[3].commands == (("rollback", {"checkpoint": "golden", "skip": 5}),)
    assert entries[4].commands == (("set", {"key": "lr", "value": 1e-4}),)
    assert [e.commands[0] for e in entries[5:]] == [("advance", {"to": "dpo"}), ("stop-now", {})]


@pytest.mark.parametrize(
    "text", ["", "x: pause", "5 pause", "5:", "-3: pause", "5: rollback", "5: set lr", "5: set lr x", "5: 'pause", "5: -h"]
)
def test_a_script_that_cannot_be_understood_names_the_entry(text: str) -> None:
    with pytest.raises(ScriptError):
        parse_script(text)
