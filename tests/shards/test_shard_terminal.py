"""What is printed: text from others is shown and never obeyed, in every stream and encoding."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from shards.common.terminal import json_text, make_console, safe

ATTACKS = {
    "title": ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
    "clipboard": ("\x1b]52;c;bHM=\x1b\\", "\\x1b]52;c;bHM=\\x1b\\"),
    "erase": ("good\x1b[2K\x1b[1Gbad", "good\\x1b[2K\\x1b[1Gbad"),
    "C1": ("\x9b2J\x90", "\\x9b2J\\x90"),
    "overwrite": ("wrong\rright", "wrong\\rright"),
    "backspace": ("wrong\b\b\b", "wrong\\x08\\x08\\x08"),
    "right to left": ("a\u202egnp.exe", "a\\u202egnp.exe"),
    "isolate": ("\u2066a\u2069", "\\u2066a\\u2069"),
    "zero width": ("ad\u200bmin\ufeff\u2060", "ad\\u200bmin\\ufeff\\u2060"),
    "joiner among Latin letters": ("ad\u200dmin", "ad\\u200dmin"),
    "soft hyphen": ("a\xadb", "a\\xadb"),
    "tags": ("a\U000e0041", "a\\U000e0041"),
    "filler": ("a\u3164b", "a\\u3164b"),
    "separators": ("a\u2028b\u2029", "a\\u2028b\\u2029"),
    "NUL and DEL": ("\0\x7f", "\\x00\\x7f"),
    "a byte of a file name": ("caf\udce9", "caf\\xe9"),
    "a lone surrogate": ("\ud800", "\\ud800"),
    "line ends": ("a\nb\tc", "a\\nb\\tc"),
}
HARMLESS = (
    "plain",
    "naïve",
    "日本語\u3000テキスト",
    "می\u200cشود",
    "👨\u200d👩\u200d👧",
    "⚠\ufe0f",
    "a\xa0b",
    "e\u0301",
    "[bold]x[/]",
)


@pytest.mark.parametrize(("text", "shown"), ATTACKS.values(), ids=ATTACKS)
def test_what_a_terminal_obeys_or_hides_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert safe(text) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_text_of_every_script_stays(text: str) -> None:
    assert safe(text) == text and safe(text, lines=True) == text


def test_line_ends_and_tabs_stay_where_they_may() -> None:
    assert safe("a\r\nb\n\tc\rd\x1b", lines=True) == "a\nb\n\tc\\rd\\x1b"


def test_every_character_that_is_invisible_by_its_category_is_covered() -> None:
    import unicodedata

    visible = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    shown = [
        hex(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and code not in visible
        and safe(chr(code)) == chr(code)
    ]
    assert shown == []


@pytest.mark.parametrize("text", [*(text for text, _ in ATTACKS.values()), *HARMLESS])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_is_safe_too_and_reads_back_as_it_was(text: str, encoding: str) -> None:
    written = json_text({"text": text}, encoding)
    assert json.loads(written) == {"text": text}
    assert safe(written) == written
    written.encode(encoding)


def test_a_console_neither_obeys_escapes_nor_reads_markup() -> None:
    out = io.StringIO()
    console = make_console(file=out, width=200, force_terminal=True, color_system=None)
    evil = "or correct [rollout] url \x1b]0;t\x07\u202e :smile: [link=x]y[/link]"
    told = "or correct [rollout] url \\x1b]0;t\\x07\\u202e :smile: [link=x]y[/link]"
    table = Table(evil, box=None, title=evil)
    table.add_row(evil)
    table.add_row(Text(evil))
    for each in (evil, Text(evil), Text.assemble((evil, "bold")), table):
        console.print(each)
    assert out.getvalue().count(told) == 4, "of a string, and of a table's title, heading and cell; rich takes BEL out of a Text"
    assert out.getvalue().count("\\x1b]0;t") == 7
    assert "\x1b]" not in out.getvalue() and "\u202e" not in out.getvalue()


CALL = "import sys; from shards.common import terminal as t; sys.exit(t.run_command(lambda: {body}))"


def run(body: str, shell: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with this body as a command, in a shell's line where `$RUN` stands for it."""
    script = tmp_path / "call.py"
    script.write_text(CALL.format(body=body))
    places = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "RUN": f"{sys.executable} {script}"}
    return subprocess.run(["bash", "-c", shell], env={**places, **environment}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_an_encoding_without_a_character_shows_its_escape(environment: dict[str, str], tmp_path: Path) -> None:
    done = run("t.write_out('caf\\xe9 \\u20ac') or t.write_error('\\u20ac') or 0", "$RUN", tmp_path, **environment)
    assert (done.returncode, done.stdout.strip() in ("café €", "caf\\xe9 \\u20ac"), "Traceback" in done.stderr) == (0, True, False)


def test_a_full_disk_is_told_and_not_lost(tmp_path: Path) -> None:
    done = run("t.write_out('x') or 0", "$RUN > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "midwatch: standard output cannot be written: No space left on device\n")


def test_a_reader_that_goes_is_no_error_to_tell(tmp_path: Path) -> None:
    body = "[t.write_out('x' * 1000) for _ in range(1000)] and 0"
    done = run(body, "$RUN | head -1 | wc -c; exit ${PIPESTATUS[0]}", tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (1, "1001", "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_if_nobody_listened(closed: str, tmp_path: Path) -> None:
    body = "t.write_out('x') or t.write_error('y') or sys.stdin.read() or open('/dev/null').fileno() < 3 or 0"
    done = run(body, f"$RUN {closed}", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


BAR = """
import time
from shards.common.progress import ProgressReport, Screen

def work():
    with Screen() as screen:
        screen(ProgressReport("verify", 1, 10, "bytes", 1.0, None, "shards"))
        time.sleep(60)
    return 0
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_under_a_bar_shows_the_cursor_again(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "bar.py"
    script.write_text(BAR + "\nfrom shards.common.terminal import run_command\nimport sys\nsys.exit(run_command(work))\n")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={"PATH": "/usr/bin:/bin", "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(slave)
    seen = b""
    while b"verify" not in seen:
        seen += os.read(master, 1 << 16)
    process.send_signal(number)
    assert process.wait(20) == (130 if number == signal.SIGINT else 128 + number)
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while chunk := os.read(master, 1 << 16):
            seen += chunk
    os.close(master)
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l") >= 0 and b"Traceback" not in seen


def test_a_path_is_exact_in_a_pipe(tmp_path: Path) -> None:
    done = run("t.write_path('/tmp/caf\\udce9') or 0", "$RUN | od -An -c", tmp_path)
    assert "351" in done.stdout, "the byte itself"
