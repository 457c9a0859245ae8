"""What the trainer reads: batches by position, from sources mixed in a fixed order.

    feed = Feed(root, "train", "text", context=1024, mixture={"code": 3, "docs": 1}, seed=0)
    batch = feed.read(position, position + rows)   # the same rows at any number of ranks, after any restart

A feed keeps no position: ranks ask for theirs. What it does keep, the segments of the mixture and the hashes of all it
reads, is in `state()`, which `restore()` takes back or refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards import packing
from shards.container import Array, Cache
from shards.corpus import Corpus, sources
from shards.errors import ShardError
from shards.order import Order
from shards.packing import LongSamples
from shards.rows import Batch, ObjectiveKind, View, view
from shards.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenizer import Tokenizer

__all__ = ["Batch", "Feed", "HeldOut", "ObjectiveKind", "open_held_out"]


def _open(root: Path, name: str, split: str, tokenizer: Tokenizer, cache: Cache) -> Corpus:
    known = sources(root, split)
    if name not in known:
        raise ShardError(f'{root}: there is no source "{name}" (there are: {", ".join(known) or "none; build them"})')
    corpus = Corpus(root, name, split, cache=cache)
    if corpus.manifest.tokenizer != tokenizer.hash:
        raise ShardError(
            f"{corpus.directory}: made with tokenizer {corpus.manifest.tokenizer[:12]}, but {root / TOKENIZER_FILE} is"
            f" {tokenizer.hash[:12]} (restore that tokenizer, or build the shards again)"
        )
    return corpus


class Feed:
    """Batches for one stage. Reading is thread-safe; `reweight` and `restore` are for one thread.

    objective_kind: "text", "sft" or "preference"; "scored", preferences whose last tokens are inputs too; or "prompt", the prompts
    alone of sft and preference sources.
    mixture: the share of samples by source (any scale). masked_documents: documents of a row will not see each other, so
    of text nothing is to be learned where one ends. restart_positions: they begin anew with each document of a row (None:
    where documents are masked). long_samples: what happens to conversations longer than the context. roots: where sources lie
    that are not in `root`.
    Raises ShardError for shards that are missing, damaged, of another tokenizer or of another kind.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        objective_kind: ObjectiveKind,
        context: int,
        mixture: Mapping[str, float],
        seed: int,
        *,
        masked_documents: bool = True,
        restart_positions: bool | None = None,
        long_samples: LongSamples = "truncate",
        cache_bytes: int = 16 << 20,
        roots: Mapping[str, Path] | None = None,
    ) -> None:
        if context < 1:
            raise ShardError(f"context is {context} (use at least 1)")
        self.root = Path(root)
        self.split = split
        self.context = context
        self.objective_kind = objective_kind
        self.tokenizer = Tokenizer.load(self.root / TOKENIZER_FILE)
        self._masked_documents = masked_documents
        self._restart_positions = masked_documents if restart_positions is None else restart_positions
        self._long_samples = long_samples
        self._cache = Cache(cache_bytes)
        self._roots = roots or {}
        self._corpora: dict[str, Corpus] = {}
        self._views: dict[str, View] = {}
        for name in sorted(mixture):
            self._add(name)
        self.order = Order(seed, {name: found.size for name, found in self._views.items()}, mixture)

    def _add(self, name: str) -> None:
        corpus = _open(self._roots.get(name, self.root), name, self.split, self.tokenizer, self._cache)
        self._views[name] = view(
            corpus,
            self.objective_kind,
            self.context,
            masked_documents=self._masked_documents,
            restart_positions=self._restart_positions,
            long_samples=self._long_samples,
        )
        self._corpora[name] = corpus

    @property
    def tokenizer_hash(self) -> str:
        """xxh3_128 of the tokenizer's model file, hex."""
        return self.tokenizer.hash

    @property
    def digests(self) -> dict[str, str]:
        """The manifest digest of each source: what a checkpoint names as its data."""
        return {name: corpus.manifest.digest for name, corpus in sorted(self._corpora.items())}

    def token_count(self) -> int:
        """Tokens of one epoch of all its sources."""
        return sum(corpus.tokens for corpus in self._corpora.values())

    def samples_per_epoch(self, name: str) -> int:
        """Samples of one epoch of a source."""
        return self._views[name].size

    def read(self, start: int, stop: int) -> Batch:
        """The samples at positions [start, stop).

        One row each; for preference two, first all the chosen rows, then all the rejected ones.
        """
        samples = self.order.span(start, stop)
        return _fill(samples, self._views, self.context, self.tokenizer.pad)

    def samples(self, name: str, start: int, stop: int) -> Batch:
        """The samples of a source by their own numbers, in no other order; rows as `read` has them."""
        chosen = [(name, 0, number) for number in range(start, min(stop, self._views[name].size))]
        return _fill(chosen, self._views, self.context, self.tokenizer.pad)

    def prompts(self, start: int, stop: int) -> list[Array]:
        """The token ids alone, one array a sample: for objective kind "prompt"."""
        return [self._views[name].sequences(sample)[0] for name, _, sample in self.order.span(start, stop)]

    def decode(self, position: int) -> str:
        """The text of one sample as the model sees it, reserved ids by name."""
        name, _, sample = self.order.at(position)
        parts = self._views[name].sequences(sample)
        return "\n".join(self.tokenizer.decode(part, reserved=True) for part in parts)

    def reweight(self, position: int, mixture: Mapping[str, float]) -> None:
        """Read with another mixture from `position` on. It may name sources that were not read so far."""
        for name in sorted(mixture):
            if name not in self._views:
                self._add(name)
                self.order.add_source(name, self._views[name].size)
        self.order.reweight(position, mixture)

    def state(self) -> dict[str, Any]:
        """What decides the samples and their order, in plain values."""
        return {
            "order": self.order.state(),
            "digests": self.digests,
            "tokenizer": self.tokenizer_hash,
            "split": self.split,
            "objective_kind": self.objective_kind,
            "context": self.context,
            "long_samples": self._long_samples,
            "packing": packing.VERSION,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on in the order of `state()`; ShardError, and no change, where that cannot be done exactly."""
        own = self.state()
        for key in ("tokenizer", "split", "objective_kind", "context", "long_samples", "packing"):
            if state.get(key) != own[key]:
                raise ShardError(
                    f"the checkpoint's data has {key.replace('_', ' ')} {state.get(key)!r}, this stage {own[key]!r}"
                    " (make them the same, or begin the stage anew)"
                )
        order, digests = state.get("order"), state.get("digests")
        if not isinstance(order, Mapping) or not isinstance(digests, Mapping):
            raise ShardError("the checkpoint has no data order (use another checkpoint)")
        for name, digest in sorted(digests.items()):
            if name not in self._views:
                self._add(name)
                self.order.add_source(name, self._views[name].size)
            if self.digests[name] != digest:
                raise ShardError(
                    f"{self._corpora[name].directory}: manifest {self.digests[name][:12]}, but the checkpoint was made from"
                    f" {digest[:12]} (put those shards back, or begin the stage anew)"
                )
        self.order.restore(order)


class HeldOut:
    """One source's held-out samples in storage order, for evaluation: `read(0, len(held_out))` is all of them.

    The last text window is padded, so that every held-out token counts.
    """

    def __init__(self, corpus: Corpus, samples: View, context: int, pad: int, limit: int | None) -> None:
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
        return _fill(samples, {self.name: self._view}, self._context, self._pad)

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
    corpus = _open(root, source, split, tokenizer, Cache())
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


def _fill(samples: list[tuple[str, int, int]], views: Mapping[str, View], context: int, pad: int) -> Batch:
    apart = len(samples)
    rows = sum(views[name].rows_each for name, _, _ in samples)
    batch = Batch.empty(rows, context, pad, samples)
    for row, (name, _, sample) in enumerate(samples):
        views[name].fill(batch, row, apart, sample)
    return batch
