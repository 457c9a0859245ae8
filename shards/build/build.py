"""Builds shards from a spec: the steps on documents, a tokenizer, the shards of each source, then a check of every byte.

    OUT/build.json          the spec, and whether the build is complete
    OUT/tokenizer.model
    OUT/SOURCE/train/       shards and manifest.json
    OUT/SOURCE/held_out/    the same
    OUT/SOURCE/rejected.jsonl   records that were left out, if any

A build that was killed resumes after its last complete shard and ends with the same bytes as one that was not: documents come
in a fixed order, a shard is renamed into place when it is complete, and `progress.json` then says how far the build got.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.build import report as reporting
from shards.build.marker import build_key, claim, is_built, write_marker
from shards.build.runner import AFTER_TOKENIZER, BEFORE_TOKENIZER, begin, run
from shards.build.streams import streams
from shards.build.train_tokenizer import make_tokenizer
from shards.build.workspace import Work
from shards.build.write import write_source
from shards.common.errors import BusyError, ShardError
from shards.common.progress import ProgressMeter, Report
from shards.format import manifest as manifests
from shards.format.manifest import SPLITS
from shards.readers.sources import fingerprint
from shards.spec import Build, check
from shards.tokenization.encode import Workers
from shards.tokenization.tokenizer import check_template

MOST_WORKERS = 8  # one process reads for all of them


def build(spec: Build, report: Report = lambda progress: None, workers: int | None = None) -> Path:
    """Build what the spec says, or the rest of it, in OUT; returns OUT.

    workers: processes that encode (None: one a core, at most 8; 0: this process does it). Any number gives the same bytes.
    Raises SpecError for a spec that cannot be built, ShardError for a failure while it is built.
    """
    check(spec)
    out = Path(spec.out)
    meter = ProgressMeter(report)
    if is_built(spec):
        if Work(spec, "").root.exists():  # the build was killed at its very end
            with suppress(OSError, BusyError), _locked(out):
                Work(spec, "").remove()
        meter.begin("done", f"{out} is already built")
        return out
    for source in spec.data.source:
        fingerprint(source)  # a missing path is an error now, not after an hour
    check_template(spec.tokenizer)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            claim(spec, out)
            with Workers(min(MOST_WORKERS, _cores()) if workers is None else workers) as pool:
                directories = _build(Work(spec, build_key(spec)), pool, meter)
            digests = _verify(directories, out, meter)
            write_marker(spec, out, digests)
            Work(spec, "").remove()
    except OSError as error:
        raise ShardError(
            f"{error.filename or out}: {error.strerror or error} (make room or access, then give the same command again)"
        ) from None
    tokens = sum(manifests.load(out / name).tokens for name in digests)
    meter.begin("done", f"{out} is built", "tokens", tokens, tokens)
    return out


def _build(work: Work, pool: Workers, meter: ProgressMeter) -> list[str]:
    """The one way from sources to shards; returns the names of their directories. A plain build has no steps to run."""
    begin(work)
    work = run(BEFORE_TOKENIZER, work, pool, meter)
    tokenizer = make_tokenizer(work, pool, meter)
    work = run(AFTER_TOKENIZER, work, pool, meter)
    directories = []
    for stream in streams(work):
        write_source(work, stream, tokenizer, pool, meter)
        directories.append(stream.directory)
    if work.has_steps:
        reporting.save(work, Path(work.build.out), directories)
    return directories


def _cores() -> int:
    """The cores that this process may use; where the system does not say (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds OUT's lock, which the system releases however this process ends. Raises BusyError if another build holds it."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{out}: another build is writing here (wait for it, or use another out)") from None
        yield


def _verify(directories: list[str], out: Path, meter: ProgressMeter) -> dict[str, str]:
    """Read every shard back; the manifests' digests by SOURCE/SPLIT. Raises ShardError where a byte differs."""
    names = [f"{directory}/{name}" for directory in directories for name in SPLITS]
    meter.begin("verify", str(out), "manifests", len(names))
    digests = {}
    for number, name in enumerate(names, 1):
        for message in manifests.verify(out / name):
            raise ShardError(f"read-back verification failed: {message}. Check the disk for errors")
        digests[name] = manifests.load(out / name).digest
        meter.update(number, len(names), now=True)
    return digests
