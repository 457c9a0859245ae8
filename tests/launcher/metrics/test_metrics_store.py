"""What is acknowledged stays: through kills, torn tails, resends, and the loss of the index."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from launcher.metrics.chunks import MetricChunkWriter, MetricFrame, StepMetrics, encode, read_frames
from launcher.metrics.dedup import NumberRanges
from launcher.metrics.store import MEMORY, MetricStore, usable_index
from midwatch.metrics.m4_columns import LineageSegment

PATH = [LineageSegment(0, -1, None)]


def frame(number: int, source: str = "rank0", step: int | None = None, value: float | None = None) -> MetricFrame:
    step = number if step is None else step
    return MetricFrame(source, number, [StepMetrics(0, step, step, float(step), {"loss": float(step) if value is None else value})])


def opened(folder: Path, term: int | None = None) -> MetricStore:
    return MetricStore.open(folder / "metrics", folder / "index.sqlite", term)


def steps(store: MetricStore) -> list[int]:
    found: list[int] = store.rows("loss", PATH, 0, 1 << 40, 1 << 40)["step"].tolist()
    return found


def written(folder: Path, count: int, term: int = 1) -> None:
    store = opened(folder, term)
    for number in range(count):
        store.add(frame(number))
    store.close()


@pytest.mark.parametrize("harm", ["delete", "scribble", "empty file", "not a database", "torn block", "drop a table"])
def test_the_index_is_rebuilt_from_the_chunks(tmp_path: Path, harm: str) -> None:
    written(tmp_path, 3_000)
    index = tmp_path / "index.sqlite"
    if harm == "delete":
        index.unlink()
    elif harm == "scribble":
        with index.open("r+b") as file:
            file.seek(4_096)
            file.write(os.urandom(index.stat().st_size - 4_096))
    elif harm == "empty file":
        index.write_bytes(b"")
    elif harm == "not a database":
        index.write_bytes(b"not a database at all" * 1_000)
    else:
        import sqlite3

        statement = "UPDATE block SET data = substr(data, 1, 40)" if harm == "torn block" else "DROP TABLE block"
        with sqlite3.connect(index) as connection:
            connection.execute(statement)
    store = opened(tmp_path)
    assert steps(store) == list(range(3_000))
    assert store.columns("loss", PATH, 0, 3_000, 10).count.sum() == 3_000
    store.close()


def test_an_index_behind_its_chunks_catches_up(tmp_path: Path) -> None:
    written(tmp_path, 100)
    writer = MetricChunkWriter(tmp_path / "metrics", 2)  # a controller that died before its first flush
    for number in range(90, 150):
        writer.append(frame(number))
    writer.close()
    store = opened(tmp_path, 3)
    assert steps(store) == list(range(150))
    assert not store.add(frame(149))
    assert store.add(frame(150))
    store.close()


def test_an_index_of_other_chunks_is_not_believed(tmp_path: Path) -> None:
    written(tmp_path, 100)
    (tmp_path / "metrics" / "000001.chunk").unlink()
    written_elsewhere = MetricChunkWriter(tmp_path / "metrics", 1)
    for number in range(200):
        written_elsewhere.append(frame(number, value=5.0))
    written_elsewhere.close()
    store = opened(tmp_path)
    assert set(store.rows("loss", PATH, 0, 1_000, 1_000)["value"]) == {5.0}
    (tmp_path / "metrics" / "000001.chunk").unlink()
    assert steps(opened(tmp_path)) == []


def test_a_term_has_one_chunk_and_one_writer(tmp_path: Path) -> None:
    opened(tmp_path, 1)
    with pytest.raises(FileExistsError):
        opened(tmp_path, 1)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 20])
def test_a_torn_tail_is_ignored(tmp_path: Path, cut: int) -> None:
    written(tmp_path, 10)
    chunk = tmp_path / "metrics" / "000001.chunk"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole + encode(frame(10))[:cut])
    assert [f.number for f, _ in read_frames(chunk)] == list(range(10))
    chunk.write_bytes(whole + b"\xff" * 64)
    assert [f.number for f, _ in read_frames(chunk)] == list(range(10))
    assert steps(opened(tmp_path)) == list(range(10))


def test_a_resend_changes_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path, 1)
    assert store.add(frame(1, value=1.0))
    assert not store.add(frame(1, value=2.0))
    assert store.add(frame(2, source="rank1", step=1, value=3.0))  # the same row from another source: the first stays
    assert store.add(frame(5, step=5)) and store.add(frame(4, step=4))  # out of order, across a gap
    store.flush()
    assert store.add(frame(3, source="rank1", step=5, value=9.0))
    assert store.rows("loss", PATH, 0, 9, 9)["value"].tolist() == [1.0, 4.0, 5.0]
    store.close()
    again = opened(tmp_path, 2)
    assert not any(again.add(frame(number)) for number in (1, 4, 5))


def test_seen_numbers_are_exact_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    seen, reference = NumberRanges(), set()
    for number in rng.integers(0, 500, 3_000).tolist():
        assert seen.add(number) == (number not in reference)
        reference.add(number)
        assert number in seen and (number + 1 in seen) == (number + 1 in reference)
    assert sum(end - start + 1 for start, end in seen.ranges) == len(reference)


WRITER = """
import sys
from pathlib import Path
from launcher.metrics.chunks import MetricFrame, MetricRow
from launcher.metrics.store import MEMORY, MetricStore, usable_index
import launcher.metrics.store as module
module.FLUSH_VALUES = 500
folder = Path(sys.argv[1])
store = MetricStore.open(folder / "metrics", folder / "index.sqlite", int(sys.argv[2]))
number = int(sys.argv[3])
while True:
    store.add(MetricFrame("rank0", number, [MetricRow(0, number, number, 0.0, {"loss": float(number)})]))
    if number % 10 == 9:
        store.sync()
        print(number, flush=True)
    number += 1
