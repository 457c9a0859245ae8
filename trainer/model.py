"""The decoder, as Llama's is: RMSNorm before each block, grouped-query attention with rotary positions, SwiGLU.

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
from trainer.rope import angles, frequencies, rotate


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, equation 4; computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.key_value_heads
        self.head = config.width // config.heads
        self.query = nn.Linear(config.width, self.heads * self.head, bias=False)
        self.key = nn.Linear(config.width, self.kv_heads * self.head, bias=False)
        self.value = nn.Linear(config.width, self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(self.heads * self.head, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Visible) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (self.kv_heads, self.head)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.kv_heads, self.head)).transpose(1, 2)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, seen)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class SwiGLU(nn.Module):
    """Shazeer 2020, equation 6."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden_width, bias=False)
        self.up = nn.Linear(config.width, config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Visible) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, seen)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """Tokens to logits. `set_rope` and `documents_masked` follow the stage; parameters do not depend on it."""

    def __init__(self, config: Model, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.documents_masked = False
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, vocabulary, bias=False)

    def set_rope(self, rope: Rope, original_context: int, device: torch.device) -> None:
        """How positions turn from here on; `original_context` where the recipe does not give one."""
        head = self.config.width // self.config.heads
        frequency, scale = frequencies(rope, head, self.config.rope_theta, rope.original_context or original_context)
        # No buffer: it is no part of a checkpoint, and a module made on the meta device would lose it.
        self._frequency, self._rope_scale = frequency.to(device), scale

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        """Logits [batch, time, vocabulary] in float32.

        tokens: [batch, time]. positions: [batch, time], each token's place in its document. segments: [batch, time], its
        document's number in the row; looked at where documents are masked.
        """
        x = self.embedding(tokens)
        seen = visible(segments if self.documents_masked else None, x.dtype in (torch.bfloat16, torch.float16))
        cos, sin = angles(positions, self._frequency, self._rope_scale)
        for block in self.blocks:
            x = block(x, cos, sin, seen)
        x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return logits.float()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draws all parameters: normal, 0.02 wide, and 0.02 / sqrt(2 layers) for what is added to the residual stream.

        GPT-2 (Radford et al. 2019, section 2.3). Drawn on the CPU in the order of names, so that a device does not matter.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward for one token: PaLM (Chowdhery et al. 2022), appendix B."""
        config = self.config
        dense = config.parameters(self.vocabulary) - (0 if config.tied else self.vocabulary * config.width)
        return 6.0 * dense + 12.0 * config.layers * config.width * context


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: logits [batch, time, vocabulary], targets [batch, time] -> [batch, time]."""
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
