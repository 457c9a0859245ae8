"""Building: from real and broken sources, through kills, to the same bytes; and what the program says and returns."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zstandard

from shards.build.build import build
from shards.build.marker import build_key, conflict, is_built
from shards.common.errors import ShardError, SpecError
from shards.format import manifest
from shards.format.corpus import Corpus
from shards.readers import splits as splitting
from shards.readers.sources import ReadPosition, Rejected, is_held_out
from shards.spec import Build, Source, TokenizerSpec, decode_build
from shards.tokenization.encode import Workers
from shards.tokenization.records import Document
from shards.tokenization.tokenizer import Tokenizer as Loaded

CODE = (Source(name="code", kind="text", origin="stdlib-code", max_documents=60),)
SMALL = TokenizerSpec(vocab=400, sample_bytes=50_000)


def tree(root: Path) -> dict[str, bytes]:
    """All that a build leaves, but the locks and the marker's own path."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files["build.json"] = json.dumps({**json.loads(files["build.json"]), "spec": None}).encode()
    return files


def write_lines(path: Path, records: list[Any]) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def texts(root: Path, source: str, split: str = "train") -> list[str]:
    corpus, tokenizer = Corpus(root, source, split), Loaded.load(root / "tokenizer.model")
    spans = [corpus.span(document) for document in range(corpus.documents)]
    return [tokenizer.decode(corpus.read(*span)) for span in spans]


def documents(count: int) -> list[dict[str, str]]:
    return [{"text": f"Document {number} speaks of {number * 7919 % 1000} things."} for number in range(count)]


def spec_file(path: Path, spec: Build) -> Path:
    path.write_bytes(msgspec.json.encode(spec))
    return path


