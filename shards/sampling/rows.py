"""Samples as rows of a batch: windows of text, packed conversations, pairs of responses, prompts.

Each view gives one source's samples numbers from 0 and fills rows with them. A row's inputs are a sequence without its
last token, its targets the same sequence without its first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shards.common.arrays import Array
from shards.common.errors import ShardError
from shards.format.corpus import Corpus
from shards.sampling.packing import LongSamples, plan
from shards.spec import ObjectiveKind


@dataclass(frozen=True)
class Batch:
    """Rows of samples; all arrays but the last are [rows, context]."""

    tokens: npt.NDArray[np.int64]  # inputs; PAD where there is nothing
    targets: npt.NDArray[np.int64]  # the token that follows each input
    mask: npt.NDArray[np.float32]  # 1 where the target counts for the loss; 0 for prompts and padding
    segments: npt.NDArray[np.int32]  # the document's number within its row, masked or not; -1 padding
    positions: npt.NDArray[np.int32]  # place in the row, or, where they restart, in the part of a document that the row holds
    samples: list[tuple[str, int, int]]  # source, epoch, sample: one a row; for preference one a pair of rows
    desirable: npt.NDArray[np.bool_]  # [rows]: of labelled responses, whether a response is a good example

    @classmethod
    def empty(cls, rows: int, context: int, pad: int, samples: list[tuple[str, int, int]]) -> Batch:
        """All padding."""
        shape = (rows, context)
        return cls(
            tokens=np.full(shape, pad, np.int64),
            targets=np.full(shape, pad, np.int64),
            mask=np.zeros(shape, np.float32),
            segments=np.full(shape, -1, np.int32),
            positions=np.zeros(shape, np.int32),
            samples=samples,
            desirable=np.zeros(rows, np.bool_),
        )

    def put(self, row: int, start: int, sequence: Array, mask: Array, segment: int, position: int = 0) -> int:
        """One document at `start` of a row, `mask` being its targets'; returns where it ends."""
        stop = start + len(sequence) - 1
        self.tokens[row, start:stop] = sequence[:-1]
        self.targets[row, start:stop] = sequence[1:]
        self.mask[row, start:stop] = mask
        self.segments[row, start:stop] = segment
        self.positions[row, start:stop] = np.arange(position, position + stop - start)
        return stop

    def put_whole(self, row: int, sequence: Array, first: int) -> None:
        """One document alone in a row, its last token an input too, which has no target; targets from number `first` on count."""
        count = len(sequence)
        self.tokens[row, :count] = sequence
        self.targets[row, : count - 1] = sequence[1:]
        self.mask[row, max(first - 1, 0) : count - 1] = 1
        self.segments[row, :count] = 0
        self.positions[row, :count] = np.arange(count)


class SourceRows(Protocol):
    """The samples of one source, as rows for one objective."""

    size: int  # samples of an epoch
    rows_each: int  # rows of a sample: 2 for a pair

    def fill(self, batch: Batch, row: int, apart: int, sample: int) -> None:
        """Put a sample into `row`, and a pair's second half into `row + apart`."""

    def sequences(self, sample: int) -> list[Array]:
        """The token ids of a sample, document by document, as the model sees them."""


