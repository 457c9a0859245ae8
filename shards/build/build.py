"""Builds shards from a spec: tokenizer, then each source, then a check of every byte.

    OUT/build.json          the spec, and whether the build is done
    OUT/tokenizer.model
    OUT/SOURCE/train/       shards and manifest.json
    OUT/SOURCE/held_out/    the same
    OUT/SOURCE/rejected.jsonl   records left out, if there were any

A build that was killed goes on from its last whole shard and ends with the same bytes as one that was not: documents come
in a fixed order, each shard is renamed into place when it is whole, and `progress.json` then says how far it reached.
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shards.format import manifest as manifests
from shards.format.seekable_zstd import TEMPORARY, write_atomically
from shards.tokenization.encode import Encoded, Workers, notes, refusal
from shards.errors import BusyError, ShardError, SpecError
from shards.format.manifest import SPLITS, SplitManifest
from shards.build import encode, report as reporting
from shards.build.models import beside
from shards.build.runner import AFTER_TOKENIZER, BEFORE_TOKENIZER
from shards.build.runner import run as run_steps
from shards.build.steps import STEPS
from shards.build.workspace import Work
from shards.progress import ProgressMeter, Report
from shards.tokenization.records import Document
from shards.build.sources import KEPT_ASIDE, ReadPosition, Rejected, changed, describe, fingerprint, unreadable
from shards.spec import STDLIB_KINDS, TEMPLATES, Build, Source, check
from shards.readers.splits import divide, split
from shards.tokenization.templates import DEFAULT, kept, read
from shards.tokenization.templates import FILE_NAME as TEMPLATE_FILE
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer, check_template, read_model
from shards.format.writer import PROGRESS, SourceProgress, SplitWriter, kept_aside

BATCH_CHARACTERS = 1 << 19  # of documents sent to a worker at once; decides where a limited source stops reading
BATCH_DOCUMENTS = 2048
MARKER = "build.json"
READING = 2
"""Changes when the same files are read as other documents or other learned tokens: shards built before are then built again.

2: fields of conversations that change the meaning; TeX; scripts without spaces; hidden files.
"""
FIRST_KEYS = {
    "name", "kind", "origin", "path", "text_field", "prompt_field", "response_field", "chosen_field", "rejected_field",
    "max_documents", "max_tokens",
}  # fmt: skip
"""A source's keys in the first release; see build_key."""


class Marker(msgspec.Struct, frozen=True):
    """OUT/build.json."""

    key: str
    done: bool
    python: str
    spec: Build
    digests: dict[str, str] = {}  # by SOURCE/SPLIT, once it is done
    tokenizer: str = ""  # its hash, once it is there


def build_key(build: Build) -> str:
    """Names what a spec builds: equal for equal shards. Where it builds does not count; the Python version does where
    its library is read, and so do the format, and what a template's file says."""
    plain = msgspec.to_builtins(msgspec.structs.replace(build, out="", data=msgspec.structs.replace(build.data, dir=None)))
    # Keys that came later do not count as long as they are not used, so that shards built before them stay what they are.
    for key in ("executor", "executor_tasks", "slurm"):  # where it runs does not count either
        del plain["data"][key]
    if build.data.clean is None:
        del plain["data"]["clean"]
    late = [(field.name, field.default) for field in msgspec.structs.fields(Source) if field.name not in FIRST_KEYS]
    for table, key, default in [(plain["tokenizer"], "template", DEFAULT.name)] + [
        (source, key, msgspec.to_builtins(default)) for source in plain["data"]["source"] for key, default in late
    ]:
        if table[key] == default:
            del table[key]
    if build.tokenizer.template not in TEMPLATES:
        with suppress(SpecError):  # which building tells better
            plain["tokenizer"]["template"] = read(build.tokenizer).jinja
    reads_library = any(source.origin in STDLIB_KINDS for source in build.data.source)
    decides = [manifests.FORMAT, READING, platform.python_version() if reads_library else "", plain]
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(decides, order="sorted"))


