"""Builds that clean: what goes and what stays, and that nothing but the input decides it."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shards.build import hashing
from shards.build import report as reporting
from shards.build.build import build
from shards.common.errors import ShardError
from shards.format.corpus import Corpus
from shards.readers import stdlib
from shards.spec import Build, Clean, Source, TokenizerSpec
from shards.tokenization.tokenizer import FILE_NAME
from shards.tokenization.tokenizer import Tokenizer as Loaded


def library(count: int, largest: int = 60_000) -> list[str]:
    """Texts of the standard library that do not repeat each other."""
    texts = [path.read_bytes().decode("utf-8", "replace") for _, path in stdlib.files()]
    return [text for text in texts if 400 < len(text) < largest][:count]


def changed(text: str, share: float, rnd: random.Random) -> str:
    """The text with a share of its words replaced."""
    words = text.split(" ")
    for place in rnd.sample(range(len(words)), max(1, int(len(words) * share))):
        words[place] = f"other{rnd.randrange(10**6)}"
    return " ".join(words)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources of texts with duplicates in and between them, and a conversation source with repetitions."""
    rnd = random.Random(7)
    texts = library(120)
    directory = tmp_path_factory.mktemp("planted")
    first: list[str] = []
    exact = near = 0
    for number, text in enumerate(texts):
        first.append(text)
        if number % 8 == 0:
            first.append("  " + text.upper().replace("\n", "\n\n"))
            exact += 1
    write_jsonl(directory / "a.jsonl", [{"text": text} for text in first])
    second = [changed(text, 0.005, rnd) for text in texts[::10]]
    near = sum(
        hashing.jaccard(np.unique(hashing.shingles(one)), np.unique(hashing.shingles(other))) >= 0.8
        for one, other in zip(texts[::10], second, strict=True)
    )
    write_jsonl(directory / "b.jsonl", [{"text": text} for text in [*second, "something of its own, said once"]])
    chats = [{"prompt": f"question {number % 20}", "response": f"answer {number % 20}"} for number in range(50)]
    write_jsonl(directory / "c.jsonl", chats)
    return {"directory": directory, "texts": texts, "exact": exact, "near": near, "second": len(second)}


@pytest.fixture
def spec(planted: dict[str, Any], make_spec: Callable[..., Build], tmp_path: Path) -> Build:
    """A build of all three, in chunks small enough that there are several."""
    directory = planted["directory"]
    source = (
        Source(name="a", kind="text", origin="jsonl", path=str(directory / "a.jsonl")),
        Source(name="b", kind="text", origin="jsonl", path=str(directory / "b.jsonl")),
        Source(name="c", kind="sft", origin="jsonl", path=str(directory / "c.jsonl")),
    )
    return make_spec(tmp_path / "out", source=source, clean=Clean(chunk_bytes=200_000))


def content(out: Path) -> dict[str, bytes]:
    """All files of a finished build but for the marker, which says where it was built."""
    names = [path for path in out.rglob("*") if path.is_file() and path.name not in ("build.json", ".lock")]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


def texts_of(out: Path, source: str) -> list[str]:
    """The texts in a source's shards."""
    tokenizer = Loaded.load(out / FILE_NAME)
    found = []
    for split in ("train", "held_out"):
        corpus = Corpus(out, source, split)
        found += [tokenizer.decode(corpus.read(*corpus.span(number))) for number in range(corpus.documents)]
    return found


def test_of_each_group_of_duplicates_the_first_stays(planted: dict[str, Any], spec: Build) -> None:
    out = build(spec, workers=0)
    assert sorted(texts_of(out, "a")) == sorted(planted["texts"])
    funnel = {source.name: source.funnel for source in reporting.load(out).sources}
    assert funnel["a"].reasons["exact duplicate"].documents == planted["exact"]
    assert funnel["b"].reasons["near duplicate"].documents == planted["near"] > 5
    assert len(texts_of(out, "b")) == planted["second"] - planted["near"] + 1
    assert funnel["c"].steps["exact"].documents == 20
    assert not (out / "work").exists()


def test_the_funnel_adds_up(spec: Build) -> None:
    report = reporting.load(build(spec, workers=0))
    for source in report.sources:
        steps = list(source.funnel.steps.values())
        assert steps[0].documents - steps[-1].documents == sum(count.documents for count in source.funnel.reasons.values())
        assert steps[0].bytes - steps[-1].bytes == sum(count.bytes for count in source.funnel.reasons.values())
        assert (source.documents, source.text_bytes) == (steps[-1].documents, steps[-1].bytes)
    said = report.sources[0].funnel.samples["exact duplicate"][0]
    assert "a.jsonl:2" in said.where and "a.jsonl:1" in said.reason


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_no_byte(spec: Build, tmp_path: Path, workers: int) -> None:
    alone = content(build(spec, workers=0))
    other = msgspec.structs.replace(spec, out=str(tmp_path / "other"))
    assert content(build(other, workers=workers)) == alone


