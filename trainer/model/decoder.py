"""The decoder: embedding, blocks of attention and MLP, output layer; every variant of the recipe's `[model]` in its place.

Parameters are made on the meta device, sharded, and then filled by each rank with its own part of what is drawn whole from the
seed and the parameter's name: whatever the number of ranks, the model is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from midwatch.recipe.model import Model, Rope
from trainer.distributed.ring_attention import RingBlocks
from trainer.distributed.sequence_parallel import SequenceSharding, held
from trainer.document_offsets import Documents
from trainer.model.activation_checkpointing import Mode, checkpointed, recomputed, skip_saving
from trainer.model.attention import Visible, attend, visible
from trainer.model.logprobs import likelihood
from trainer.model.norms import make_norm
from trainer.model.positions import alibi_slopes, learned, sinusoids
from trainer.model.rope import angles, frequencies, rotate

Product = Callable[[Tensor, Tensor], Tensor]
"""Of x [..., inward] and a weight [outward, inward]: [..., outward]."""
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each [batch, 1, time, head]."""


@dataclass(frozen=True)
class MemoryOptions:
    """What a forward does to need less memory."""

    recompute: Mode = "none"
    mlp_chunk_tokens: int | None = None
    """Tokens that pass through an MLP at a time."""
    loss_chunk_tokens: int = 4096
    """Tokens whose logits are there at a time."""


@dataclass(frozen=True)
class PipelineChunk:
    """The blocks [start, stop) of a decoder's, with what is before the first and after the last."""

    start: int
    stop: int
    first: bool = True
    last: bool = True


class ColumnParallelLinear(nn.Linear):
    """Its outputs are divided among tensor-parallel ranks: of all tokens each computes its own."""

    product: Product = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else held(self.bias)
        if self.product is F.linear:
            return F.linear(x, held(self.weight), bias)
        out = self.product(x, held(self.weight))
        return out if bias is None else out + bias


def of_all_tokens(x: Tensor, sharding: SequenceSharding, *layers: ColumnParallelLinear) -> list[Tensor]:
    """What each layer gives of the tokens of all tensor-parallel ranks, from this rank's, [batch, time, inward]."""
    plain = all(layer.product is F.linear for layer in layers)
    if sharding.tensor.size == 1 or not plain or torch.compiler.is_compiling():
        x = sharding.gather(x)
        return [layer(x) for layer in layers]
    biases = [None if layer.bias is None else held(layer.bias) for layer in layers]
    return list(sharding.gathered_products(x, [held(layer.weight) for layer in layers], biases))


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are divided among tensor-parallel ranks; the sum comes out, to each rank of its own tokens."""

    def __init__(self, inward: int, outward: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outward, inward))
        self.bias = nn.Parameter(torch.empty(outward)) if bias else None

    product: Product = staticmethod(F.linear)

    def partial(self, x: Tensor) -> Tensor:
        """Without the bias, before the sum."""
        return self.product(x, held(self.weight))

    def forward(self, x: Tensor, sharding: SequenceSharding) -> Tensor:
        with skip_saving(sharding.tensor.size > 1):  # their sum is kept instead
            found = self.partial(x)
        out = sharding.scatter(found)
        return out if self.bias is None else out + held(self.bias, partial=True)


class Attention(nn.Module):
    """Query heads share key and value heads by groups: Ainslie et al. 2023; one group is MQA, as many as heads MHA.

    `qkv` holds group after group: its query heads, its key head, its value head.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.head, self.queries = config.head, config.num_heads // config.key_value_heads
        bias = config.attention_biased
        self.qkv = ColumnParallelLinear(config.hidden_size, (config.num_heads + 2 * config.key_value_heads) * self.head, bias=bias)
        self.out = RowParallelLinear(config.num_heads * self.head, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation | None, seen: Visible, sharding: SequenceSharding) -> Tensor:
        (qkv,) = of_all_tokens(x, sharding, self.qkv)
        grouped = qkv.view(*qkv.shape[:2], -1, self.queries + 2, self.head)
        q, k, v = (each.flatten(2, 3).transpose(1, 2) for each in torch.split(grouped, [self.queries, 1, 1], dim=-2))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        out: Tensor = self.out(attend(q, k, v, seen, sharding).transpose(1, 2).flatten(-2), sharding)
        return out


