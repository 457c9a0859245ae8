"""What the journal has acknowledged stays; who is ousted counts no more; a full disk leaves nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from midwatch.journal import entries as j
from midwatch.journal import journal as journal_module
from midwatch.journal.journal import Journal, JournalContents, JournalError, Ousted, read_journal


def opened(directory: Path, now: float = 1.0) -> Journal:
    return Journal(directory, now, "host", os.getpid())


def noted(text: str) -> j.Noted:
    return j.Noted(time=2.0, level="info", text=text)


def texts(directory: Path) -> list[str]:
    return [e.text for _, e in read_journal(directory).entries if isinstance(e, j.Noted)]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    directory = tmp_path / "journal"
    directory.mkdir()
    return directory


def test_what_was_appended_is_read_again_by_the_next_term(room: Path) -> None:
    first = opened(room)
    first.append(noted("one"), noted("two"))
    first.close()
    second = opened(room)
    second.append(noted("three"))
    assert (first.term, second.term) == (1, 2)
    assert texts(room) == ["one", "two", "three"]
    assert [t for t, e in second.entries if isinstance(e, j.TermBegan)] == [1, 2]


def test_a_torn_tail_is_left_out_and_no_damage(room: Path) -> None:
    journal = opened(room)
    journal.append(noted("whole"))
    journal.close()
    file = room / "000001.log"
    whole = file.read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    for cut in range(len(line)):
        file.write_bytes(whole + line[:cut])
        reading = read_journal(room)
        assert reading.damaged == []
        assert reading.lengths["000001.log"] == len(whole)
    assert texts(room) == ["whole"]


def test_a_flipped_bit_is_reported_and_its_entry_alone_passed_over(room: Path) -> None:
    journal = opened(room)
    journal.append(noted("one"), noted("two"), noted("three"))
    journal.close()
    file = room / "000001.log"
    content = file.read_bytes()
    begin = content.index(b"two") - 30
    for place in range(begin, begin + 40):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            reading = read_journal(room)
            found = [e.text for _, e in reading.entries if isinstance(e, j.Noted)]
            assert found[0] == "one" and found[-1] == "three" and "two" not in found
            assert reading.damaged and all("000001.log" in d for d in reading.damaged)


def test_a_term_is_claimed_by_one_of_two_at_once(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, real = threading.Barrier(2), os.open

    def together(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_EXCL:
            barrier.wait(10)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", together)
    outcomes: list[object] = []

    def claim() -> None:
        try:
            outcomes.append(opened(room).term)
        except JournalError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["1", str(Ousted)]


def test_an_ousted_controller_cannot_append(room: Path) -> None:
    first, second = opened(room), opened(room)
    with pytest.raises(Ousted):
        first.append(noted("too late"))
    second.append(noted("in office"))
    assert texts(room) == ["in office"]


def test_what_an_ousted_controller_still_writes_does_not_count(room: Path) -> None:
    first = opened(room)
    first.append(noted("before"))
    opened(room).append(noted("after"))
    with (room / "000001.log").open("ab") as file:
        file.write(journal_module._line(noted("ghost")))
    assert texts(room) == ["before", "after"]
    opened(room)
    assert texts(room) == ["before", "after"]


def test_an_entry_whose_append_returned_is_the_next_terms_too_wherever_the_takeover_falls(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old controller writes at the worst moment, while the new one reads: it is ousted, or its entry counts."""
    first, real = opened(room), read_journal
    returned = []

    def reading(directory: Path, newest_term: int = 0) -> JournalContents:
        found = real(directory, newest_term)
        try:
            first.append(noted("at the worst moment"))
            returned.append(True)
        except Ousted:
            returned.append(False)
        return found

    monkeypatch.setattr(journal_module, "read_journal", reading)
    second = opened(room)
    counted = any(isinstance(e, j.Noted) for _, e in second.entries)
    assert returned == [counted]


def test_a_takeover_during_an_append_is_noticed_by_the_append(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, real = opened(room), os.fsync

    def syncing(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        (room / "000002.log").touch()
        real(handle)

    monkeypatch.setattr(os, "fsync", syncing)
    with pytest.raises(Ousted):
        first.append(noted("perhaps not read by the next one"))


SMALL_FILES = """
import os, resource, signal, sys
from pathlib import Path
from midwatch.journal import entries as j
from midwatch.journal.journal import Journal, JournalError

def noted(text):
    return j.Noted(time=2.0, level="info", text=text)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
log = Path(sys.argv[1]) / "000001.log"
journal = Journal(log.parent, 1.0, "host", os.getpid())
journal.append(noted("fits"))
size = log.stat().st_size
try:
    journal.append(noted("small"), noted("x" * 5000))
except JournalError:
    assert log.stat().st_size == size, "something half-written stayed"
else:
    raise AssertionError("the write went through")
journal.append(noted("fits again"))
assert [e.text for _, e in journal.entries if isinstance(e, j.Noted)] == ["fits", "fits again"]
"""


def test_a_write_that_fails_in_the_middle_leaves_nothing_half_written(room: Path) -> None:
    """No file may grow beyond 4 KiB: what a full disk does to a write, in the middle of it too.

    In a process of its own, as the limit would hold for whatever file the tests' own output goes to as well.
    """
    done = subprocess.run([sys.executable, "-c", SMALL_FILES, str(room)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert texts(room) == ["fits", "fits again"]


def test_a_journal_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="nowhere"):
        opened(tmp_path / "nowhere")


WRITER = """
import os, sys
from pathlib import Path
from midwatch.journal import entries as j
from midwatch.journal.journal import Journal
journal = Journal(Path(sys.argv[1]), 1.0, "host", os.getpid())
for number in range(100_000):
    journal.append(j.Noted(time=1.0, level="info", text=f"{journal.term}/{number}/" + "x" * (number % 997)))
    os.write(1, f"{journal.term}/{number}\\n".encode())
"""


def test_kill_9_in_the_middle_of_writing_loses_nothing_acknowledged(room: Path) -> None:
    acknowledged: list[str] = []
    for least in (1, 5, 20, 50, 90, 140):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(room)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(least):
            acknowledged.append(writer.stdout.readline().strip())
        writer.kill()
        acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
        writer.stdout.close()
        writer.wait()
    found = [text.rsplit("/", 1)[0] for text in texts(room)]
    assert read_journal(room).damaged == []
    assert [text for text in found if text in set(acknowledged)] == acknowledged
    assert len(found) <= len(acknowledged) + 6
