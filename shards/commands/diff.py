"""`shards diff`: what differs between two builds, down to the first document that does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards.commands.output import working
from shards.common.errors import ShardError, SpecError
from shards.common.terminal import write_json, write_out
from shards.format.corpus import Corpus, sources
from shards.format.manifest import FILE_NAME as MANIFEST
from shards.format.manifest import SPLITS, SplitManifest, load
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

CHUNK = 1024  # documents compared at a time
SHOWN = 70  # characters of a document that differs
LINE = 78  # characters of a difference that is told in one line
COUNTS = ("kind", "tokenizer", "dtype", "frame_items", "documents", "tokens", "text_bytes", "rejected", "notes", "origin")


class Difference(msgspec.Struct, frozen=True):
    """One thing that differs."""

    what: str  # spec.KEY, tokenizer, SOURCE, or SOURCE/SPLIT.KEY
    a: Any
    b: Any


def main(args: argparse.Namespace) -> int:
    a, b = Path(args.a), Path(args.b)
    for root in (a, b):
        if not any(sources(root, split) for split in SPLITS):
            raise SpecError(f"{root}: no shards here (give the directory that was built)")
    found = [*_spec(a, b), *_tokenizers(a, b)]
    names = [{path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/{MANIFEST}")} for root in (a, b)]
    found += [Difference(name, "there" if name in names[0] else None, "there" if name in names[1] else None)
              for name in sorted(names[0] ^ names[1])]  # fmt: skip
    both = sorted(names[0] & names[1])
    manifests = {name: (load(a / name), load(b / name)) for name in both}
    differing = [name for name, (x, y) in manifests.items() if x.digest != y.digest]
    total = sum(min(manifests[name][0].documents, manifests[name][1].documents) for name in differing)
    done = 0
    with working(args, "compare", f"{a.name} and {b.name}", "documents", total) as meter:
        for name in differing:
            before = done

            def tell(count: int, before: int = before) -> None:
                meter.update(before + count, total)

            found += _manifests(name, *manifests[name])
            found += _first_document(name, a, b, tell)
            done += min(manifests[name][0].documents, manifests[name][1].documents)
    if args.json:
        write_json({"same": not found, "differences": found})
    elif not found:
        write_out(f"the same: {len(both)} manifests, every hash in them, tokenizer and spec")
    else:
        for each in found:
            line = f"{each.what}: {_said(each.a)} -> {_said(each.b)}"
            write_out(line if len(line) <= LINE else f"{each.what}\n  - {_said(each.a)}\n  + {_said(each.b)}")
    return 1 if found else 0


def _said(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _spec(a: Path, b: Path) -> list[Difference]:
    """Keys of the two specs, but for where they were built."""
    from shards.build.marker import read_marker

    plain = []
    for root in (a, b):
        marker = read_marker(root)
        spec: dict[str, Any] = {} if marker is None else msgspec.to_builtins(marker.spec)
        spec.pop("out", None), spec.get("data", {}).pop("dir", None)
        by_name = {f"source {each['name']}": each for each in spec.get("data", {}).pop("source", ())}
        plain.append({**spec, **by_name})
    # What one of them lacks altogether is said once, not key by key.
    alone = plain[0].keys() ^ plain[1].keys()
    found = [Difference(f"spec.{key}", *("there" if key in each else None for each in plain)) for key in sorted(alone)]
    plain = [_flat({key: value for key, value in each.items() if key not in alone}, "spec") for each in plain]
    return found + [Difference(key, plain[0].get(key), plain[1].get(key)) for key in sorted({*plain[0], *plain[1]})
            if plain[0].get(key) != plain[1].get(key)]  # fmt: skip


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: inner for name, each in value.items() for key, inner in _flat(each, f"{prefix}.{name}").items()}


def _tokenizers(a: Path, b: Path) -> list[Difference]:
    x, y = (Tokenizer.load(root / FILE_NAME) for root in (a, b))
    if x.hash == y.hash:
        return []
    return [Difference("tokenizer", f"{x.hash[:12]}, {x.vocab} ids", f"{y.hash[:12]}, {y.vocab} ids")]


def _manifests(name: str, x: SplitManifest, y: SplitManifest) -> list[Difference]:
    found = [Difference(f"{name}.{key}", getattr(x, key), getattr(y, key)) for key in COUNTS if getattr(x, key) != getattr(y, key)]
    if len(x.shards) != len(y.shards):
        found.append(Difference(f"{name}.shards", len(x.shards), len(y.shards)))
    return [*found, Difference(f"{name}.digest", x.digest[:12], y.digest[:12])]


def _first_document(name: str, a: Path, b: Path, tell: Callable[[int], None]) -> list[Difference]:
    """The first one that says something else; by its tokens or, where the tokenizers differ, by its text."""
    source, split = name.split("/")
    x, y = (Corpus(root, source, split) for root in (a, b))
    tokenizers = [Tokenizer.load(root / FILE_NAME) for root in (a, b)]
    by_text = tokenizers[0].hash != tokenizers[1].hash

    def text(which: int, document: int) -> str:
        corpus = (x, y)[which]
        return tokenizers[which].decode(corpus.read(*corpus.span(document)), reserved=True)

    count = min(x.documents, y.documents)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        same = not by_text and _same(x, y, start, stop)
        for document in range(start, start if same else stop):
            if text(0, document) != text(1, document) or not (by_text or _same(x, y, document, document + 1)):
                return [Difference(f"{name}, document {document}", *_apart(text(0, document), text(1, document)))]
        tell(stop)
    if x.documents == y.documents:
        return []
    more = [text(which, count)[:SHOWN] if corpus.documents > count else None for which, corpus in enumerate((x, y))]
    return [Difference(f"{name}, document {count}", *more)]


def _same(x: Corpus, y: Corpus, start: int, stop: int) -> bool:
    """Whether documents [start, stop) have the same tokens and masks."""
    ranges = [(corpus.span(start)[0], corpus.span(stop - 1)[1]) for corpus in (x, y)]
    if not np.array_equal(x.ends(start, stop) - ranges[0][0], y.ends(start, stop) - ranges[1][0]):
        return False
    columns = ("tokens",) if x.manifest.kind == "text" else ("tokens", "mask")
    if x.manifest.kind != y.manifest.kind:
        raise ShardError(f"{x.directory}: kind {x.manifest.kind}, {y.directory}: kind {y.manifest.kind} (compare like with like)")
    return all(np.array_equal(x.read(*ranges[0], column), y.read(*ranges[1], column)) for column in columns)


def _apart(a: str, b: str) -> tuple[str, str]:
    """The texts from a little before where they differ."""
    place = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, place - 20)
    return (repr(a[start : start + SHOWN]), repr(b[start : start + SHOWN])) if a != b else ("other tokens or mask", repr(b[:SHOWN]))
