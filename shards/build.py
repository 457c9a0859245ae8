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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec
import xxhash

from shards import manifest as manifests
from shards.container import TEMPORARY, write_atomically
from shards.encode import Encoded, Workers, refusal
from shards.errors import BusyError, ShardError, SpecError
from shards.manifest import SPLITS, Manifest
from shards.progress import Meter, Report
from shards.records import Document
from shards.sources import KEPT_ASIDE, Reading, Rejected, describe, fingerprint
from shards.spec import STDLIB_KINDS, TEMPLATES, Build, Source, check
from shards.splitting import split
from shards.templates import DEFAULT, kept, read
from shards.templates import FILE_NAME as TEMPLATE_FILE
from shards.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenizer import Tokenizer, check_template, read_model
from shards.writing import PROGRESS, Progress, SplitWriter

BATCH_CHARACTERS = 1 << 19  # of documents sent to a worker at once; decides where a limited source stops reading
BATCH_DOCUMENTS = 2048
MARKER = "build.json"
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


def build_key(build: Build) -> str:
    """Names what a spec builds: equal for equal shards. Where it builds does not count; the Python version does where
    its library is read, and so do the format, and what a template's file says."""
    plain = msgspec.to_builtins(msgspec.structs.replace(build, out="", data=msgspec.structs.replace(build.data, dir=None)))
    # Keys that came later do not count as long as they are not used, so that shards built before them stay what they are.
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
    decides = [manifests.FORMAT, platform.python_version() if reads_library else "", plain]
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(decides, order="sorted"))


def is_built(build: Build) -> bool:
    """Whether OUT already holds all of this spec; cheap, reads no shards."""
    marker = _read_marker(Path(build.out))
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
    meter = Meter(report)
    if is_built(spec):
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
                tokenizer = _make_tokenizer(spec, out, pool, meter)
                for source in spec.data.source:
                    _build_source(spec, source, out, tokenizer, pool, meter)
            digests = _verify(spec, out, meter)
            _write_marker(spec, out, digests)
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