"""


def test_kill_9_in_the_middle_of_writing_loses_nothing_acknowledged(tmp_path: Path) -> None:
    acknowledged = -1
    for term in range(1, 5):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(term), str(acknowledged + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        target = acknowledged + 300 * term + 137
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged >= target:
                break
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1] if line)])
        process.wait()
        process.stdout.close()
    store = opened(tmp_path)
    found = steps(store)
    assert found[: acknowledged + 1] == list(range(acknowledged + 1))
    columns = store.columns("loss", PATH, 0, acknowledged + 1, 5)
    rows = store.rows("loss", PATH, 0, columns.grid.stop, 1 << 40)
    assert columns.sum.sum() == rows["value"].sum()


def test_an_index_that_cannot_be_written_falls_behind_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path, 1)
    for number in range(100):
        store.add(frame(number))
    store.flush()
    size = store._database._connection.execute("PRAGMA page_count").fetchone()[0]
    store._database._connection.execute(f"PRAGMA max_page_count = {size}")
    for number in range(100, 20_000):
        assert store.add(frame(number))
    store.flush()  # fails: the disk is full
    assert steps(store) == list(range(100))
    assert store.add(frame(20_000))
    store._database._connection.execute("PRAGMA max_page_count = 1000000")
    store.flush()
    assert steps(store) == list(range(20_001))
    store.close()


def test_queries_from_threads_while_rows_come_in(tmp_path: Path) -> None:
    store = opened(tmp_path, 1)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(100):
                columns = store.columns("loss", PATH, 0, 2_000, 50)
                assert columns.count.max() <= columns.grid.column_width
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, name=f"ask-{number}") for number in range(2)]
    for thread in threads:
        thread.start()
    for number in range(2_000):
        store.add(frame(number))
        if number % 100 == 0:
            store.flush()
    for thread in threads:
        thread.join()
    assert not failures
    assert steps(store) == list(range(2_000))
    store.close()


def test_a_negative_step_is_refused_by_name(tmp_path: Path) -> None:
    store = opened(tmp_path, 1)
    with pytest.raises(ValueError, match="rank0/3: a step is negative"):
        store.add(frame(3, step=-1))


def test_an_index_is_kept_where_it_can_be_and_else_in_memory(tmp_path: Path) -> None:
    missing, damaged, good = Path("/proc/none/a.sqlite"), tmp_path / "b.sqlite", tmp_path / "c" / "c.sqlite"
    damaged.write_bytes(b"no database" * 1000)
    assert usable_index([missing, good]) == good
    assert usable_index([missing, damaged, good]) == damaged, "it is rebuilt"
    assert usable_index([missing]) == usable_index([]) == MEMORY


def test_an_index_in_memory_answers_as_one_on_disk_does(tmp_path: Path) -> None:
    with contextlib.closing(MetricStore.open(tmp_path / "metrics", MEMORY, 1)) as metrics:
        metrics.add(frame(1, step=1))
        metrics.flush()
        assert metrics.last("loss", 5) and not list(Path().glob(":memory:*"))