class TextView:
    """Windows of `context` + 1 tokens, one beginning where the one before it has its last token.

    Tokens after the last whole window are left out, unless there is no whole one, or `whole_only` is false: then a last
    sample is padded.
    """

    rows_each = 1

    def __init__(
        self, corpus: Corpus, context: int, *, masked_documents: bool, restart_positions: bool, whole_only: bool = True
    ) -> None:
        self._corpus = corpus
        self._context = context
        self._masked = masked_documents
        self._restarts = restart_positions
        predictions = max(corpus.tokens - 1, 0)
        self.size = predictions // context
        if predictions % context and (self.size == 0 or not whole_only):
            self.size += 1

    def _window(self, sample: int) -> tuple[int, Array]:
        start = sample * self._context
        return start, self._corpus.read(start, min(start + self._context + 1, self._corpus.tokens))

    def fill(self, batch: Batch, row: int, apart: int, sample: int) -> None:
        start, window = self._window(sample)
        length = len(window) - 1
        batch.put(row, 0, window, np.ones(length, np.float32), 0)
        first, last = self._corpus.document_at(start), self._corpus.document_at(start + length - 1)
        cuts = self._corpus.ends(first, last) - start
        numbers = np.searchsorted(cuts, np.arange(length), side="right")
        batch.segments[row, :length] = numbers
        if self._restarts:
            batch.positions[row, :length] -= np.concatenate([[0], cuts])[numbers].astype(np.int32)
        if not self._masked:
            return
        # What follows a document's last token is another document: nothing to learn from a masked one.
        batch.mask[row, cuts - 1] = 0
        if self._corpus.ends(last, last + 1)[0] - start == length:
            batch.mask[row, length - 1] = 0

    def sequences(self, sample: int) -> list[Array]:
        return [self._window(sample)[1]]


class PackedView:
    """Rows of whole conversations, packed by a plan; only what the assistant says, and its EOS, counts."""

    rows_each = 1

    def __init__(self, corpus: Corpus, context: int, long_samples: LongSamples, *, restart_positions: bool) -> None:
        self._corpus = corpus
        self._context = context
        self._restarts = restart_positions
        self.plan = plan(corpus, context, long_samples)
        self.size = self.plan.rows

    def fill(self, batch: Batch, row: int, apart: int, sample: int) -> None:
        place = 0
        for number, document in enumerate(self.plan.row(sample)):
            start, stop = self._corpus.span(document)
            stop = min(stop, start + self._context + 1)
            mask = self._corpus.read(start + 1, stop, "mask")
            sequence = self._corpus.read(start, stop)
            place = batch.put(row, place, sequence, mask, number, 0 if self._restarts else place)

    def sequences(self, sample: int) -> list[Array]:
        spans = [self._corpus.span(document) for document in self.plan.row(sample)]
        return [self._corpus.read(start, min(stop, start + self._context + 1)) for start, stop in spans]


class PairView:
    """A prompt with its chosen response in one row and its rejected one in another, the same prompt in both.

    Where they do not fit the context, the prompt loses its beginning first (never its last token), then the responses
    their ends. whole: for a model that scores texts, the last token is an input too.
    """

    rows_each = 2

    def __init__(self, corpus: Corpus, context: int, *, whole: bool = False) -> None:
        self._corpus = corpus
        self._fits = context if whole else context + 1
        self._whole = whole
        self.size = corpus.documents

    def pair(self, sample: int) -> tuple[int, Array, Array]:
        """The prompt's length, and the two sequences, each of at most context + 1 tokens, or context where all are inputs."""
        start, stop = self._corpus.span(sample)
        tokens, parts = self._corpus.read(start, stop), self._corpus.read(start, stop, "mask")
        prompt, chosen, rejected = (tokens[parts == part] for part in range(3))
        room = max(1, self._fits - max(len(chosen), len(rejected)))
        prompt = prompt[-room:]
        chosen, rejected = (np.concatenate([prompt, response])[: self._fits] for response in (chosen, rejected))
        return len(prompt), chosen, rejected

    def fill(self, batch: Batch, row: int, apart: int, sample: int) -> None:
        prompt, chosen, rejected = self.pair(sample)
        for place, sequence in ((row, chosen), (row + apart, rejected)):
            if self._whole:
                batch.put_whole(place, sequence, prompt)
                continue
            batch.put(place, 0, sequence, np.arange(1, len(sequence)) >= prompt, 0)

    def sequences(self, sample: int) -> list[Array]:
        return list(self.pair(sample)[1:])