def test_chunks_of_another_size_give_the_same_shards(spec: Build, tmp_path: Path) -> None:
    alone = content(build(spec, workers=0))
    data = msgspec.structs.replace(spec.data, clean=Clean())
    other = content(build(msgspec.structs.replace(spec, data=data, out=str(tmp_path / "other")), workers=0))
    assert {name for name in alone if alone[name] != other[name]} <= {"report.json"}  # which samples it shows


def kill_at(spec: Build, tmp_path: Path, report: int, delay: float = 0.0) -> bool:
    """Starts the build in its own process group and kills all of that some time after its `report`th line of progress.

    Whether it came to that.
    """
    path = tmp_path / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    words = [sys.executable, "-m", "shards", "build", "--spec", str(path), "--workers", "2", "--json"]
    with subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(report):
            if not process.stdout.readline():
                return False
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
    return True


@pytest.mark.parametrize("seed", [1, 2])
def test_a_build_killed_again_and_again_ends_with_the_same_bytes(spec: Build, tmp_path: Path, seed: int) -> None:
    quiet = content(build(spec, workers=0))
    other = msgspec.structs.replace(spec, out=str(tmp_path / "killed"))
    rnd = random.Random(seed)
    killed = [kill_at(other, tmp_path, report, rnd.random() / 10) for report in sorted(rnd.sample(range(1, 14), 6))]
    assert killed.count(True) >= 4
    build(other, workers=2)
    assert content(Path(other.out)) == quiet


def test_finished_tasks_are_not_done_again(spec: Build, tmp_path: Path) -> None:
    out = Path(spec.out)
    assert kill_at(spec, tmp_path, 6)
    done = {path: path.stat().st_ino for path in (out / "work").rglob("*") if path.suffix in (".docs", ".npy")}
    assert done
    kept: dict[Path, int] = {}

    def look(progress: Any) -> None:
        if progress.phase == "tokenizer":
            kept.update({path: path.stat().st_ino for path in done if path.exists()})

    build(spec, look, workers=0)
    assert kept == done


@pytest.mark.parametrize("clean", [Clean(near_dup_threshold=0, chunk_bytes=1024), None], ids=["cleaned", "plain"])
def test_a_limited_source_is_read_as_far_by_a_resumed_build(
    make_spec: Callable[..., Build], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: Clean | None
) -> None:
    """How many records were rejected up to the limit is in the manifest, so it must not depend on where a build was killed."""
    for number in range(60):
        lines = [json.dumps({"text": f"document {place} of file {number}"}) for place in range(100)]
        (tmp_path / f"{number:02d}.jsonl").write_text("\n".join([*lines, "no record"]))
    source = Source(name="a", kind="text", origin="jsonl", path=str(tmp_path / "*.jsonl"), max_tokens=24_000)
    data: dict[str, Any] = {"source": (source,), "clean": clean, "held_out": 0.0, "shard_tokens": 4096}
    data["tokenizer"] = TokenizerSpec(vocab=330)
    whole = content(build(make_spec(tmp_path / "whole", **data), workers=0))

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if (tmp_path / "resumed/a/train/tokens-00001.zst").exists():
            raise Stop

    monkeypatch.setattr("shards.common.progress.INTERVAL", 0.0)
    with pytest.raises(Stop):
        build(make_spec(tmp_path / "resumed", **data), stop, workers=0)
    assert (tmp_path / "resumed/a/progress.json").exists()
    assert content(build(make_spec(tmp_path / "resumed", **data), workers=0)) == whole
    (rejected,) = json.loads(whole["a/train/manifest.json"])["rejected"].values()
    assert 20 < rejected < 60


def test_changed_inputs_begin_the_work_anew(spec: Build, tmp_path: Path, planted: dict[str, Any]) -> None:
    directory = Path(shutil.copytree(planted["directory"], tmp_path / "copied"))
    sources = tuple(msgspec.structs.replace(each, path=str(directory / Path(str(each.path)).name)) for each in spec.data.source)
    spec = msgspec.structs.replace(spec, data=msgspec.structs.replace(spec.data, source=sources))
    assert kill_at(spec, tmp_path, 6)
    assert any(Path(spec.out, "work", "sign").iterdir())
    write_jsonl(directory / "a.jsonl", [{"text": text} for text in planted["texts"][:30]])
    out = build(spec, workers=0)
    assert sorted(texts_of(out, "a")) == sorted(planted["texts"][:30])


