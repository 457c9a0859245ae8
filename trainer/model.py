"""The decoder: embedding, blocks of attention and MLP, output layer; every variant of the recipe's `[model]` in its place.

Parameters are made on the meta device, drawn whole from one generator (the same on every rank) and only then sharded: drawn
after sharding, every rank would get the same numbers for its own part.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.recipe.model import Model, Rope
from trainer.attention import Visible, attend, visible
from trainer.positions import alibi_slopes, learned, sinusoids
from trainer.rope import angles, frequencies, rotate

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each [batch, 1, time, head]."""


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, equation 4; computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def make_norm(config: Model) -> nn.Module:
    """RMSNorm, or LayerNorm: Ba et al. 2016, equation 4."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Query heads share key and value heads by groups: Ainslie et al. 2023; one group is MQA, as many as heads MHA.

    `qkv` holds all query heads, then all key heads, then all value heads.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = config.heads, config.key_value_heads, config.head
        bias = config.attention_biased
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head, bias=bias)
        self.out = nn.Linear(self.heads * self.head, config.width, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation | None, seen: Visible) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        out: Tensor = self.out(attend(q, k, v, seen).transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """SwiGLU: Shazeer 2020, equation 6. GELU: Hendrycks and Gimpel 2016, in the tanh approximation of their section 2."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.kind = config.mlp
        self.gate = nn.Linear(config.width, config.hidden_width, bias=config.bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(config.width, config.hidden_width, bias=config.bias)
        self.down = nn.Linear(config.hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            x = F.silu(self.gate(x)) * self.up(x)
        elif self.kind == "gelu":
            x = F.gelu(self.up(x), approximate="tanh")
        else:
            x = F.relu(self.up(x))
        out: Tensor = self.down(x)
        return out


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.norm_after = config.norm_place == "after"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Rotation | None, seen: Visible) -> Tensor:
        if self.norm_after:
            x = self.attention_norm(x + self.attention(x, rotation, seen))
            x = self.mlp_norm(x + self.mlp(x))
        else:
            x = x + self.attention(self.attention_norm(x), rotation, seen)
            x = x + self.mlp(self.mlp_norm(x))
        return x


class Decoder(nn.Module):
    """Tokens to logits. `set_positions` and `documents_masked` follow the stage; parameters do not depend on it."""

    def __init__(self, config: Model, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.documents_masked = False
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Embedding(config.position_rows, config.width) if config.position == "learned" else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config) if config.norm_place == "before" else None
        self.head = None if config.tied else nn.Linear(config.width, vocabulary, bias=False)
        self.set_positions(config.rope, 1)

    def set_positions(self, rope: Rope, original_context: int, factor: float = 1.0) -> None:
        """How places become positions from here on.

        rope: of rotary ones; `original_context` where it gives none. factor: what learned and sinusoidal ones are divided by.
        """
        self._rope, self._original_context, self._factor = rope, rope.original_context or original_context, factor

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        """Logits [batch, time, vocabulary] in float32.

        tokens: [batch, time]. positions: [batch, time], each token's place in its document. segments: [batch, time], its
        document's number in the row; looked at where documents are masked.
        """
        x = self._embed(tokens, positions)
        slopes = alibi_slopes(self.config.heads, tokens.device) if self.config.position == "alibi" else None
        seen = visible(tokens, segments if self.documents_masked else None, x.dtype, slopes)
        rotation = self._rotation(positions) if self.config.position == "rope" else None
        for block in self.blocks:
            x = block(x, rotation, seen)
        if self.norm is not None:
            x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return logits.float()

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        if self.positions is not None:
            x = x + learned(self.positions.weight, positions, self._factor)
        elif self.config.position == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4; sinusoids would drown an embedding that begins small.
            x = x * math.sqrt(self.config.width) + sinusoids(positions / self._factor, self.config.width).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _rotation(self, positions: Tensor) -> Rotation:
        config, length = self.config, positions.shape[1]
        frequency, scale = frequencies(self._rope, config.head, config.rope_theta, self._original_context, length, positions.device)
        return angles(positions, frequency, scale)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draws all parameters: normal, 0.02 wide, and 0.02 / sqrt(2 layers) for what is added to the residual stream.

        GPT-2 (Radford et al. 2019, section 2.3). Drawn on the CPU in the order of names, so that a device does not matter.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward for one token: PaLM (Chowdhery et al. 2022), appendix B.

        Tables that are only looked up take none.
        """
        config = self.config
        looked_up = config.position_rows + (0 if config.tied else self.vocabulary)
        dense = config.parameters(self.vocabulary) - looked_up * config.width
        return 6.0 * dense + 12.0 * config.layers * config.heads * config.head * context


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: logits [batch, time, vocabulary], targets [batch, time] -> [batch, time]."""
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
