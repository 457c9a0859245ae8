"""Builds that meet bad names, unreadable places, files that change, and damage between their steps."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shards.build import checksummed_files
from shards.build import report as reporting
from shards.build.build import build
from shards.build.encode import LONGEST_LABEL
from shards.build.workspace import ReadUnit, Work, gathered
from shards.common.errors import ShardError, SpecError
from shards.common.progress import ProgressReport
from shards.filters.heuristics.settings import GopherQuality, UniqueWords
from shards.filters.settings import Contamination, Language, Perplexity
from shards.readers import stdlib
from shards.readers.sources import Unit
from shards.spec import Build, Clean, Source, TokenizerSpec
from shards.tokenization.tokenizer import FILE_NAME


def prose(count: int) -> list[str]:
    return [parts[0][:3000] for _, parts in stdlib.docs(lambda key: True) if len(parts[0]) > 600][:count]


def jsonl(path: Path, texts: list[str], *others: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "".join(f"{line}\n" for line in others))
    return str(path)


def content(out: Path) -> dict[str, bytes]:
    """All files of a finished build but for the marker, which says where it was built."""
    names = [path for path in out.rglob("*") if path.is_file() and path.name not in ("build.json", ".lock")]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


Make = Callable[..., Build]


@pytest.fixture
def make(make_spec: Callable[..., Build], built: Path, tmp_path: Path) -> Make:
    """Specs of text sources, by name and path, with a tokenizer that is there already."""

    def made(sources: dict[str, str], clean: Clean | None = None, out: str = "out", **source: Any) -> Build:
        fields: dict[str, Any] = {"kind": "text", "origin": "jsonl", **source}
        given = tuple(Source(name=name, path=path, **fields) for name, path in sources.items())
        return make_spec(tmp_path / out, source=given, clean=clean, tokenizer=TokenizerSpec(path=str(built / FILE_NAME)))

    return made


class Interrupted(Exception):
    pass


def stop_at(spec: Build, message: str, phase: str = "clean") -> None:
    """Builds up to where a phase says this."""

    def look(progress: ProgressReport) -> None:
        if (progress.phase, progress.message) == (phase, message):
            raise Interrupted

    with pytest.raises(Interrupted):
        build(spec, look, workers=0)


@pytest.mark.parametrize("name", ["work", "models", "Tokenizer.Model", "report.json", "half.tmp"])
def test_a_source_cannot_be_called_what_a_build_calls_its_own(make: Make, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=f'source "{name}": .*rename'):
        build(make({name: jsonl(tmp_path / "a.jsonl", prose(3))}), workers=0)


def test_a_source_cannot_be_called_like_a_part_of_another(make: Make, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", prose(3))
    with pytest.raises(SpecError, match=r'source "web.en" is named like a part of "web", which is split'):
        build(make({"web": path, "web.en": path}, Clean(language=Language()), split_by="language"), workers=0)


def test_records_left_out_of_a_split_source_of_which_nothing_stays_are_kept_if_written(make: Make, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["tiny"], "{broken", '{"title": "no text"}')
    out = build(make({"web": path}, Clean(gopher_quality=GopherQuality()), split_by="label"), workers=0)
    assert len((out / "web" / "rejected.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have names in UTF-8 only")
@pytest.mark.parametrize("clean", [None, Clean()], ids=["plain", "clean"])
def test_files_whose_names_are_not_utf8_are_read_and_named(make: Make, tmp_path: Path, clean: Clean | None) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    jsonl(Path(os.fsdecode(bytes(directory) + b"/caf\xe9.jsonl")), prose(3), "{broken")
    out = build(make({"web": str(directory)}, clean), workers=0)
    assert json.loads((out / "web" / "rejected.jsonl").read_bytes())["where"].endswith("caf\\udce9.jsonl:4")


LISTED = """
import os, sys
from shards.readers.files import find
if os.geteuid() == 0:
    os.setuid(65534)  # root may look everywhere
