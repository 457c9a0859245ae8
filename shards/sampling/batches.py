"""What the trainer reads: batches by position, from sources mixed in a fixed order.

    feed = Feed(root, "train", "text", context=1024, mixture={"code": 3, "docs": 1}, seed=0)
    batch = feed.read(position, position + rows)   # the same rows at any number of ranks, after any restart

A feed keeps no position: ranks ask for theirs. What it does keep, the segments of the mixture and the hashes of all it
reads, is in `state()`, which `restore()` takes back or refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.common.arrays import Array
from shards.common.errors import ShardError
from shards.format.corpus import Corpus, open_source, sources
from shards.format.seekable_zstd import Cache
from shards.sampling import mixing, packing
from shards.sampling.held_out import HeldOut, open_held_out
from shards.sampling.mixing import Mixing
from shards.sampling.order import SampleOrder
from shards.sampling.packing import LongSamples
from shards.sampling.rows import Batch, ObjectiveKind, SourceRows, fill, view
from shards.sampling.segments import Change
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer

__all__ = ["Batch", "BatchFeed", "HeldOut", "ObjectiveKind", "open_held_out"]


class BatchFeed:
    """Batches for one stage. Reading is thread-safe; `reweight` and `restore` are for one thread.

    objective_kind: "text", "sft" or "preference"; "scored", preferences whose last tokens are inputs too; or "prompt", the prompts
    alone of sft and preference sources.
    mixture: the share of samples by source (any scale), `SOURCE` meaning all of `SOURCE.*` where only those were built.
    mixing: how the shares are taken, and how often a source may be read. schedule: mixtures to come, by the position from
    which they hold, above 0 and rising. masked_documents: documents of a row will not see each other, so
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
        mixing: Mixing | None = None,
        schedule: Sequence[tuple[int, Mapping[str, float]]] = (),
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
        self._views: dict[str, SourceRows] = {}
        self._mixing = mixing or Mixing()
        self.named: dict[str, str] = {}
        """Each source that is open, with the name that a mixture gave it."""
        for each in (mixture, *(coming for _, coming in schedule)):
            self._name(each)
        planned = [Change(start, self._weigh(coming), dict(coming), planned=True) for start, coming in schedule]
        sizes = {name: found.size for name, found in self._views.items()}
        self.order = SampleOrder(seed, sizes, self._weigh(mixture), asked=mixture, limits=self._limits(), schedule=planned)

    def _built(self) -> list[str]:
        made = (name for name, root in self._roots.items() if name in sources(root, self.split))
        return sorted({*sources(self.root, self.split), *made})

    def _name(self, mixture: Mapping[str, float]) -> list[str]:
        """Open what a mixture names; those sources that were not open before."""
        try:
            meant = mixing.named(mixture, self._built())
        except ShardError as error:
            raise ShardError(f"{self.root}: {error}") from None
        new = [source for source in sorted(meant) if source not in self._views]
        for source in new:
            self._add(source)
        self.named |= meant
        return new

    def _weigh(self, mixture: Mapping[str, float]) -> dict[str, float]:
        meant = mixing.named(mixture, self._views)
        weights = mixing.weigh(mixture, meant, {name: self._corpora[name].tokens for name in meant}, self._mixing)
        # A part too small for one sample is no reason to refuse the whole.
        return {name: weight if self._views[name].size or meant[name] == name else 0.0 for name, weight in weights.items()}

    def _limits(self) -> dict[str, int]:
        built = self._built()
        found = {name: mixing.limit(name, view.size, self._mixing.max_epochs, built) for name, view in self._views.items()}
        return {name: limit for name, limit in found.items() if limit is not None}

    def _add(self, name: str) -> None:
        corpus = open_source(self._roots.get(name, self.root), name, self.split, self.tokenizer, self._cache)
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
        return fill(samples, self._views, self.context, self.tokenizer.pad)

    def samples(self, name: str, start: int, stop: int) -> Batch:
        """The samples of a source by their own numbers, in no other order; rows as `read` has them."""
        chosen = [(name, 0, number) for number in range(start, min(stop, self._views[name].size))]
        return fill(chosen, self._views, self.context, self.tokenizer.pad)

    def prompts(self, start: int, stop: int) -> list[Array]:
        """The token ids alone, one array a sample: for objective kind "prompt"."""
        return [self._views[name].sequences(sample)[0] for name, _, sample in self.order.span(start, stop)]

    def decode(self, position: int) -> str:
        """The text of one sample as the model sees it, reserved ids by name."""
        name, _, sample = self.order.at(position)
        parts = self._views[name].sequences(sample)
        return "\n".join(self.tokenizer.decode(part, reserved=True) for part in parts)

    def reweight(self, position: int, mixture: Mapping[str, float]) -> None:
        """Read with another mixture from `position` on, until the next scheduled one.

        It may name sources that were not read so far.
        """
        self._known(self._name(mixture))
        self.order.reweight(position, self._weigh(mixture), mixture)

    def _known(self, new: list[str]) -> None:
        limits = self._limits()
        for name in new:
            self.order.add_source(name, self._views[name].size, limits.get(name))

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
            "mixture_by": self._mixing.by,
            "mixture_temperature": self._mixing.temperature,
            "packing": packing.VERSION,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on in the order of `state()`; ShardError, and no change, where that cannot be done exactly."""
        own = self.state()
        for key in [key for key in own if key not in ("order", "digests")]:
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
                self._known([name])
            if self.digests[name] != digest:
                raise ShardError(
                    f"{self._corpora[name].directory}: manifest {self.digests[name][:12]}, but the checkpoint was made from"
                    f" {digest[:12]} (put those shards back, or begin the stage anew)"
                )
        self.order.restore(order)
