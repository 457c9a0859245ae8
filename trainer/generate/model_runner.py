"""Chunks of sequences through the decoder: what they need to see, their keys and values into pages, logits out.

The decoder is the trainer's own, whole, with its blocks' attention turned to the pages. Its weights are the engine's: a copy that
is refreshed in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

import torch
import torch.nn.functional as F
from torch import Tensor

from midwatch.recipe.model import Model, Rope
from trainer.distributed.sequence_parallel import SequenceSharding
from trainer.generate.cuda_graphs import Replayed
from trainer.generate.paged_attention import (
    AttentionMetadata,
    Pages,
    PromptChunk,
    Tables,
    continued,
    kernel_serves,
    rows_of,
    tables,
)
from trainer.generate.request import TokenChunk
from trainer.model.attention import Visible
from trainer.model.decoder import Decoder, MemoryOptions
from trainer.model.positions import alibi_slopes
from trainer.transfer import on_device


class Runner:
    def __init__(
        self,
        config: Model,
        vocabulary: int,
        device: torch.device,
        context: int,
        pages: int,
        size: int,
        *,
        kernel: bool | None = None,
        replays: bool | None = None,
    ) -> None:
        """pages: of the cache, of `size` tokens each, without the one that is nobody's.

        kernel: whether one that follows page tables is used; None: where there is one. replays: whether steps in which every
        sequence is continued by a token replay a CUDA graph; None: on a GPU with such a kernel.
        """
        self.config, self.context, self.size, self._device = config, context, size, device
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        with torch.device("meta"):
            decoder = Decoder(config, vocabulary)
        self.decoder = decoder.to(dtype).to_empty(device=device).requires_grad_(False)
        like = torch.empty(0, dtype=dtype, device=device)
        self.pages = Pages(config.num_layers, config.key_value_heads, config.head, pages + 1, size, like)
        self._slopes = alibi_slopes(config.num_heads, device) if config.position == "alibi" else None
        self._kernel = kernel_serves(device, dtype, config.head, size, self._slopes is not None) if kernel is None else kernel
        replays = self._kernel and device.type == "cuda" if replays is None else replays
        self._replayed = Replayed(self._by_tables, -(-context // size), context, device) if replays else None

    def set_rope(self, rope: Rope, original_context: int, factor: float) -> None:
        """Positions as a stage has them."""
        self.decoder.set_positions(rope, original_context, factor)
        if self._replayed is not None:
            self._replayed.forget()

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the weights that are named, in place."""
        own = dict(self.decoder.named_parameters())
        for name, values in weights:
            own[name].copy_(values)

    @torch.no_grad()
    def run(self, chunks: Items[TokenChunk]) -> Tensor:
        """Logits [sequences, vocabulary] in float32 of what follows each chunk that draws; those of one token come first."""
        tokens = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.stop]]
        places = [place for chunk in chunks for place in range(chunk.start, chunk.stop)]
        slots = [self._slot(chunk, place) for chunk in chunks for place in range(chunk.start, chunk.stop)]
        if self._replayed is not None and len(tokens) == len(chunks) and all(chunk.draws for chunk in chunks):
            lengths = [chunk.stop for chunk in chunks]
            return self._replayed(tokens, places, slots, lengths, [chunk.sequence.pages for chunk in chunks])
        ends, last = 0, []
        for chunk in chunks:
            ends += chunk.stop - chunk.start
            if chunk.draws:
                last.append(ends - 1)
        seen = self._seen(chunks, self._sent(slots))
        hidden = self._forward(self._sent([tokens]), self._sent([places]), seen)
        return self._logits(hidden[0, self._sent(last)])

    def _sent(self, values: object) -> Tensor:
        return on_device(values, torch.int64, self._device)

    def _slot(self, chunk: TokenChunk, place: int) -> int:
        return chunk.sequence.pages[place // self.size] * self.size + place % self.size

    def _seen(self, chunks: Items[TokenChunk], slots: Tensor) -> AttentionMetadata:
        device = self._device
        rows = rows_of(slots, self.config.key_value_heads, self.size)
        if self._kernel:  # which reads nothing past a sequence's end
            return AttentionMetadata(rows, tables=tables(chunks, device), slopes=self._slopes)
        size = self.size
        fresh = [page for chunk in chunks for page in chunk.sequence.pages[-(-chunk.start // size) : -(-chunk.stop // size)]]
        begun = self._sent(fresh) if fresh else None
        single = [chunk for chunk in chunks if chunk.stop - chunk.start == 1]
        those = continued(single, self.size, self._slopes, self.config.key_value_heads, device)
        pieces, start = [], len(single)
        for chunk in chunks[len(single) :]:
            stop = start + chunk.stop - chunk.start
            held = chunk.sequence.pages[: -(-chunk.stop // self.size)]
            pieces.append(PromptChunk(start, stop, chunk.start, on_device(held, torch.int64, device)))
            start = stop
        return AttentionMetadata(rows, those, tuple(pieces), slopes=self._slopes, begun=begun)

    def _forward(self, tokens: Tensor, positions: Tensor, seen: AttentionMetadata) -> Tensor:
        """[1, tokens] -> [1, tokens, width]"""
        decoder = self.decoder
        x = decoder.embed(tokens, positions)
        rotation = decoder.rotation(positions, self.context, x.dtype) if self.config.position == "rope" else None
        for number, block in enumerate(decoder.blocks.values()):
            x = block(x, rotation, Visible(cached=self.pages.layer(number, seen)), SequenceSharding(), MemoryOptions())
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        """[sequences, width] -> [sequences, vocabulary]"""
        decoder = self.decoder
        if decoder.norm is not None:
            hidden = decoder.norm(hidden)
        weight = decoder.embedding.weight if decoder.head is None else decoder.head.weight
        return F.linear(hidden, weight).float()

    def _by_tables(self, tokens: Tensor, places: Tensor, slots: Tensor, tables: Tables) -> Tensor:
        """A token of each sequence: all [sequences]; logits [sequences, vocabulary]."""
        rows = rows_of(slots, self.config.key_value_heads, self.size)
        return self._logits(
            self._forward(tokens[None], places[None], AttentionMetadata(rows, tables=tables, slopes=self._slopes))[0]
        )