print(find(sys.argv[1], 'source "web"', lambda name: True, ".txt"))
"""


def test_a_directory_that_cannot_be_looked_into_is_not_left_out_in_silence(tmp_path: Path) -> None:
    closed = tmp_path / "files" / "closed"
    closed.mkdir(parents=True)
    (closed.parent / "a.txt").write_text("text")
    above = [path for path in (tmp_path, *tmp_path.parents) if Path(tempfile.gettempdir()) in path.parents]
    before = [path.stat().st_mode for path in above]
    try:
        for path in above:
            path.chmod(0o755)
        closed.chmod(0)
        done = subprocess.run([sys.executable, "-c", LISTED, str(closed.parent)], capture_output=True, text=True)
    finally:
        closed.chmod(0o755)
        for path, mode in zip(above, before, strict=True):
            path.chmod(mode)
    assert f'SpecError: source "web": {closed}: Permission denied' in done.stderr


def test_a_label_of_any_length_names_a_directory(make: Make, tmp_path: Path) -> None:
    directory = tmp_path / "books"
    directory.mkdir()
    for number, text in enumerate(prose(2)):
        head = f"Title: A book\nLanguage: {'English and ' * 40}{number}\n\n*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n"
        (directory / f"{number}.txt").write_text(f"{head}{text}\n*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n")
    out = build(make({"books": str(directory)}, Clean(), origin="gutenberg", split_by="label"), workers=0)
    parts = [path.name for path in out.glob("books.*")]
    assert len(parts) == 2 and all(len(name) == len("books.") + LONGEST_LABEL for name in parts)


@pytest.mark.parametrize(
    "clean", [Clean(contamination=Contamination(sets={"exam": "PATH"})), Clean(perplexity=Perplexity(reference="PATH"))]
)
def test_a_reference_without_texts_is_refused_with_the_reason(make: Make, tmp_path: Path, clean: Clean) -> None:
    path = jsonl(tmp_path / "exam.jsonl", [], '{"question": "What is the capital of France, and since when?"}')
    clean = msgspec.json.decode(msgspec.json.encode(clean).replace(b"PATH", path.encode()), type=Clean)
    with pytest.raises(SpecError, match=r'exam\.jsonl:1: no field "text"'):
        build(make({"web": jsonl(tmp_path / "a.jsonl", prose(3))}, clean), workers=0)


def test_records_of_a_reference_that_are_no_text_are_kept_if_written(make: Make, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "exam.jsonl", prose(2), '{"question": "What is the capital of France, and since when?"}')
    clean = Clean(contamination=Contamination(sets={"exam": path}))
    out = build(make({"web": jsonl(tmp_path / "a.jsonl", prose(3))}, clean), workers=0)
    assert "France" in (out / "models" / "contamination.index.rejected.jsonl").read_text()


@pytest.mark.parametrize(
    ("clean", "phase", "message"), [(Clean(), "clean", "reading"), (None, "encode", "web")], ids=["clean", "plain"]
)
def test_a_source_that_changes_while_it_is_read_is_said(
    make: Make, tmp_path: Path, clean: Clean | None, phase: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    spec = make({"web": jsonl(path, prose(20))}, clean)

    def change(progress: ProgressReport) -> None:
        if (progress.phase, progress.message) == (phase, message) and path.stat().st_size:
            jsonl(path, prose(30))

    with pytest.raises(ShardError, match=r'source "web": .*a\.jsonl: files changed, came or went while they were read'):
        build(spec, change, workers=0)
    out = build(spec, workers=0)
    assert content(out) == content(build(make({"web": str(path)}, clean, "fresh"), workers=0))


def test_what_was_built_of_other_text_is_not_gone_on_with(make_spec: Callable[..., Build], tmp_path: Path) -> None:
    """Neither a tokenizer nor a source's finished shards, where another source changed before the build was done."""
    texts = prose(60)
    paths = [jsonl(tmp_path / "a.jsonl", texts[:30]), jsonl(tmp_path / "b.jsonl", texts[30:])]
    source = tuple(Source(name=name, kind="text", origin="jsonl", path=path) for name, path in zip("ab", paths, strict=True))
    spec = make_spec(tmp_path / "out", source=source, clean=Clean(), tokenizer=TokenizerSpec(vocab=400, sample_bytes=100_000))
    stop_at(spec, "b", "encode")
    jsonl(tmp_path / "a.jsonl", texts[10:30])
    out = build(spec, workers=0)
    assert content(out) == content(build(msgspec.structs.replace(spec, out=str(tmp_path / "fresh")), workers=0))


def test_a_broken_file_that_was_mended_is_read_again(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    raw = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in prose(10)).encode())
    path.write_bytes(raw[:-8] + bytes(8))
    then = path.stat().st_mtime_ns
    spec = make({"web": str(path)}, Clean())
    with pytest.raises(ShardError, match="1 of 1 files are broken"):
        build(spec, workers=0)
    path.write_bytes(raw)
    os.utime(path, ns=(then, then))  # as where a disk could not read it and can now
    assert build(spec, workers=0).is_dir()


STEPS = {
    "hashing": "read",
    "finding near duplicates": "sign",
    "comparing texts": "near",
    "cleaning": "verify",
    "encoding": "clean",
}