def test_planted_duplicates_are_found_and_no_others(make_spec: Callable[..., Build], tmp_path: Path) -> None:
    """Recall over pairs whose n-grams truly are 0.8 alike or more; precision over all that was removed."""
    rnd = random.Random(3)
    records, truly = [], 0
    for text in library(150, 20_000):
        group = [text, *(changed(text, share, rnd) for share in (0.01, 0.03, 0.06))]
        sets = [np.unique(hashing.shingles(each)) for each in group]
        truly += sum(any(hashing.jaccard(sets[j], sets[i]) >= 0.8 for j in range(i)) for i in range(1, len(group)))
        records += group
    source = Source(
        name="a", kind="text", origin="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in records]))
    )
    out = build(make_spec(tmp_path / "out", source=(source,), clean=Clean(chunk_bytes=1 << 20)), workers=0)
    removed = reporting.load(out).sources[0].funnel.reasons["near duplicate"].documents
    # A few of the library's own texts are like others of it.
    assert 100 < 0.99 * truly <= removed <= truly + 10 < len(records) // 2
    kept = [np.unique(hashing.shingles(text)) for text in texts_of(out, "a")]
    assert len(kept) == len(records) - removed
    alike = sum(hashing.jaccard(kept[i], kept[j]) >= 0.8 for i in range(len(kept)) for j in range(max(0, i - 3), i))
    assert alike <= 0.01 * truly


def test_too_many_broken_files_stop_the_build_and_are_named(make_spec: Callable[..., Build], tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    for number, text in enumerate(library(10)):
        raw = gzip.compress(json.dumps({"text": text}).encode() + b"\n")
        (directory / f"{number}.jsonl.gz").write_bytes(raw[: len(raw) // 2] if number in (3, 4) else raw)
    source = Source(name="web", kind="text", origin="jsonl", path=str(directory), broken_files=0.1)
    spec = make_spec(tmp_path / "out", source=(source,), clean=Clean())
    with pytest.raises(ShardError, match=r'source "web": 2 of 10 files are broken.*3\.jsonl\.gz.*4\.jsonl\.gz'):
        build(spec, workers=0)
    allowed = msgspec.structs.replace(source, broken_files=0.2)
    data = msgspec.structs.replace(spec.data, source=(allowed,), clean=Clean(near_dup_threshold=0))
    out = build(msgspec.structs.replace(spec, data=data, out=str(tmp_path / "other")), workers=0)
    assert sum(reporting.load(out).sources[0].rejected.values()) == 2
    assert len((out / "web" / "rejected.jsonl").read_bytes().splitlines()) == 2


MEASURED = """
import resource, sys
from shards.__main__ import main
sys.argv[1:] = ["build", "--spec", sys.argv[1], "--workers", "1", "--json"]
status = main()
own = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # getrusage counts its parent's
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, status)
"""


def test_memory_does_not_grow_with_the_input(built: Path, make_spec: Callable[..., Build], tmp_path: Path) -> None:
    """The most that the build and its worker hold, in kB, for four times the input: texts that share their words."""
    rnd = random.Random(0)
    vocabulary = sorted({word for text in library(200) for word in text.split() if word.isalpha()})
    peaks = []
    for count in (2_000, 8_000):
        path = tmp_path / f"{count}.jsonl"
        write_jsonl(path, [{"text": " ".join(rnd.choices(vocabulary, k=400))} for _ in range(count)])
        source = Source(name="a", kind="text", origin="jsonl", path=str(path))
        tokenizer = TokenizerSpec(path=str(built / FILE_NAME))
        clean = Clean(chunk_bytes=1_000_000)
        spec = make_spec(tmp_path / f"{count}", source=(source,), clean=clean, tokenizer=tokenizer, shard_tokens=1 << 20)
        (tmp_path / "spec.json").write_bytes(msgspec.json.encode(spec))
        done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path / "spec.json")], capture_output=True, text=True)
        own, child, status = map(int, done.stdout.splitlines()[-1].split())
        assert status == 0, done.stderr
        peaks.append((own, child))
    assert peaks[1][0] < 1.15 * peaks[0][0] + 10_000
    assert peaks[1][1] < 1.15 * peaks[0][1] + 10_000


@pytest.mark.parametrize("clean", [None, Clean()], ids=["plainly", "cleanly"])
def test_a_source_of_which_nothing_is_a_document_is_said(make_spec: Callable[..., Build], tmp_path: Path, clean: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('not JSON\n{"other": "field"}\n' * 5)
    source = Source(name="a", kind="text", origin="jsonl", path=str(path))
    code = Source(name="code", kind="text", origin="stdlib-code", max_documents=20)
    with pytest.raises(ShardError, match=r'source "a": none of its 10 records is a document \(no field "text": 5, not JSON: 5\)'):
        build(make_spec(tmp_path / "out", source=(source, code), clean=clean), workers=0)