def command(spec: Path, *more: str, **options: Any) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "shards", "build", "--spec", str(spec), *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_the_number_of_workers_does_not_change_a_byte(built: Path, tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    out = build(make_spec(tmp_path / "two"), workers=2)
    for path in built.rglob("pack-*"):
        path.unlink()
    assert tree(out) == tree(built)


def test_what_is_built_is_whole_and_its_documents_come_back(built: Path) -> None:
    from shards.readers import stdlib

    for name in ("code", "topics", "chat", "pairs"):
        for split in manifest.SPLITS:
            assert list(manifest.verify(built / name / split)) == []
    library = {path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n") for _, path in stdlib.files()}
    assert set(texts(built, "code")) | set(texts(built, "code", "held_out")) <= library


def test_nothing_is_held_out_and_trained_on(built: Path) -> None:
    for name in ("code", "topics", "chat", "pairs"):
        train, held = texts(built, name), texts(built, name, "held_out")
        assert len(held) >= 4 and not set(train) & set(held)


def test_the_librarys_files_are_held_out_from_all_sources_at_once(built: Path) -> None:
    """Else a held-out function's docstring would be trained on as code."""
    from shards.readers import stdlib

    trained = {answer for key, (_, answer) in stdlib.questions(lambda key: not is_held_out(key, 0.1, 0))}
    held = {answer for key, (_, answer) in stdlib.questions(lambda key: is_held_out(key, 0.1, 0))}
    said = texts(built, "chat", "held_out")
    code = "\n".join(texts(built, "code"))
    only_held = [answer for answer in held - trained if any(text.endswith(answer) for text in said)]
    assert len(only_held) > 5
    assert not [answer for answer in only_held if answer in code]


def test_limits_count_documents_and_tokens(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    source = Source(name="code", kind="text", origin="stdlib-code", max_documents=30, max_tokens=20_000)
    out = build(make_spec(tmp_path / "o", source=(source,), tokenizer=SMALL, held_out=0.1), workers=0)
    train, held = (manifest.load(out / "code" / split) for split in manifest.SPLITS)
    assert train.tokens <= 18_000 and train.documents <= 27 and held.documents <= 3
    documented = Source(name="code", kind="text", origin="stdlib-code", max_documents=30)
    out = build(make_spec(tmp_path / "p", source=(documented,), tokenizer=SMALL, held_out=0.1), workers=0)
    assert [manifest.load(out / "code" / split).documents for split in manifest.SPLITS] == [27, 3]


def test_broken_records_are_counted_by_reason_kept_aside_and_never_end_a_build(
    tmp_path: Path, make_spec: Callable[..., Build]
) -> None:
    broken = [
        b"{not json", b'{"text": "cut', b"[1, 2]", b'"text"', b'{"other": "x"}', b'{"text": 5}', b'{"text": null}',
        b'{"text": ""}', b'{"text": "  \\n "}', b'{"text": "bad \xff\xfe utf-8"}', b"\x00\x01\x02", b"[" * 100_000,
    ]  # fmt: skip
    good = documents(50)
    path = write_lines(tmp_path / "d.jsonl", [*good[:20], *broken, b"", *good[20:]])
    source = Source(name="own", kind="text", origin="jsonl", path=str(path))
    out = build(make_spec(tmp_path / "o", source=(source,), tokenizer=TokenizerSpec(vocab=330)), workers=0)
    assert sorted(texts(out, "own") + texts(out, "own", "held_out")) == sorted(record["text"] for record in good)
    rejected = manifest.load(out / "own/train").rejected
    assert sum(rejected.values()) == len(broken)
    assert rejected["empty"] == 2 and rejected["not an object"] == 2 and rejected['no field "text"'] == 1
    assert rejected['field "text" is not a string'] == 2 and rejected["not UTF-8"] >= 1
    kept = [json.loads(line) for line in (out / "own/rejected.jsonl").read_text().splitlines()]
    assert len(kept) == len(broken)
    assert kept[0]["where"] == f"{path}:21" and kept[0]["record"].startswith("{not json")


def test_sources_from_directories_globs_and_compressed_files(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    lines = [json.dumps(record).encode() + b"\n" for record in documents(40)]
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(lines[:10]))
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[10:20])))
    frames = [zstandard.compress(b"".join(lines[20:25])), zstandard.compress(b"".join(lines[25:30]))]
    (tmp_path / "in/deep/c.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "in/cut.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[30:]))[:-12])
    (tmp_path / "in/ignored.csv").write_text("a,b")
    (tmp_path / "in/note.md").write_text("# A note\n\nOf a few words.\n")
    (tmp_path / "in/deep/bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "in/empty.txt").write_bytes(b"")
    sources = (
        Source(name="lines", kind="text", origin="jsonl", path=str(tmp_path / "in"), broken_files=0.25),
        Source(name="files", kind="text", origin="text", path=str(tmp_path / "in/**/*.*t*")),
        Source(name="one", kind="text", origin="text", path=str(tmp_path / "in/note.md")),
    )
    out = build(make_spec(tmp_path / "o", source=sources, tokenizer=TokenizerSpec(vocab=330), held_out=0), workers=0)
    read = set(texts(out, "lines"))
    assert {record["text"] for record in documents(30)} <= read
    assert manifest.load(out / "lines/train").rejected == {"damaged file, read up to the damage": 1}
    assert manifest.load(out / "files/train").rejected == {"not UTF-8 but UTF-16 (convert it with iconv)": 1}
    assert texts(out, "one") == ["# A note\n\nOf a few words.\n"]


def test_own_conversations_and_preferences_use_the_named_fields(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    records = [{"q": f"Is {n} even?", "good": "Yes." * (n % 3 + 1), "bad": "No, it is odd."} for n in range(30)]
    path = write_lines(tmp_path / "d.jsonl", records)
    fields = {"path": str(path), "origin": "jsonl", "prompt_field": "q"}
    sources = (
        Source(name="chat", kind="sft", response_field="good", **fields),
        Source(name="pairs", kind="preference", chosen_field="good", rejected_field="bad", **fields),
    )
    out = build(make_spec(tmp_path / "o", source=sources, tokenizer=TokenizerSpec(vocab=330)), workers=0)
    tokenizer = Loaded.load(out / "tokenizer.model")
    corpus = Corpus(out, "pairs", "train")
    ids, parts = corpus.read(*corpus.span(2)), corpus.read(*corpus.span(2), "mask")
    shown = [tokenizer.decode(ids[parts == part], reserved=True) for part in range(3)]
    assert shown[0].endswith("even?<|assistant|>") and shown[1].startswith("Yes.") and shown[2] == "No, it is odd.[EOS]"
    held = [set(texts(out, name, "held_out")) for name in ("chat", "pairs")]
    assert {text.split("?")[0] for text in held[0]} == {text.split("?")[0] for text in held[1]}  # by prompt, in both


def test_copies_of_a_document_are_all_trained_on_or_all_held_out(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    path = write_lines(tmp_path / "d.jsonl", documents(60) * 3)
    source = Source(name="own", kind="text", origin="jsonl", path=str(path))
    out = build(make_spec(tmp_path / "o", source=(source,), tokenizer=TokenizerSpec(vocab=330), held_out=0.2), workers=0)
    train, held = texts(out, "own"), texts(out, "own", "held_out")
    assert len(train) + len(held) == 180 and held and not set(train) & set(held)


def test_a_full_disk_is_one_line_and_the_build_goes_on_when_there_is_room(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    """The disk is a limit on the size of files, which fails a write the same way."""
    spec = spec_file(tmp_path / "spec.json", make_spec(tmp_path / "o", source=CODE, tokenizer=SMALL))
    build_it = f"{sys.executable} -m shards build --json --workers 0 --spec {spec}"
    done = subprocess.run(["bash", "-c", f"ulimit -f 40; {build_it}"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "free some space" in done.stderr
    assert subprocess.run(["bash", "-c", build_it], capture_output=True).returncode == 0
    assert list(manifest.verify(tmp_path / "o/code/train")) == []


def test_even_a_small_source_holds_something_out(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    path = write_lines(tmp_path / "d.jsonl", documents(5))
    source = Source(name="own", kind="text", origin="jsonl", path=str(path))
    out = build(make_spec(tmp_path / "o", source=(source,), tokenizer=TokenizerSpec(vocab=330), held_out=0.0001), workers=0)
    assert len(texts(out, "own")) == 4 and len(texts(out, "own", "held_out")) == 1


def test_one_document_of_megabytes_in_one_line_comes_back(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("abcdefgh ") for _ in range(2_000_000))
    path = write_lines(tmp_path / "d.jsonl", [*documents(5), {"text": text}])
    source = Source(name="own", kind="text", origin="jsonl", path=str(path))
    spec = make_spec(tmp_path / "o", source=(source,), tokenizer=TokenizerSpec(vocab=330, sample_bytes=10_000), held_out=0)
    out = build(spec, workers=1)
    assert texts(out, "own")[-1] == text
    assert list(manifest.verify(out / "own/train")) == []


def test_a_built_directory_is_known_at_once_and_left_alone(built: Path, make_spec: Callable[..., Build]) -> None:
    spec = make_spec(built)
    assert is_built(spec)
    stamps = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    started = time.perf_counter()
    build(spec)
    assert time.perf_counter() - started < 0.2
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == stamps


def test_another_spec_in_the_same_directory_is_refused_with_the_difference(built: Path, make_spec) -> None:
    spec = make_spec(built, seed=5)
    assert not is_built(spec)
    with pytest.raises(SpecError, match=r"seed was 0, is 5 \(use another out"):
        build(spec)


def test_a_build_of_another_release_is_refused_as_that_and_not_as_damaged(copied: Path, make_spec: Callable[..., Build]) -> None:
    marker = json.loads((copied / "build.json").read_text())
    marker["spec"]["data"]["key_of_another_release"] = 1
    (copied / "build.json").write_text(json.dumps(marker))
    spec = make_spec(copied)
    assert not is_built(spec) and "built by another release" in conflict(spec)
    with pytest.raises(SpecError, match=r"built by another release.*\(use another out, or delete it\)"):
        build(spec, workers=0)
    (copied / "build.json").write_text("{")
    with pytest.raises(SpecError, match="damaged"):
        build(spec, workers=0)


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SpecError, match=r"thesis\.tex"):
        build(make_spec(tmp_path), workers=0)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_the_key_names_what_is_built_not_where(make_spec: Callable[..., Build]) -> None:
    assert build_key(make_spec(Path("/a"))) == build_key(make_spec(Path("/b"), dir="/c"))
    assert build_key(make_spec(Path("/a"))) != build_key(make_spec(Path("/a"), level=4))
    assert build_key(make_spec(Path("/a"))) != build_key(make_spec(Path("/a"), seed=1))


def test_two_builds_never_write_in_one_directory(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="another build is writing here"):
            build(make_spec(tmp_path), workers=0)


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.soak)])
def test_a_build_killed_again_and_again_ends_with_the_same_bytes(
    built: Path, tmp_path: Path, make_spec: Callable[..., Build], kills: int
) -> None:
    for path in built.rglob("pack-*"):
        path.unlink()
    spec = spec_file(tmp_path / "spec.json", make_spec(tmp_path / "o"))
    rng = random.Random(kills)
    killed = 0

    def whole_files() -> int:
        return sum(not path.name.endswith(".tmp") for path in tmp_path.rglob("o/*/*/*"))

    for _ in range(kills):
        process = command(spec, "--workers", "1", "--json")
        target = whole_files() + rng.randrange(1, 6)
        wait_for(lambda process=process, target=target: whole_files() >= target or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.01))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= 3
    last = command(spec, "--workers", "2", "--json")
    assert last.communicate()[1] == b"" and last.returncode == 0
    assert tree(tmp_path / "o") == tree(built)


def test_whole_shards_are_not_made_again(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    """Stopped within its one source, a build keeps the shards it has and goes on after them."""

    class Enough(Exception):
        pass

    spec = make_spec(tmp_path / "o", source=CODE, tokenizer=SMALL, shard_tokens=20_000)

    def stop(progress: Any) -> None:
        if len(list(tmp_path.glob("o/code/train/tokens-*.zst"))) >= 3:
            raise Enough

    from shards.common import progress

    interval, progress.INTERVAL = progress.INTERVAL, 0.0
    try:
        with pytest.raises(Enough):
            build(spec, stop, workers=0)
    finally:
        progress.INTERVAL = interval
    assert (tmp_path / "o/code/progress.json").exists() and not list(tmp_path.rglob("*.tmp"))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("o/code/train/tokens-*.zst")}
    build(spec, workers=0)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    other = build(make_spec(tmp_path / "p", source=CODE, tokenizer=SMALL, shard_tokens=20_000), workers=0)
    assert tree(tmp_path / "o") == tree(other)


def test_a_source_that_changed_since_the_kill_begins_anew(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    path = write_lines(tmp_path / "d.jsonl", documents(100))
    source = Source(name="own", kind="text", origin="jsonl", path=str(path))
    spec = make_spec(tmp_path / "o", source=(source,), tokenizer=TokenizerSpec(vocab=330), held_out=0)
    build(spec, workers=0)
    stale = {"inputs": "of other files", "train": {"shards": [], "next_document": 90, "text_bytes": 5}}
    (tmp_path / "o/own/progress.json").write_text(json.dumps(stale))
    (tmp_path / "o/own/train/manifest.json").unlink()
    marker = json.loads((tmp_path / "o/build.json").read_text())
    (tmp_path / "o/build.json").write_text(json.dumps({**marker, "done": False}))
    build(spec, workers=0)
    assert len(texts(tmp_path / "o", "own")) == 100


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def long_spec(tmp_path: Path, make_spec: Callable[..., Build]) -> Path:
    """A build that takes long enough to be interrupted."""
    sources = (Source(name="code", kind="text", origin="stdlib-code"), Source(name="docs", kind="text", origin="stdlib-docs"))
    return spec_file(tmp_path / "spec.json", make_spec(tmp_path / "o", source=sources, tokenizer=SMALL))


def test_sigterm_ends_it_cleanly_to_be_gone_on_with(tmp_path: Path, long_spec: Path) -> None:
    process = command(long_spec, "--workers", "2", "--json")
    assert wait_for(lambda: (tmp_path / "o/code/progress.json").exists())
    workers = children(process)
    assert workers
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 1 and "the same command resumes" in error and "Traceback" not in error
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "o/code/progress.json").exists()
    assert wait_for(lambda: not any(worker.is_running() for worker in workers), 5)


def test_workers_do_not_outlive_a_killed_build(tmp_path: Path, long_spec: Path) -> None:
    process = command(long_spec, "--workers", "2", "--json")
    assert wait_for(lambda: any(tmp_path.glob("o/code/train/tokens-*.zst")))
    workers = children(process)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    assert wait_for(lambda: not any(worker.is_running() for worker in workers), 10)


def test_with_json_a_build_ends_with_the_program_that_started_it(tmp_path: Path, long_spec: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'shards', 'build', '--json', '--spec', sys.argv[1]],"
        " stdout=open(sys.argv[2], 'w'), stderr=subprocess.DEVNULL)\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(long_spec), os.devnull], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    builder = psutil.Process(int(parent.stdout.readline()))
    assert wait_for(lambda: any(tmp_path.glob("o/code/train/tokens-*")))
    parent.kill()
    parent.communicate()
    assert wait_for(lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE, 10)
    assert not json.loads((tmp_path / "o/build.json").read_text())["done"]


def test_a_worker_that_dies_is_an_error_with_the_way_out(built: Path) -> None:
    with Workers(1) as pool:
        pool.use((built / "tokenizer.model").read_bytes())
        pool._workers[0][0].kill()
        with pytest.raises(ShardError, match=r"exit status -9.*--workers 1"):
            list(pool.encode("text", [([Document("hello", ("hello",))], None)]))


def test_progress_is_json_lines_through_the_phases(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    spec = make_spec(tmp_path / "o", source=CODE, tokenizer=SMALL)
    process = command(spec_file(tmp_path / "spec.json", spec), "--json", "--workers", "0")
    out, error = process.communicate()
    assert (process.returncode, error) == (0, b"")
    reports = [json.loads(line) for line in out.splitlines()]
    fields = ["phase", "done", "total", "unit", "rate", "seconds_left", "message"]
    assert all(list(report) == fields for report in reports)
    phases = list(dict.fromkeys(report["phase"] for report in reports))
    assert phases == ["read", "tokenizer", "encode", "verify", "done"]
    assert reports[-1]["done"] == sum(manifest.load(tmp_path / "o/code" / split).tokens for split in manifest.SPLITS)


def test_a_reader_of_its_progress_that_goes_away_ends_it(tmp_path: Path, long_spec: Path) -> None:
    process = command(long_spec, "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(20) == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "unknown field `sources`"),
        ({"seed": "x"}, "Expected `int`"),
        ({"data": {"source": []}}, "no sources"),
        ({"data": {"source": [{"name": "a", "kind": "text", "origin": "jsonl"}]}}, "needs a path"),
        ({"data": {"source": [{"name": "../a", "kind": "text", "origin": "stdlib-code"}]}}, "letters, digits"),
        ({"data": {"source": [{"name": "a", "kind": "sft", "origin": "stdlib-code"}]}}, 'of kind "text"'),
        ({"data": {"source": [{"name": "a", "kind": "text", "origin": "text", "path": "/no/such"}]}}, "no such file"),
        ({"tokenizer": {"vocab": 100}}, "at least 320"),
        ({"tokenizer": {"path": "/no/such.model"}}, r"/no/such\.model: No such file"),
    ],
)
def test_a_spec_that_cannot_work_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(decode_build(json.dumps(spec_with(tmp_path, change)).encode(), "spec.json"), workers=0)


def spec_with(tmp_path: Path, change: dict[str, Any]) -> dict[str, Any]:
    sources = [{"name": "a", "kind": "text", "origin": "stdlib-topics"}]
    return {"data": {"source": sources}, "out": str(tmp_path / "o"), **change}


@pytest.mark.parametrize("change", [{"sources": []}, {"tokenizer": {"path": "/no/such.model"}}, {"out": "/proc/here"}])
def test_what_goes_wrong_is_one_line_on_stderr_and_an_exit_status(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec_with(tmp_path, change)))
    process = command(path, "--json", "--workers", "0")
    error = process.communicate()[1].decode()
    assert process.returncode == (1 if "out" in change else 2)
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_users_only_document_is_trained_on_not_held_out(tmp_path: Path) -> None:
    for number in range(12):  # whatever the hash of the text says
        corpus = tmp_path / f"corpus{number}"
        corpus.mkdir()
        (corpus / "one.txt").write_text(f"the only document there is, number {number}\n" * 200)
        source = Source(name="mine", kind="text", origin="text", path=str(corpus / "*.txt"))
        reading = ReadPosition()
        splits = [held for _, record, held in splitting.split(source, 0.5, 0, reading) if not isinstance(record, Rejected)]
        assert splits == [False]