@pytest.mark.parametrize(("message", "step"), [*STEPS.items(), ("web", "encode"), ("web", "models")])
def test_a_byte_changed_between_two_runs_is_found_or_of_no_consequence(make: Make, tmp_path: Path, message: str, step: str) -> None:
    texts = prose(30)
    path = jsonl(tmp_path / "a.jsonl", [*texts, texts[3] + " more"], "{broken")
    clean = Clean(chunk_bytes=40_000, contamination=Contamination(sets={"exam": jsonl(tmp_path / "exam.jsonl", prose(2))}))
    spec = make({"web": path}, clean)
    quiet = content(build(msgspec.structs.replace(spec, out=str(tmp_path / "quiet")), workers=0))
    stop_at(spec, "cleaning" if step == "models" else message, "encode" if step == "encode" else "clean")
    out = Path(spec.out)
    begun = Path(shutil.copytree(out, tmp_path / "begun"))
    directory = Path("models") if step == "models" else Path("work", step)
    files = sorted(
        file.relative_to(begun) for file in (begun / directory).iterdir() if file.stat().st_size > checksummed_files.SEAL
    )
    found = 0
    for file, place in zip(files[:: max(1, len(files) // 6)], itertools.cycle((0.3, 0.6, 0.9, 0.999))):
        shutil.rmtree(out)
        shutil.copytree(begun, out)
        raw = bytearray((out / file).read_bytes())
        raw[int(len(raw) * place)] ^= 8
        (out / file).write_bytes(raw)
        said = ""
        try:
            build(spec, workers=0)
        except ShardError as error:
            said = str(error)
        if said:
            found += 1
            assert str(out / file) in said and f"delete {out / 'work'}" in said
            shutil.rmtree(out / "work")
            build(spec, workers=0)
        assert content(out) == quiet
    assert found


def test_units_are_in_order_whatever_their_numbers(make: Make, tmp_path: Path) -> None:
    work = Work(make({"web": jsonl(tmp_path / "a.jsonl", prose(1))}, Clean()), "")
    (work.root / "read").mkdir(parents=True)
    places = [(0, 7), (0, 999_999), (0, 1_000_000), (999, 0), (1000, 0)]
    for source, unit in places:
        checksummed_files.save_bytes(work.path("read", f"{source:03d}-{unit:06d}", ".json"), msgspec.json.encode(ReadUnit([], {})))
    assert [place[:2] for place in work.units] == places


def test_thousands_of_small_files_are_few_tasks_and_the_same_shards(make: Make, tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    texts = [f"{number}: {text[:300]}" for number, text in enumerate(prose(40) * 50)]
    for number, text in enumerate(texts):
        (directory / f"{number:05d}.txt").write_text(text)
    spec = make({"web": str(directory)}, Clean(near_dup_threshold=0), origin="text")
    stop_at(spec, "encoding")
    assert len(list(Path(spec.out, "work", "clean").glob("*.docs"))) < 5
    alone = build(spec, workers=0)
    together = build(make({"web": jsonl(tmp_path / "a.jsonl", texts)}, Clean(near_dup_threshold=0), "one"), workers=0)
    for name in ("train/tokens-00000.zst", "held_out/tokens-00000.zst"):
        assert (alone / "web" / name).read_bytes() == (together / "web" / name).read_bytes()


def test_units_are_read_together_up_to_a_size() -> None:
    sizes = [3, 4, 5, 20, 1, 0, 0, 2, 2]
    groups = gathered([Unit(str(number), size, (str(number),)) for number, size in enumerate(sizes)], 10)
    assert [[unit.size for unit in group] for group in groups] == [[3, 4], [5], [20], [1], [0], [0], [2, 2]]


def test_the_funnel_of_all_sources_only_narrows_until_something_is_made(make_spec: Callable[..., Build], tmp_path: Path) -> None:
    texts = prose(60)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"What is {text[:40]}?", "response": text[:400]}) + "\n" for text in texts))
    source = (
        Source(name="long", kind="text", origin="made", made="related", of=("web",), characters=2000),
        Source(name="talk", kind="sft", origin="jsonl", path=str(chats)),
        Source(name="web", kind="text", origin="jsonl", path=jsonl(tmp_path / "web.jsonl", [*texts, "few words", texts[0]])),
    )
    clean = Clean(language=Language(unknown=True), gopher_quality=GopherQuality(), unique_words=UniqueWords())
    report = reporting.load(build(make_spec(tmp_path / "out", source=source, clean=clean), workers=0))
    steps = report.total().steps
    assert list(steps) == ["read", "exact", "near", "language", "gopher_quality", "unique_words", "made"]
    counts = [count.documents for count in steps.values()]
    assert counts[:-1] == sorted(counts[:-1], reverse=True) and counts[0] == 122 and counts[-2] > 60
    assert counts[-1] == sum(source.documents for source in report.sources)


def shards(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "shards", *words], capture_output=True, text=True)


def test_a_build_that_is_not_done_is_told_from_one_that_is(make: Make, tmp_path: Path) -> None:
    spec = make({name: jsonl(tmp_path / f"{name}.jsonl", prose(5)) for name in "ab"}, Clean(near_dup_threshold=0, exact=False))
    stop_at(spec, "b", "encode")
    merged = shards("merge", str(tmp_path / "merged"), spec.out)
    assert merged.returncode == 2 and "its build is not done" in merged.stderr
    assert "its build is not done" in shards("verify", spec.out).stderr
    assert "when it is done" in shards("report", spec.out).stderr
    build(spec, workers=0)
    assert "not done" not in shards("verify", spec.out).stderr
    Path(spec.out, "build.json").write_text("{")
    with pytest.raises(SpecError, match=r"build\.json: damaged"):
        build(spec, workers=0)
