"""`shards stats`: tokens by source, documents' lengths, documents in a window, bytes a token, the vocabulary's use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shards.build.report import counted
from shards.commands.output import directories, print_table, short, size, working
from shards.common.errors import SpecError
from shards.common.progress import ProgressMeter
from shards.common.terminal import write_json, write_out
from shards.format.corpus import Corpus
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

CHUNK = 1 << 20  # tokens read at a time
TOP = 10
WIDTH = 24  # of a histogram's longest bar

Counts = npt.NDArray[np.int64]


class SplitStatistics(msgspec.Struct, frozen=True):
    """One source and split."""

    source: str
    split: str
    kind: str
    tokens: int
    documents: int
    text_bytes: int
    bytes_per_token: float
    compressed_bits_per_token: float
    length_min_median_p90_max: list[int]
    lengths: dict[int, int]  # documents of at most so many tokens, and of more than the number before
    context: int
    documents_in_window: float  # the mean over all windows of text; of other kinds documents are not cut: 0
    longer_than_context: int
    rejected: dict[str, int]
    notes: dict[str, int]


def main(args: argparse.Namespace) -> int:
    if args.context < 1:
        raise SpecError(f"--context is {args.context} (use at least 1)")
    corpora = [Corpus(place.parent.parent, place.parent.name, place.name) for place in directories(Path(args.path))]
    entries = [_entry(corpus, args.context) for corpus in corpora]
    used = None if args.quick else _counted(args, corpora)
    vocabulary = None if used is None else _vocabulary(corpora[0], used)
    if args.json:
        found: list[dict[str, Any]] = [msgspec.to_builtins(entry) for entry in entries]
        write_json(found if vocabulary is None else [{**entry, "vocabulary": vocabulary} for entry in found])
        return 0
    _show(entries)
    if vocabulary is not None:
        _show_vocabulary(vocabulary)
    return 0


def _entry(corpus: Corpus, context: int) -> SplitStatistics:
    manifest, lengths = corpus.manifest, corpus.lengths()
    on_disk = sum(shard.columns["tokens"].bytes for shard in manifest.shards)
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 1]).astype(int).tolist() if len(lengths) else [0] * 4
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)) if len(lengths) else np.zeros(0, int)
    return SplitStatistics(
        source=manifest.source,
        split=manifest.split,
        kind=manifest.kind,
        tokens=manifest.tokens,
        documents=manifest.documents,
        text_bytes=manifest.text_bytes,
        bytes_per_token=round(manifest.text_bytes / max(manifest.tokens, 1), 3),
        compressed_bits_per_token=round(8 * on_disk / max(manifest.tokens, 1), 2),
        length_min_median_p90_max=quantiles,
        lengths={1 << power: int(count) for power, count in enumerate(bins) if count},
        context=context,
        documents_in_window=_in_windows(lengths, context) if manifest.kind == "text" else 0.0,
        longer_than_context=int(np.count_nonzero(lengths - 1 > context)),
        rejected=manifest.rejected,
        notes=manifest.notes,
    )


def _in_windows(lengths: Counts, context: int) -> float:
    """The mean number of documents that a window of `context` tokens has parts of."""
    ends = np.cumsum(lengths)
    windows = int(ends[-1] - 1) // context if len(ends) else 0
    if not windows:
        return float(len(lengths))
    starts = np.arange(windows) * context
    first, last = (np.searchsorted(ends, places, side="right") for places in (starts, starts + context - 1))
    return round(float(np.mean(last - first + 1)), 2)


def _counted(args: argparse.Namespace, corpora: list[Corpus]) -> Counts:
    """How often each id comes, all corpora together: [vocabulary]."""
    total = sum(corpus.tokens for corpus in corpora)
    counts = np.zeros(max(corpus.manifest.vocab for corpus in corpora), np.int64)
    done = 0
    with working(args, "count", args.path, "tokens", total) as meter:
        for corpus in corpora:
            done = _count(corpus, counts, meter, done, total)
    return counts


def _count(corpus: Corpus, counts: Counts, meter: ProgressMeter, done: int, total: int) -> int:
    for start in range(0, corpus.tokens, CHUNK):
        ids = corpus.read(start, min(start + CHUNK, corpus.tokens))
        counts += np.bincount(ids, minlength=len(counts))
        done += len(ids)
        meter.update(done, total)
    return done


def _vocabulary(corpus: Corpus, counts: Counts) -> dict[str, Any]:
    tokenizer = Tokenizer.load(corpus.directory.parent.parent / FILE_NAME)
    top = np.argsort(-counts, kind="stable")[:TOP]
    never = np.flatnonzero(counts == 0)
    half = int(np.searchsorted(np.cumsum(np.sort(counts)[::-1]), counts.sum() / 2)) + 1
    return {
        "ids": len(counts),
        "never": len(never),
        "never_first": [[int(number), tokenizer.piece(int(number))] for number in never[:TOP]],
        "half": half,
        "top": [[int(number), tokenizer.piece(int(number)), int(counts[number])] for number in top if counts[number]],
        "tokens": int(counts.sum()),
    }


def _show(entries: list[SplitStatistics]) -> None:
    columns = ["source", "split", "tokens>", "documents>", "text>", "B/token>", "bits on disk>", "left out>"]
    rows = [
        [
            each.source, each.split, f"{each.tokens:,}", f"{each.documents:,}", size(each.text_bytes),
            f"{each.bytes_per_token:.2f}", f"{each.compressed_bits_per_token:.1f}", f"{sum(each.rejected.values()):,}",
        ]
        for each in entries
    ]  # fmt: skip
    print_table(columns, rows)
    reasons = {each.source: each.rejected for each in entries if each.rejected}
    for source, rejected in reasons.items():
        write_out(f"left out of {source}: {counted(rejected)}")
    for source, notes in {each.source: each.notes for each in entries if each.notes}.items():
        write_out(f"kept of {source}, but: {counted(notes)}")
    write_out()
    rows = [
        [
            each.source, each.split, *(f"{length:,}" for length in each.length_min_median_p90_max),
            f"{each.documents_in_window:,.1f}" if each.kind == "text" else "-", f"{each.longer_than_context:,}",
        ]
        for each in entries
    ]  # fmt: skip
    context = f"{entries[0].context:,}"
    columns = ["source", "split", "min>", "median>", "90 %>", "max>", "in a window>", "longer>"]
    print_table(columns, rows, f"documents' tokens, and documents in a window of {context} or longer")
    write_out()
    for each in entries:
        if each.split == "train" and each.lengths:
            most = max(each.lengths.values())
            bars = [
                [f"{top // 2 + 1 if top > 1 else 1:,} to {top:,}", "▇" * max(1, round(WIDTH * count / most)), f"{count:,}"]
                for top, count in each.lengths.items()
            ]
            print_table(["tokens>", "documents", ">"], bars, f"lengths of {each.source}")
            write_out()


def _show_vocabulary(found: dict[str, Any]) -> None:
    used = found["ids"] - found["never"]
    write_out(f"vocabulary: {used:,} of {found['ids']:,} ids come; {found['half']:,} ids make half of all tokens")
    if found["never_first"]:
        names = " ".join(repr(piece) for _, piece in found["never_first"])
        write_out(f"never: {found['never']:,} ids, the first {names}")
    rows = [
        [f"{number}", repr(piece), short(count), f"{100 * count / found['tokens']:.1f} %"] for number, piece, count in found["top"]
    ]
    print_table(["id>", "most often", "times>", "of all>"], rows)
