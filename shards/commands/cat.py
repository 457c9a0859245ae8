"""`shards cat`: prints a document, a range of tokens, or a sample, as text with its loss mask, or as ids.

On a terminal tokens that count for the loss are green, a rejected response is red and a prompt is dim; elsewhere the former are in
`⟦ ⟧` and a rejected response is in `⟨ ⟩`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.common.arrays import Array
from shards.common.errors import SpecError
from shards.common.terminal import make_console, safe, write_json, write_out
from shards.format.corpus import Corpus, sources
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

STYLES = {0: "dim", 1: "green", 2: "red"}
MARKS = {0: ("", ""), 1: ("⟦", "⟧"), 2: ("⟨", "⟩")}


@dataclass(frozen=True)
class TokenRun:
    """Tokens in a row, of one document."""

    title: str
    start: int  # of the source's tokens
    ids: Array
    mask: npt.NDArray[np.uint8] | None  # 0 prompt, 1 learned or chosen, 2 rejected; None: plain text


def main(args: argparse.Namespace) -> int:
    root = Path(args.path)
    corpus = _corpus(root, args)
    name, split = corpus.manifest.source, corpus.manifest.split
    if args.sample is not None:
        parts = _sample(corpus, args.sample, args.context)
    elif args.document is not None:
        if not 0 <= args.document < corpus.documents:
            raise SpecError(f"{name} has documents 0 to {corpus.documents - 1}, not {args.document}")
        parts = _cut(corpus, *corpus.span(args.document))
    else:
        parts = _cut(corpus, *_range(args.tokens, corpus.tokens))
    tokenizer = Tokenizer.load(root / FILE_NAME)
    ids = [number for part in parts for number in part.ids.tolist()]
    if args.json:
        plain = {"source": name, "split": split, "start": parts[0].start if parts else 0, "ids": ids}
        whole = "".join(tokenizer.decode(part.ids, reserved=True) for part in parts)
        write_json({**plain, "text": whole, "parts": [_plain(part, tokenizer) for part in parts]})
    elif args.ids:
        write_out(" ".join(map(str, ids)))
    else:
        _print(parts, tokenizer, always=args.sample is not None)
    return 0


def _corpus(root: Path, args: argparse.Namespace) -> Corpus:
    known = sources(root, args.split)
    if not known:
        raise SpecError(f"{root}: no shards here (give the directory that was built)")
    name = args.source or known[0]
    if name not in known:
        raise SpecError(f'{root}: there is no source "{name}" (there are: {", ".join(known)})')
    return Corpus(root, name, args.split)


def _range(text: str, tokens: int) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        start, stop = int(first or 0), int(last or tokens)
    except ValueError:
        raise SpecError(f"--tokens {text}: not a range (such as 1000:1200)") from None
    if not 0 <= start <= stop <= tokens:
        raise SpecError(f"--tokens {text}: outside 0:{tokens}")
    return start, stop


def _cut(corpus: Corpus, start: int, stop: int) -> list[TokenRun]:
    """The documents of a range, or as much of them as lies in it."""
    if start == stop:
        return []
    first, last = corpus.document_at(start), corpus.document_at(stop - 1)
    ends = [*np.minimum(corpus.ends(first, last + 1), stop).tolist()]
    masked = corpus.manifest.kind != "text"
    parts = []
    for number, (low, high) in enumerate(itertools.pairwise([start, *ends]), first):
        mask = corpus.read(low, high, "mask") if masked else None
        parts.append(TokenRun(f"document {number}, tokens {low} to {high}", low, corpus.read(low, high), mask))
    return parts


def _sample(corpus: Corpus, sample: int, context: int | None) -> list[TokenRun]:
    """What the trainer reads at this context: a window of text, a row of packed conversations, or a pair."""
    from shards.sampling.packing import make
    from shards.sampling.rows import LabelledView, PairView, TextView

    if context is None or context < 1:
        raise SpecError("--sample needs --context, the tokens of a row (such as --context 4096)")
    kind, name = corpus.manifest.kind, corpus.manifest.source
    if kind == "text":
        windows = TextView(corpus, context, masked_documents=False, restart_positions=False)
        _check(name, sample, windows.size, context)
        return _cut(corpus, sample * context, min((sample + 1) * context + 1, corpus.tokens))
    if kind == "sft":
        plan = make(corpus, context, "truncate")
        _check(name, sample, plan.rows, context)
        spans = [corpus.span(document) for document in plan.row(sample)]
        return [part for start, stop in spans for part in _cut(corpus, start, min(stop, start + context + 1))]
    if kind == "unpaired":
        labelled = LabelledView(corpus, context)
        _check(name, sample, labelled.size, context)
        prompt, ids, desirable = labelled.response(sample)
        number = 1 if desirable else 2
        mask = np.where(np.arange(len(ids)) < prompt, 0, number).astype(np.uint8)
        title = f"document {sample}, {'desirable' if desirable else 'undesirable'}"
        return [TokenRun(title, corpus.span(sample)[0], ids, mask)]
    pairs = PairView(corpus, context)
    _check(name, sample, pairs.size, context)
    prompt, *responses = pairs.pair(sample)
    start = corpus.span(sample)[0]
    titles = ("chosen", "rejected")
    return [
        TokenRun(f"document {sample}, {title}", start, ids, np.where(np.arange(len(ids)) < prompt, 0, number).astype(np.uint8))
        for number, (title, ids) in enumerate(zip(titles, responses, strict=True), 1)
    ]


def _check(name: str, sample: int, size: int, context: int) -> None:
    if not 0 <= sample < size:
        raise SpecError(f"{name} has samples 0 to {size - 1} at a context of {context}, not {sample}")


def _runs(part: TokenRun) -> Iterator[tuple[int, Array]]:
    """Runs of tokens with the same mask."""
    mask = np.zeros(len(part.ids), np.uint8) if part.mask is None else part.mask
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    for start, stop in itertools.pairwise(cuts):
        yield int(mask[start]), part.ids[start:stop]


def _plain(part: TokenRun, tokenizer: Tokenizer) -> dict[str, object]:
    mask = None if part.mask is None else part.mask.tolist()
    text = tokenizer.decode(part.ids, reserved=True)
    return {"title": part.title, "start": part.start, "ids": part.ids.tolist(), "mask": mask, "text": text}


def _print(parts: list[TokenRun], tokenizer: Tokenizer, *, always: bool) -> None:
    """always: print the headers in a pipe, too."""
    from rich.text import Text

    console = make_console()
    for number, part in enumerate(parts):
        if console.is_terminal:
            console.rule(Text(part.title, style="dim"), style="dim", align="left")
        elif always or (number and part.mask is not None):
            write_out(f"--- {part.title}")
        for kind, ids in _runs(part):
            text = tokenizer.decode(ids, reserved=True)
            if part.mask is not None and console.is_terminal and console.color_system is not None:
                console.print(Text(safe(text, lines=True), style=STYLES[kind]), end="", soft_wrap=True)
            else:
                left, right = MARKS[kind] if part.mask is not None else ("", "")
                shown = f"{left}{text}{right}"
                if console.is_terminal:
                    console.print(Text(safe(shown, lines=True)), end="", soft_wrap=True)
                else:
                    write_out(shown, end="")
        if console.is_terminal or always or part.mask is not None or number == len(parts) - 1:
            write_out()