def _read_marker(out: Path) -> Marker | None:
    try:
        return msgspec.json.decode((out / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_marker(spec: Build, out: Path, digests: dict[str, str] | None = None) -> None:
    marker = Marker(build_key(spec), digests is not None, platform.python_version(), spec, digests or {})
    write_atomically(out / MARKER, msgspec.json.format(msgspec.json.encode(marker), indent=1) + b"\n")


def conflict(spec: Build) -> str:
    """Why OUT cannot hold what the spec says, before anything is begun; empty where it can."""
    out = Path(spec.out)
    marker = _read_marker(out)
    if marker is not None and marker.key != build_key(spec):
        return f"{out}: built from another spec: {_difference(marker, spec)} (use another out, or delete it)"
    return ""


def _claim(spec: Build, out: Path) -> None:
    """Begin in an empty directory or go on in one's own; refuse any other. Removes what a killed build left half."""
    marker = _read_marker(out)
    if marker is not None and marker.key != build_key(spec):
        raise SpecError(f"{out}: built from another spec: {_difference(marker, spec)} (use another out, or delete it)")
    if marker is None:
        others = sorted(path.name for path in out.iterdir() if path.name != ".lock" and not path.name.endswith(TEMPORARY))
        if others:
            raise SpecError(f'{out}: not empty and not a build of shards: holds "{others[0]}" (use another out)')
        _write_marker(spec, out)
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
        return f"{template} by Python {marker.python} or another format".strip()
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


def _make_tokenizer(spec: Build, out: Path, pool: Workers, meter: Meter) -> Tokenizer:
    path = out / TOKENIZER_FILE
    if not path.exists():
        template = read(spec.tokenizer)
        if spec.tokenizer.path is not None:
            model = read_model(Path(spec.tokenizer.path))
            Tokenizer(model, spec.tokenizer.path, template)
        else:
            texts = _sample(spec, meter)
            meter.begin("tokenizer", f"training on {sum(map(len, texts)) / 1e6:.1f} MB of text")
            model = pool.train(texts, spec.tokenizer.vocab, spec.tokenizer.kind, template)
        if not template.is_default:
            write_atomically(path.with_name(TEMPLATE_FILE), template.encoded())
        write_atomically(path, model)
    tokenizer = Tokenizer.load(path)
    pool.use(path.read_bytes(), kept(path))
    meter.begin("tokenizer", f"{tokenizer.vocab} ids", "ids", tokenizer.vocab, tokenizer.vocab)
    return tokenizer


def _sample(spec: Build, meter: Meter) -> list[str]:
    """Training text for the tokenizer: an equal part from each source, of its training documents only."""
    texts: list[str] = []
    part = -(-spec.tokenizer.sample_bytes // len(spec.data.source))
    for source in spec.data.source:
        meter.begin("read", source.name, "bytes", part)
        size = 0
        for _, record, held_out in split(source, spec.data.held_out, spec.seed, Reading()):
            if isinstance(record, Document) and held_out is False:
                texts += record.parts
                size += sum(map(len, record.parts))
                meter.update(size, part)
                if size >= part:
                    break
    return texts


def _build_source(spec: Build, source: Source, out: Path, tokenizer: Tokenizer, pool: Workers, meter: Meter) -> None:
    """One source's shards and manifests; the second manifest is the last thing written."""
    directory = out / source.name
    if all((directory / name / manifests.FILE_NAME).exists() for name in SPLITS):
        (directory / PROGRESS).unlink(missing_ok=True)
        return
    for name in SPLITS:
        (directory / name).mkdir(parents=True, exist_ok=True)
    progress = Progress.load(directory, fingerprint(source))
    reading = Reading()
    meter.begin("encode", source.name, "bytes")
    rejected: dict[str, int] = {}
    with (
        SplitWriter(directory / "train", source, spec.data, tokenizer, progress, held_out=False) as train,
        SplitWriter(directory / "held_out", source, spec.data, tokenizer, progress, held_out=True) as held,
        _kept_aside(directory / "rejected.jsonl") as kept,
    ):
        batches = _batches(spec, source, reading, (train, held), tokenizer)
        for encoded, (places, broken) in pool.encode(source.kind, batches):
            for record in broken:
                rejected[record.reason] = rejected.get(record.reason, 0) + 1
                kept.write(msgspec.json.encode(record) + b"\n")
            _write(encoded, places, train, held)
            _tell(meter, source, reading, train, held)
            if train.full and held.full:
                break
        train.finish()
        held.finish()
    for writer in (train, held):
        Manifest(
            source=source.name,
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
            shards=tuple(writer.shards),
        ).save(writer.directory)
    (directory / PROGRESS).unlink()


@contextmanager
def _kept_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file for broken records that is there in the end if any were written, and all the source was read."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
        if temporary.stat().st_size:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


Place = tuple[int, bool]  # a document's number within its source, and whether it is held out


def _batches(
    spec: Build, source: Source, reading: Reading, writers: tuple[SplitWriter, SplitWriter], tokenizer: Tokenizer
) -> Iterator[tuple[list[Document], tuple[list[Place], list[Rejected]]]]:
    """Documents in batches, with their places, and the broken records met on the way.

    Documents that are already in a shard, or for which there is no room, are not sent to be encoded; but they count for
    where a batch ends, so that batches are the same whenever a build was interrupted and however it runs ahead.
    """
    found: list[Document] = []
    places: list[Place] = []
    broken: list[Rejected] = []
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
            elif number >= writer.next_document and not writer.full:
                found.append(record)
                places.append((number, held_out))
        count += 1
        if size >= BATCH_CHARACTERS or count >= BATCH_DOCUMENTS:
            yield found, (places, broken)
            found, places, broken = [], [], []
            size = count = 0
    yield found, (places, broken)


def _write(encoded: Encoded, places: list[Place], train: SplitWriter, held: SplitWriter) -> None:
    start = 0
    for (number, held_out), length, size in zip(places, encoded.lengths, encoded.text_bytes, strict=True):
        stop = start + length
        mask = None if encoded.mask is None else encoded.mask[start:stop]
        (held if held_out else train).add(number, encoded.tokens[start:stop], mask, size)
        start = stop


def _tell(meter: Meter, source: Source, reading: Reading, train: SplitWriter, held: SplitWriter) -> None:
    if source.max_tokens is not None:
        meter.update(train.tokens + held.tokens, source.max_tokens, unit="tokens")
    elif source.max_documents is not None or not reading.total:
        meter.update(train.documents + held.documents, source.max_documents, unit="documents")
    else:
        meter.update(reading.done, reading.total, unit="bytes")


def _verify(spec: Build, out: Path, meter: Meter) -> dict[str, str]:
    """Read all of it back; the manifests' digests by SOURCE/SPLIT."""
    names = [f"{source.name}/{name}" for source in spec.data.source for name in SPLITS]
    meter.begin("verify", str(out), "manifests", len(names))
    digests = {}
    for number, name in enumerate(names, 1):
        for message in manifests.verify(out / name):
            raise ShardError(f"written, but not read back the same: {message}; check this disk")
        digests[name] = manifests.load(out / name).digest
        meter.update(number, len(names), now=True)
    return digests