def is_built(build: Build) -> bool:
    """Whether OUT already holds all of this spec; cheap, reads no shards."""
    marker = read_marker(Path(build.out))
    if marker is None or not marker.done or marker.key != build_key(build):
        return False
    return all(Path(build.out, name, manifests.FILE_NAME).is_file() for name in marker.digests)


def build(spec: Build, report: Report = lambda progress: None, workers: int | None = None) -> Path:
    """Build, go on building, or find built; returns OUT.

    workers: processes that encode (None: one a core, at most 8; 0: none, all in this one). Any number gives the same
    bytes. Raises SpecError for what is asked wrongly, ShardError for what went wrong.
    """
    check(spec)
    out = Path(spec.out)
    meter = ProgressMeter(report)
    if is_built(spec):
        if Work(spec, "").root.exists():  # a build that was killed at its very end
            with suppress(OSError, BusyError), _alone(out):
                Work(spec, "").remove()
        meter.begin("done", f"{out} is already built")
        return out
    for source in spec.data.source:
        fingerprint(source)  # a missing path is said before an hour's work, not after
    check_template(spec.tokenizer)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            _claim(spec, out)
            count = min(8, _cores()) if workers is None else workers
            with Workers(count) as pool:
                if spec.data.clean is None:
                    names = _build_plainly(spec, out, pool, meter)
                else:
                    names = _build_cleanly(spec, out, pool, meter)
            digests = _verify(names, out, meter)
            write_marker(spec, out, digests)
            Work(spec, "").remove()
    except OSError as error:
        raise ShardError(
            f"{error.filename or out}: {error.strerror or error} (make room or access, then give the same command again)"
        ) from None
    tokens = sum(manifests.load(out / name).tokens for name in digests)
    meter.begin("done", f"{out} is built", "tokens", tokens, tokens)
    return out


def _cores() -> int:
    """The cores this process may use; macOS cannot tell, and has them all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds OUT's lock, which the system lets go of however this process ends."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{out}: another build is writing here (wait for it, or use another out)") from None
        yield


def read_marker(out: Path) -> Marker | None:
    try:
        return msgspec.json.decode((out / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_marker(spec: Build, out: Path, digests: dict[str, str] | None = None, tokenizer: str = "") -> None:
    marker = Marker(build_key(spec), digests is not None, platform.python_version(), spec, digests or {}, tokenizer)
    write_atomically(out / MARKER, msgspec.json.format(msgspec.json.encode(marker), indent=1) + b"\n")


def conflict(spec: Build) -> str:
    """Why OUT cannot hold what the spec says, before anything is begun; empty where it can."""
    out = Path(spec.out)
    marker = read_marker(out)
    if marker is not None and marker.key != build_key(spec):
        return f"{out}: built from another spec: {_difference(marker, spec)} (use another out, or delete it)"
    return ""


def _claim(spec: Build, out: Path) -> None:
    """Begin in an empty directory or go on in one's own; refuse any other. Removes what a killed build left half."""
    marker = read_marker(out)
    if marker is not None and marker.key != build_key(spec):
        raise SpecError(f"{out}: built from another spec: {_difference(marker, spec)} (use another out, or delete it)")
    if marker is None:
        others = sorted(path.name for path in out.iterdir() if path.name != ".lock" and not path.name.endswith(TEMPORARY))
        if MARKER in others:
            raise SpecError(f"{out / MARKER}: damaged (delete {out}, or use another out; check this disk)")
        if others:
            raise SpecError(f'{out}: not empty and not a build of shards: holds "{others[0]}" (use another out)')
        write_marker(spec, out)
    for leftover in out.rglob(f"*{TEMPORARY}"):
        leftover.unlink()