class LabelledView:
    """A prompt with one response a row, and whether it is a good example: of each pair the chosen response, then the rejected one.

    Where they do not fit the context, both are cut as those of pairs are.
    """

    rows_each = 1

    def __init__(self, corpus: Corpus, context: int) -> None:
        self._corpus = corpus
        self._context = context
        self._pairs = PairView(corpus, context) if corpus.manifest.kind == "preference" else None
        self.size = corpus.documents if self._pairs is None else 2 * self._pairs.size

    def response(self, sample: int) -> tuple[int, Array, bool]:
        """The prompt's length, the sequence, of at most context + 1 tokens, and whether its response is a good example."""
        if self._pairs is not None:
            prompt, *both = self._pairs.pair(sample // 2)
            return prompt, both[sample % 2], sample % 2 == 0
        start, stop = self._corpus.span(sample)
        tokens, mask = self._corpus.read(start, stop), self._corpus.read(start, stop, "mask")
        said = np.flatnonzero(mask)
        asked, answer = tokens[: said[0]], tokens[said]
        room = max(1, self._context + 1 - len(answer))
        asked = asked[-room:]
        return len(asked), np.concatenate([asked, answer])[: self._context + 1], bool(mask[said[0]] == 1)

    def fill(self, batch: Batch, row: int, apart: int, sample: int) -> None:
        prompt, sequence, desirable = self.response(sample)
        batch.put(row, 0, sequence, np.arange(1, len(sequence)) >= prompt, 0)
        batch.desirable[row] = desirable

    def sequences(self, sample: int) -> list[Array]:
        return [self.response(sample)[1]]


class PromptView:
    """Prompts only, of sources with answers, for a policy to answer; a long one loses its beginning.

    Of a conversation it is all up to where the assistant first speaks.
    """

    rows_each = 1

    def __init__(self, corpus: Corpus, context: int) -> None:
        self._corpus = corpus
        self._context = context
        self.size = corpus.documents

    def fill(self, batch: Batch, row: int, apart: int, sample: int) -> None:
        prompt = self.sequences(sample)[0]
        length = len(prompt)
        batch.put(row, 0, np.append(prompt, batch.targets[row, -1]), np.zeros(length, np.float32), 0)

    def sequences(self, sample: int) -> list[Array]:
        start, stop = self._corpus.span(sample)
        mask = self._corpus.read(start, stop, "mask")
        length = int(np.argmax(mask > 0)) if mask.any() else len(mask)
        return [self._corpus.read(start, start + length)[-self._context :]]


NEEDED: dict[ObjectiveKind, str] = {
    "prompt": "sft or preference or unpaired",
    "scored": "preference",
    "labelled": "preference or unpaired",
}
"""Kinds of source by how an objective reads them, where that is not the kind itself."""


def view(
    corpus: Corpus,
    kind: ObjectiveKind,
    context: int,
    *,
    masked_documents: bool,
    restart_positions: bool,
    long_samples: LongSamples,
    whole_only: bool = True,
) -> SourceRows:
    """The view of a source for an objective; ShardError if the source is not of the objective's kind.

    A packed conversation's last token is never an input, so whether documents are masked does not change such a row.
    """
    have = corpus.manifest.kind
    needed = NEEDED.get(kind, kind)
    if have not in needed.split(" or "):
        raise ShardError(
            f'{corpus.directory}: a source of kind "{have}", but the stage needs "{needed}" (take it out of the mixture)'
        )
    if kind == "text":
        return TextView(
            corpus, context, masked_documents=masked_documents, restart_positions=restart_positions, whole_only=whole_only
        )
    if kind == "sft":
        return PackedView(corpus, context, long_samples, restart_positions=restart_positions)
    if kind in ("preference", "scored"):
        return PairView(corpus, context, whole=kind == "scored")
    return LabelledView(corpus, context) if kind == "labelled" else PromptView(corpus, context)


def fill(samples: list[tuple[str, int, int]], views: Mapping[str, SourceRows], context: int, pad: int) -> Batch:
    """The rows of samples; of pairs the first halves of all, then the second ones."""
    apart = len(samples)
    rows = sum(views[name].rows_each for name, _, _ in samples)
    batch = Batch.empty(rows, context, pad, samples)
    for row, (name, _, sample) in enumerate(samples):
        views[name].fill(batch, row, apart, sample)
    return batch
