"""What is never trained on: a source's held-out samples in storage order, for evaluation."""

from __future__ import annotations

from pathlib import Path

from shards.common.arrays import Array
from shards.format.corpus import Corpus, open_source
from shards.format.seekable_zstd import Cache
from shards.sampling.rows import Batch, ObjectiveKind, SourceRows, fill, view
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer


class HeldOut:
    """One source's held-out samples in storage order, for evaluation: `read(0, len(held_out))` is all of them.

    The last text window is padded, so that every held-out token counts.
    """

    def __init__(self, corpus: Corpus, samples: SourceRows, context: int, pad: int, limit: int | None) -> None:
        self.name = corpus.manifest.source
        self.digest = corpus.manifest.digest
        self._corpus = corpus
        self._view = samples
        self._context = context
        self._pad = pad
        self._length = samples.size if limit is None else min(limit, samples.size)

    def __len__(self) -> int:
        return self._length

    def token_count(self) -> int:
        """Tokens of the whole held-out split, beyond any limit."""
        return self._corpus.tokens

    def read(self, start: int, stop: int) -> Batch:
        """Samples [start, stop) in storage order, rows as Feed.read has them. Beyond the end there are none."""
        samples = [(self.name, 0, number) for number in range(start, min(stop, self._length))]
        return fill(samples, {self.name: self._view}, self._context, self._pad)

    def prompts(self, start: int, stop: int) -> list[Array]:
        """The token ids alone, one array a sample: for objective kind "prompt"."""
        return [self._view.sequences(number)[0] for number in range(start, min(stop, self._length))]


def open_held_out(
    root: str | Path,
    source: str,
    objective_kind: ObjectiveKind,
    context: int,
    *,
    limit: int | None = None,
    masked_documents: bool = True,
    restart_positions: bool | None = None,
    split: str = "held_out",
) -> HeldOut:
    """The first `limit` held-out samples of a source (None: all); of length 0 if nothing was held out.

    masked_documents, restart_positions: as Feed has them.
    """
    root = Path(root)
    tokenizer = Tokenizer.load(root / TOKENIZER_FILE)
    corpus = open_source(root, source, split, tokenizer, Cache())
    samples = view(
        corpus,
        objective_kind,
        context,
        masked_documents=masked_documents,
        restart_positions=masked_documents if restart_positions is None else restart_positions,
        long_samples="truncate",
        whole_only=False,
    )
    return HeldOut(corpus, samples, context, tokenizer.pad, limit)