class MLP(nn.Module):
    """SwiGLU: Shazeer 2020, equation 6. GELU: Hendrycks and Gimpel 2016, in the tanh approximation of their section 2."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.kind, self.is_last = config.mlp, config.norm_place == "pre"
        self.gate = (
            ColumnParallelLinear(config.hidden_size, config.hidden_width, bias=config.bias) if config.mlp == "swiglu" else None
        )
        self.up = ColumnParallelLinear(config.hidden_size, config.hidden_width, bias=config.bias)
        self.down = RowParallelLinear(config.hidden_width, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, sharding: SequenceSharding, tile: int | None = None) -> Tensor:
        """tile: tokens that pass through at a time, of which only what goes in is kept for the backward."""
        if tile is None or x.shape[0] * x.shape[1] * sharding.tensor.size <= tile:
            inner = self._inner(of_all_tokens(x, sharding, *self._inward))
            with skip_saving(self.is_last):
                out: Tensor = self.down(inner, sharding)
            return out
        gathered = sharding.gather(x)
        with skip_saving():
            parts = [checkpointed(self._partial, part) for part in torch.split(gathered.flatten(0, 1), tile)]
        with skip_saving(self.is_last):
            summed = sharding.scatter(torch.cat(parts).view_as(gathered))
        return summed if self.down.bias is None else summed + held(self.down.bias, partial=True)

    def _partial(self, x: Tensor) -> Tensor:
        return self.down.partial(self._inner([layer(x) for layer in self._inward]))

    @property
    def _inward(self) -> list[ColumnParallelLinear]:
        return [self.up] if self.gate is None else [self.gate, self.up]

    def _inner(self, found: Sequence[Tensor]) -> Tensor:
        """From what `_inward` gives."""
        *gates, up = found
        if gates:
            return F.silu(gates[0]) * up
        return F.gelu(up, approximate="tanh") if self.kind == "gelu" else F.relu(up)


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.norm_after = config.norm_place == "post"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.compiled: Callable[..., Tensor] | None = None

    def forward(
        self, x: Tensor, rotation: Rotation | None, seen: Visible, sharding: SequenceSharding, memory: MemoryOptions
    ) -> Tensor:
        # Rows of an evaluation, and of text as it grows, are of many lengths; to compile for each takes longer than it saves.
        through = self.compiled if self.compiled is not None and torch.is_grad_enabled() else self.through
        return through(x, rotation, seen, sharding, memory)

    def through(
        self, x: Tensor, rotation: Rotation | None, seen: Visible, sharding: SequenceSharding, memory: MemoryOptions
    ) -> Tensor:
        """All of it, apart from what FSDP2 hangs on to `forward`: what can be compiled."""

        def run(x: Tensor) -> Tensor:
            if self.norm_after:
                x = self.attention_norm(x + self.attention(x, rotation, seen, sharding))
                x = self.mlp_norm(x + self.mlp(x, sharding, memory.mlp_chunk_tokens))
            else:
                x = x + self.attention(self.attention_norm(x), rotation, seen, sharding)
                x = x + self.mlp(self.mlp_norm(x), sharding, memory.mlp_chunk_tokens)
            return x

        return recomputed(memory.recompute, run, x)


class Decoder(nn.Module):
    """Tokens to log-probabilities or logits, or a part of the way there.

    `set_positions`, `documents_masked`, `temperature`, `sharding` and `memory` follow the stage; parameters do not depend on it.
    """

    def __init__(self, config: Model, vocabulary: int, part: PipelineChunk | None = None, scalar: bool = False) -> None:
        """scalar: a number for each token comes out, not what follows it: the head of reward and value models."""
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.part = part = PipelineChunk(0, config.num_layers) if part is None else part
        self.documents_masked, self.temperature = False, 1.0
        self.sharding, self.memory = SequenceSharding(), MemoryOptions()
        if part.first or (part.last and config.tie_embeddings and not scalar):
            self.embedding = nn.Embedding(vocabulary, config.hidden_size)
        learns = part.first and config.position == "learned"
        self.positions = nn.Embedding(config.position_rows, config.hidden_size) if learns else None
        self.embedding_norm = make_norm(config) if part.first and config.embedding_norm else None
        # A dictionary, so that a block has the same name in whatever part it is.
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(part.start, part.stop)})
        self.norm = make_norm(config) if part.last and config.norm_place == "pre" else None
        self.head = (
            None if config.tie_embeddings or scalar or not part.last else nn.Linear(config.hidden_size, vocabulary, bias=False)
        )
        self.score = nn.Linear(config.hidden_size, 1, bias=False) if scalar and part.last else None
        self.set_positions(config.rope, 1)

    def set_positions(self, rope: Rope, original_context: int, factor: float = 1.0) -> None:
        """How places become positions from here on.

        rope: of rotary ones; `original_context` where it gives none. factor: what learned and sinusoidal ones are divided by.
        """
        self._rope, self._original_context, self._factor = rope, rope.original_context or original_context, factor
        self._frequencies: dict[tuple[int, torch.device], tuple[Tensor, float]] = {}

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        segments: Tensor,
        targets: Tensor | None = None,
        entropy: bool = False,
        documents: Documents | None = None,
    ) -> Tensor:
        """Log-probabilities of the targets, [batch, time]; without targets logits, [batch, time, vocabulary]; both in float32.

        x: tokens, [batch, time]. positions: [batch, time], each token's place in its document. segments: [batch, time], its
        document's number in the row; looked at where documents are masked. documents: the same, as the host knew it. entropy:
        beside each log-probability, in nats, the entropy of what was to choose from: [batch, time, 2].

        Ranks that share rows are each given whole ones, and each gives whole ones. A part that is not the last gives what the
        next one takes as x, [batch, this rank's tokens, width]. With a scalar head what it gives each token, [batch, time].
        """
        time, sharding = positions.shape[1], self.sharding
        places = sharding.places(time, positions.device)
        mine = sharding.between(places)
        if self.part.first:
            x = self.embed(sharding.take(x, mine), sharding.take(positions, mine))
        seen = self._visible(segments, documents, x.dtype)
        rotation = self.rotation(sharding.take(positions, places), time, x.dtype) if self.config.position == "rope" else None
        for block in self.blocks.values():
            x = block(x, rotation, seen, sharding, self.memory)
        if not self.part.last:
            return x
        if self.norm is not None:
            x = self.norm(x)
        if self.score is not None:
            # In float32: scores of one size that differ by little would be the same number in bfloat16.
            return sharding.whole(F.linear(x.float(), self.score.weight.float())[..., 0].clone(), time)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            logits = F.linear(x, weight).float()
            return sharding.whole(logits if self.temperature == 1.0 else logits / self.temperature, time)
        wanted = sharding.take(targets, mine)
        return sharding.whole(likelihood(x, weight, wanted, self.memory.loss_chunk_tokens, entropy, self.temperature), time)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block takes, from tokens and positions [batch, time]."""
        x: Tensor = self.embedding(tokens)
        if self.positions is not None:
            x = x + learned(self.positions.weight, positions, self._factor)
        elif self.config.position == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4; sinusoids would drown an embedding that begins small.
            x = x * math.sqrt(self.config.hidden_size) + sinusoids(positions / self._factor, self.config.hidden_size).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _visible(self, segments: Tensor, documents: Documents | None, dtype: torch.dtype) -> Visible:
        """Of the heads and tokens that this rank has inside attention."""
        sharding, (batch, time), device = self.sharding, segments.shape, segments.device
        slopes = None
        if self.config.position == "alibi":
            slopes = alibi_slopes(self.config.num_heads, device).chunk(sharding.tensor.size)[sharding.tensor.place]
            if not sharding.ring:
                slopes = slopes.chunk(sharding.context.size)[sharding.context.place]
        length = sharding.length(time)
        masked = F.pad(segments, (0, length - time), value=-1) if self.documents_masked else None
        if not sharding.ring:
            return visible(masked, documents, (batch, time), length, device, dtype, self.config.head, slopes)
        places = tuple(sharding.places(time, device, place) for place in range(sharding.context.size))
        return Visible(blocks=RingBlocks(places, masked, slopes))

    def rotation(self, positions: Tensor, time: int, dtype: torch.dtype) -> Rotation:
        """Of positions in rows of `time` tokens. In the type that blocks compute in: FSDP2 would make each block a copy."""
        frequency, scale = self._table(time, positions.device)
        cos, sin = angles(positions, frequency, scale)
        return cos.to(dtype), sin.to(dtype)

    def _table(self, time: int, device: torch.device) -> tuple[Tensor, float]:
        """Frequencies for rows of `time` tokens. They stay where they are until `set_positions`: a CUDA graph reads them there."""
        key = (time if self._rope.kind in ("dynamic", "longrope") else 0, device)
        if key not in self._frequencies:
            config = self.config
            self._frequencies[key] = frequencies(self._rope, config.head, config.rope_theta, self._original_context, time, device)
        return self._frequencies[key]

    def drawn(self, seed: int, only: str = "") -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter, or the one of that name, and what it begins with, whole.

        Normal, 0.02 wide, and 0.02 / sqrt(2 layers) for what is added to the residual stream: GPT-2 (Radford et al. 2019, section
        2.3). A scalar head's 1 / sqrt(width + 1) wide: Stiennon et al. 2020, appendix B.1. Drawn on the CPU from the seed and the
        parameter's name, so that neither devices nor ranks matter.
        """
        for name, parameter in self.named_parameters():
            if only and name != only:
                continue
            if parameter.ndim == 1:
                yield parameter, torch.full(parameter.shape, 0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
            if name == "score.weight":
                std = 1 / math.sqrt(self.config.hidden_size + 1)
            generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode(), seed=seed % 2**64) % 2**63)
            yield parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draws all parameters of a decoder that is not sharded."""
        for parameter, values in self.drawn(seed):
            parameter.copy_(values)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward for one token: PaLM (Chowdhery et al. 2022), appendix B.

        Of the whole decoder, also where this is a part. Tables that are only looked up take none.
        """
        config = self.config
        looked_up = config.position_rows + (0 if config.tie_embeddings else self.vocabulary)
        dense = config.parameters(self.vocabulary) - looked_up * config.hidden_size
        return 6.0 * dense + 12.0 * config.num_layers * config.num_heads * config.head * context