def _difference(marker: Marker, spec: Build) -> str:
    """What differs between two specs, for people."""
    old, new = _flat(msgspec.to_builtins(marker.spec)), _flat(msgspec.to_builtins(spec))
    for name in ("out", "data.dir"):
        old.pop(name, None), new.pop(name, None)
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not changed:
        template = "" if spec.tokenizer.template in TEMPLATES else f" when {spec.tokenizer.template} said something else,"
        return f"{template} by Python {marker.python}, or by a release that read the same files differently".strip()
    shown = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed[:3]]
    return "; ".join(shown) + ("; ..." if len(changed) > 3 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {name: found for key, inner in items for name, found in _flat(inner, f"{prefix}.{key}".strip(".")).items()}


def _build_plainly(spec: Build, out: Path, pool: Workers, meter: ProgressMeter) -> list[str]:
    """Documents as they are read; the names of the directories."""

    def texts(source: Source) -> Iterator[tuple[int, Document | Rejected, bool | None]]:
        return split(source, spec.data.held_out, spec.seed, ReadPosition())

    tokenizer = _make_tokenizer(spec, out, pool, meter, texts)
    for source in spec.data.source:
        reading = ReadPosition()

        def encoded(writers: Writers, source: Source = source, reading: ReadPosition = reading) -> Iterator[Part]:
            return pool.encode(source.kind, _batches(spec, source, reading, writers, tokenizer))

        _build_source(spec, source, source.name, out, tokenizer, meter, reading, encoded)
    return [source.name for source in spec.data.source]


def _build_cleanly(spec: Build, out: Path, pool: Workers, meter: ProgressMeter) -> list[str]:
    """Documents as the steps of `clean` leave them; the names of the directories."""
    work = Work(spec, build_key(spec))
    assert spec.data.clean is not None
    work.begin(list(STEPS), beside(spec.data.clean))
    work = run_steps(BEFORE_TOKENIZER, work, pool, meter)

    def texts(source: Source) -> Iterator[tuple[int, Document | Rejected, bool | None]]:
        cleaned = encode.clean(work, spec.data.source.index(source))
        found = (document.document() for document in cleaned)
        return divide(source, spec.data.held_out, spec.seed, lambda held_out, wanted: found)

    tokenizer = _make_tokenizer(spec, out, pool, meter, texts)
    work = run_steps(AFTER_TOKENIZER, work, pool, meter)
    names = []
    for number, source in enumerate(spec.data.source):
        labels = encode.labels(work, number)
        for label in labels:
            name = f"{source.name}.{label}" if label else source.name
            ready = partial(encode.ready, work, number, label, label == labels[0])
            noted = encode.noted(work, number) if label == labels[0] else Counter()

            def encoded(
                writers: Writers, source: Source = source, ready: Ready = ready, noted: Counter[str] = noted
            ) -> Iterator[Part]:
                return _ready(spec, source, writers, ready(), noted)

            _build_source(spec, source, name, out, tokenizer, meter, ReadPosition(), encoded)
            names.append(name)
    reporting.save(work, out, names)
    return names


def _make_tokenizer(spec: Build, out: Path, pool: Workers, meter: ProgressMeter, texts: Texts) -> Tokenizer:
    path = out / TOKENIZER_FILE
    made = not path.exists()
    if made:
        template = read(spec.tokenizer)
        if spec.tokenizer.path is not None:
            model = read_model(Path(spec.tokenizer.path))
            Tokenizer(model, spec.tokenizer.path, template)
        else:
            sample = _sample(spec, meter, texts)
            meter.begin("tokenizer", f"training on {sum(map(len, sample)) / 1e6:.1f} MB of text")
            model = pool.train(sample, spec.tokenizer.vocab, spec.tokenizer.kind, template)
        if not template.is_default:
            write_atomically(path.with_name(TEMPLATE_FILE), template.encoded())
        write_atomically(path, model)
    tokenizer = Tokenizer.load(path)
    marker = read_marker(out)
    known = "" if marker is None or made else marker.tokenizer
    if known not in ("", tokenizer.hash):
        raise ShardError(f"{path}: not as this build made it (put it back, or delete {out} and check this disk)")
    if not known:
        write_marker(spec, out, tokenizer=tokenizer.hash)
    pool.use(path.read_bytes(), kept(path))
    meter.begin("tokenizer", f"{tokenizer.vocab} ids", "ids", tokenizer.vocab, tokenizer.vocab)
    return tokenizer


def _sample(spec: Build, meter: ProgressMeter, texts: Texts) -> list[str]:
    """Training text for the tokenizer: an equal part from each source, of its training documents only."""
    sample: list[str] = []
    part = -(-spec.tokenizer.sample_bytes // len(spec.data.source))
    for source in spec.data.source:
        meter.begin("read", source.name, "bytes", part)
        size = 0
        for _, record, held_out in texts(source):
            if isinstance(record, Document) and held_out is False:
                sample += record.parts
                size += sum(map(len, record.parts))
                meter.update(size, part)
                if size >= part:
                    break
    return sample


Writers = tuple[SplitWriter, SplitWriter]
Place = tuple[int, bool]  # a document's number within its source, and whether it is held out
Part = tuple[Encoded, tuple[list[Place], list[Rejected], Counter[str]]]  # the last: notes on documents
Ready = Callable[[], Iterator[encode.Ready | Rejected]]
Texts = Callable[[Source], Iterator[tuple[int, Document | Rejected, bool | None]]]


def _build_source(
    spec: Build,
    source: Source,
    called: str,
    out: Path,
    tokenizer: Tokenizer,
    meter: ProgressMeter,
    reading: ReadPosition,
    parts: Callable[[Writers], Iterator[Part]],
) -> None:
    """One source's shards and manifests; the second manifest is the last thing written."""
    directory = out / called
    if all((directory / name / manifests.FILE_NAME).exists() for name in SPLITS):
        (directory / PROGRESS).unlink(missing_ok=True)
        return
    for name in SPLITS:
        (directory / name).mkdir(parents=True, exist_ok=True)
    progress = SourceProgress.load(directory, fingerprint(source))
    meter.begin("encode", called, "bytes")
    rejected: dict[str, int] = {}
    noted: Counter[str] = Counter()
    with (
        SplitWriter(directory / "train", source, spec.data, tokenizer, progress, held_out=False) as train,
        SplitWriter(directory / "held_out", source, spec.data, tokenizer, progress, held_out=True) as held,
        kept_aside(directory / "rejected.jsonl") as kept,
    ):
        for encoded, (places, broken, more) in parts((train, held)):
            noted += more
            for record in broken:
                rejected[record.reason] = rejected.get(record.reason, 0) + 1
                kept.write(msgspec.json.encode(record) + b"\n")
            _write(encoded, places, train, held)
            _tell(meter, source, reading, train, held)
            if train.full and held.full:
                break
        train.finish()
        held.finish()
        if spec.data.clean is None and not train.documents + held.documents:
            unreadable(source, rejected)
    if spec.data.clean is None and fingerprint(source) != progress.inputs:  # else its text was taken before
        raise changed(source)
    for writer in (train, held):
        SplitManifest(
            source=called,
            split=writer.name,
            kind=source.kind,
            origin=describe(source),
            tokenizer=tokenizer.hash,
            vocab=tokenizer.vocab,
            dtype=writer.dtype,
            frame_items=spec.data.frame_tokens,
            tokens=writer.tokens,
            documents=writer.documents,
            text_bytes=writer.text_bytes,
            rejected=dict(sorted(rejected.items())),
            notes=dict(sorted(noted.items())),
            shards=tuple(writer.shards),
        ).save(writer.directory)
    (directory / PROGRESS).unlink(missing_ok=True)


def _batches(
    spec: Build, source: Source, reading: ReadPosition, writers: Writers, tokenizer: Tokenizer
) -> Iterator[tuple[list[Document], tuple[list[Place], list[Rejected], Counter[str]]]]:
    """Documents in batches, with their places, the broken records met on the way, and notes.

    Documents that are already in a shard, or for which there is no room, are not sent to be encoded; but they count for
    where a batch ends, so that batches are the same whenever a build was interrupted and however it runs ahead.
    """
    found: list[Document] = []
    places: list[Place] = []
    broken: list[Rejected] = []
    noted: Counter[str] = Counter()
    size = count = 0
    for number, record, held_out in split(source, spec.data.held_out, spec.seed, reading):
        if isinstance(record, Rejected):
            broken.append(record)
            size += len(record.record)
        elif held_out is not None:
            size += sum(map(len, record.parts))
            writer = writers[held_out]
            # Told here and not where it is encoded: a build that goes on must count those that it does not encode again.
            refused = refusal(tokenizer, source.kind, record)
            if refused:
                broken.append(Rejected(record.where or source.name, refused, "\n".join(record.parts)[:KEPT_ASIDE]))
            else:
                noted.update(notes(tokenizer, source.kind, record))
                if number >= writer.next_document and not writer.full:
                    found.append(record)
                    places.append((number, held_out))
        count += 1
        if size >= BATCH_CHARACTERS or count >= BATCH_DOCUMENTS:
            yield found, (places, broken, noted)
            found, places, broken, noted = [], [], [], Counter()
            size = count = 0
    yield found, (places, broken, noted)


def _ready(
    spec: Build, source: Source, writers: Writers, records: Iterator[encode.Ready | Rejected], noted: Counter[str]
) -> Iterator[Part]:
    """Documents that are encoded already, in batches, with their places; the notes on all of them come with the first."""
    batch: list[encode.Ready] = []
    places: list[Place] = []
    broken: list[Rejected] = []
    tokens = 0
    for number, record, held_out in divide(source, spec.data.held_out, spec.seed, lambda held_out, wanted: records):
        if isinstance(record, Rejected):
            broken.append(record)
        elif held_out is not None and number >= writers[held_out].next_document and not writers[held_out].full:
            batch.append(record)
            places.append((number, held_out))
            tokens += len(record.tokens)
        if len(batch) + len(broken) >= BATCH_DOCUMENTS or tokens >= BATCH_CHARACTERS:
            yield encode.gathered(batch), (places, broken, noted)
            batch, places, broken, noted = [], [], [], Counter()
            tokens = 0
    yield encode.gathered(batch), (places, broken, noted)


def _write(encoded: Encoded, places: list[Place], train: SplitWriter, held: SplitWriter) -> None:
    start = 0
    for (number, held_out), length, size in zip(places, encoded.lengths, encoded.text_bytes, strict=True):
        stop = start + length
        mask = None if encoded.mask is None else encoded.mask[start:stop]
        (held if held_out else train).add(number, encoded.tokens[start:stop], mask, size)
        start = stop


def _tell(meter: ProgressMeter, source: Source, reading: ReadPosition, train: SplitWriter, held: SplitWriter) -> None:
    if source.max_tokens is not None:
        meter.update(train.tokens + held.tokens, source.max_tokens, unit="tokens")
    elif source.max_documents is not None or not reading.total:
        meter.update(train.documents + held.documents, source.max_documents, unit="documents")
    else:
        meter.update(reading.done, reading.total, unit="bytes")


def _verify(sources: list[str], out: Path, meter: ProgressMeter) -> dict[str, str]:
    """Read all of it back; the manifests' digests by SOURCE/SPLIT."""
    names = [f"{source}/{name}" for source in sources for name in SPLITS]
    meter.begin("verify", str(out), "manifests", len(names))
    digests = {}
    for number, name in enumerate(names, 1):
        for message in manifests.verify(out / name):
            raise ShardError(f"written, but not read back the same: {message}; check this disk")
        digests[name] = manifests.load(out / name).digest
        meter.update(number, len(names), now=True)
    return digests
