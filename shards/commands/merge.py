"""`shards merge`: one directory of several builds that share a tokenizer.

Files become hard links where the disk allows it, else copies. A source that several builds have gets all their shards, in
the order of the builds; one that is the very same in two is taken once. All of it is verified; nothing is left of a
merge that failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from shards.commands.output import size, working
from shards.common.errors import ShardError, SpecError
from shards.common.progress import ProgressMeter
from shards.common.terminal import write_json, write_out
from shards.format.corpus import sources
from shards.format.manifest import SPLITS, Shard, SplitManifest, load, verify
from shards.format.seekable_zstd import ColumnFile
from shards.spec import Build
from shards.tokenization.templates import FILE_NAME as TEMPLATE_FILE
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

ALIKE = ("kind", "dtype", "frame_items", "vocab")
REJECTED = "rejected.jsonl"

Found = dict[str, list[tuple[Path, SplitManifest]]]  # by SOURCE/SPLIT, the manifests of each build with their directories


def main(args: argparse.Namespace) -> int:
    out, builds = Path(args.out), [Path(build) for build in args.builds]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out}: there is something already (name a new directory)")
    _check_tokenizers(builds)
    found = _collect(builds)
    being_made = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        being_made.mkdir(parents=True)
        made = _make(args, being_made, found, builds)
        fits = _mark(being_made, out, builds, found, made)
        if out.exists():
            out.rmdir()
        os.replace(being_made, out)
    except OSError as error:
        raise ShardError(f"{error.filename or out}: {error.strerror} (make room or access, then merge again)") from None
    finally:
        shutil.rmtree(being_made, ignore_errors=True)
    told = {name: {"tokens": each.tokens, "documents": each.documents, "shards": len(each.shards)} for name, each in made.items()}
    if args.json:
        write_json({"out": str(out), "sources": told, "fits_recipe": fits})
        return 0
    for name, each in made.items():
        several = len(found[name]) > 1
        write_out(
            f"{name}: {each.tokens:,} tokens, {each.documents:,} documents" + (f", of {len(found[name])} builds" if several else "")
        )
    write_out(f"{out} is whole: {sum(each.tokens for each in made.values()):,} tokens")
    if fits:
        listed = ", ".join(fits)
        write_out(f"a recipe with the sources {listed}, in this order, and the [tokenizer] of {builds[0]}")
        write_out("may have it as its [data] dir")
    else:
        write_out("no recipe describes it: of one source it has several builds, or they were built with other settings")
    return 0


def _check_tokenizers(builds: Sequence[Path]) -> None:
    known = [Tokenizer.load(build / FILE_NAME) for build in builds]
    for build, tokenizer in zip(builds, known, strict=True):
        if tokenizer.hash != known[0].hash:
            raise SpecError(
                f"{build}: made with tokenizer {tokenizer.hash[:12]}, {builds[0]} with {known[0].hash[:12]}"
                f' (build it again with [tokenizer] path = "{builds[0] / FILE_NAME}")'
            )


def _collect(builds: Sequence[Path]) -> Found:
    from shards.build.marker import read_marker

    found: Found = {}
    for build in builds:
        marker = read_marker(build)
        if marker is not None and not marker.done:
            raise SpecError(f"{build}: its build is not done (give its command again first)")
        names = sorted({name for split in SPLITS for name in sources(build, split)})
        if not names:
            raise SpecError(f"{build}: no shards here (give directories that were built)")
        for place in (build / name / split for name in names for split in SPLITS):
            manifest = load(place)
            others = found.setdefault(f"{manifest.source}/{manifest.split}", [])
            for directory, other in others:
                for key in ALIKE:
                    if getattr(manifest, key) != getattr(other, key):
                        raise SpecError(
                            f"{place}: {key} {getattr(manifest, key)}, {directory}: {getattr(other, key)}"
                            " (rename one of the sources, or build it as the other)"
                        )
            if manifest.digest not in [other.digest for _, other in others]:
                others.append((place, manifest))
    return found


def _make(args: argparse.Namespace, out: Path, found: Found, builds: Sequence[Path]) -> dict[str, SplitManifest]:
    for name in (FILE_NAME, TEMPLATE_FILE):
        if (builds[0] / name).exists():
            shutil.copyfile(builds[0] / name, out / name)
    total = sum(column.bytes for each in found.values() for _, manifest in each for column in _columns(manifest))
    done = 0
    made: dict[str, SplitManifest] = {}
    with working(args, "merge", f"{args.out}, {size(total)}", "bytes", 2 * total) as meter:
        for name, parts in found.items():
            (out / name).mkdir(parents=True)
            shards: list[Shard] = []
            for place, manifest in parts:
                for shard in manifest.shards:
                    shards.append(_take(place, shard, out / name, len(shards), args.copy))
                    done += sum(column.bytes for column in shard.columns.values())
                    meter.update(done, 2 * total)
            made[name] = _merged([manifest for _, manifest in parts], shards).save(out / name)
        _verify(out, made, meter, done, total)
    for name in {name.split("/")[0] for name in found}:
        _reject(out / name, [place.parent for place, _ in found[f"{name}/train"]])
    return made


def _mark(place: Path, out: Path, builds: Sequence[Path], found: Found, made: dict[str, SplitManifest]) -> list[str]:
    """Says in build.json what the whole is, as one spec, so that runs take it; its sources, none where no spec would build it."""
    from shards.build.marker import read_marker, write_marker

    markers = [marker for marker in map(read_marker, builds) if marker is not None and marker.done]
    first = markers[0].spec if markers else None
    if first is None or len(markers) < len(builds) or any(len(parts) > 1 for parts in found.values()):
        return []

    def settings(spec: Build) -> tuple[object, ...]:
        return (*msgspec.structs.astuple(msgspec.structs.replace(spec.data, source=(), dir=None)), spec.seed)

    if any(settings(marker.spec) != settings(first) for marker in markers):
        return []
    by_name = {source.name: source for marker in markers for source in marker.spec.data.source}
    data = msgspec.structs.replace(first.data, source=tuple(by_name.values()), dir=None)
    write_marker(msgspec.structs.replace(first, data=data, out=str(out)), place, {name: each.digest for name, each in made.items()})
    return list(by_name)


def _columns(manifest: SplitManifest) -> Iterator[ColumnFile]:
    for shard in manifest.shards:
        yield from shard.columns.values()


def _take(place: Path, shard: Shard, to: Path, number: int, copy: bool) -> Shard:
    """A shard's files under the names that its number gives them."""
    columns = {}
    for name, column in shard.columns.items():
        file = f"{name}-{number:05d}.zst"
        try:
            if copy:
                raise OSError
            os.link(place / column.file, to / file)
        except OSError:
            shutil.copyfile(place / column.file, to / file)
        columns[name] = msgspec.structs.replace(column, file=file)
    return msgspec.structs.replace(shard, columns=columns)


def _merged(parts: Sequence[SplitManifest], shards: Sequence[Shard]) -> SplitManifest:
    rejected: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    for part in parts:
        rejected.update(part.rejected)
        noted.update(part.notes)
    return msgspec.structs.replace(
        parts[0],
        origin="; ".join(dict.fromkeys(part.origin for part in parts)),
        tokens=sum(part.tokens for part in parts),
        documents=sum(part.documents for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        rejected=dict(sorted(rejected.items())),
        notes=dict(sorted(noted.items())),
        shards=tuple(shards),
    )


def _verify(out: Path, made: dict[str, SplitManifest], meter: ProgressMeter, done: int, total: int) -> None:
    def tell(count: int) -> None:
        nonlocal done
        done += count
        meter.update(done, 2 * total)

    for name in made:
        for message in verify(out / name, tell=tell):
            raise ShardError(f"what was merged is not whole: {message}")


def _reject(out: Path, parts: Sequence[Path]) -> None:
    """What was left out of the source's parts, together."""
    files = [part / REJECTED for part in parts if (part / REJECTED).exists()]
    if files:
        with (out / REJECTED).open("wb") as file:
            for each in files:
                file.write(each.read_bytes())
