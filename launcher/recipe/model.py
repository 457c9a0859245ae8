"""`[model]`: the decoder's shape."""

from __future__ import annotations

from typing import Literal

import msgspec


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rotary positions are stretched past the length the model was first trained at."""

    kind: Literal["none", "linear", "ntk", "yarn"] = "none"
    factor: float = 1.0
    """New context over the original one."""
    original_context: int | None = None
    """Positions seen in pretraining; the first stage's context where it is left out."""
    beta_fast: float = 32.0
    """YaRN: rotations over the original context above which a dimension is left as it is."""
    beta_slow: float = 1.0
    """YaRN: rotations below which a dimension is interpolated wholly."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Llama-style decoder: RMSNorm before each block, grouped-query attention with RoPE, SwiGLU."""

    layers: int
    width: int
    """Size of the residual stream."""
    heads: int
    kv_heads: int | None = None
    """Key and value heads, shared by groups of query heads; as many as `heads` where it is left out."""
    hidden: int | None = None
    """Width inside the SwiGLU; 8/3 of `width`, rounded up to a multiple of 64, where it is left out."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tied: bool = True
    """The output layer shares the embedding's weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and optimizer state are kept in float32."""

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def hidden_width(self) -> int:
        return self.hidden if self.hidden is not None else -(-self.width * 8 // 3 // 64) * 64

    def problems(self) -> list[tuple[str, str]]:
        """(key, what is wrong and the way out) for each impossible size."""
        found: list[tuple[str, str]] = []
        for key in ("layers", "width", "heads"):
            if getattr(self, key) < 1:
                found.append((key, "must be at least 1"))
        if found:
            return found
        if self.width % self.heads:
            down = self.width // self.heads * self.heads
            found.append(
                (
                    "width",
                    f"{self.width} does not divide among {self.heads} heads (use {down or self.heads} or {down + self.heads})",
                )
            )
        elif self.width // self.heads % 2:
            found.append(("heads", f"a head is {self.width // self.heads} wide, and rotary positions need an even width"))
        if self.key_value_heads < 1 or self.heads % self.key_value_heads:
            ways = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            found.append(
                (
                    "kv_heads",
                    f"{self.kv_heads} does not divide {self.heads} heads (use one of {', '.join(map(str, ways))})",
                )
            )
        if self.hidden is not None and self.hidden < 1:
            found.append(("hidden", "must be at least 1"))
        return found

    def parameters(self, vocabulary: int) -> int:
        """Number of trained parameters with a vocabulary of that many ids."""
        head = self.width // self.heads
        attention = self.width * head * (2 * self.heads + 2 * self.key_value_heads)
        block = attention + 3 * self.width * self.hidden_width + 2 * self.width
        return self.layers * block + self.width + vocabulary * self.width * (1 if self.tied else 2)
