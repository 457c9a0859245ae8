"""`[model]`: the decoder's shape."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

MOST = {
    "num_layers": 10_000,
    "hidden_size": 1 << 24,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 20,
    "intermediate_size": 1 << 28,
    "max_positions": 1 << 40,
    "max_position_embeddings": 1 << 40,
    "vocabulary": (1 << 31) - 1,
}
"""Sizes far beyond any model, within which every calculation from them is quick and small. Token ids are int32 in places."""
MOST_HEADS = 1 << 20
"""Heads of all layers together: the layout of a file names the rows of each."""


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rotary positions are stretched past the length the model was first trained at."""

    kind: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope", "proportional"] = "none"
    factor: float = 1.0
    """New context over the original one."""
    theta: float | None = None
    """Another base than the model's `rope_theta`."""
    original_context: int | None = None
    """Positions seen in pretraining; the first stage's context where it is left out."""
    beta_fast: float = 32.0
    """YaRN: rotations over the original context above which a dimension is left as it is."""
    beta_slow: float = 1.0
    """YaRN: rotations below which a dimension is interpolated wholly."""
    truncate: bool = True
    """YaRN: the ends of the ramp between the two are whole dimensions."""
    attention_factor: float | None = None
    """YaRN, LongRoPE: factor on cosines and sines; from `factor` where it is left out."""
    low_freq_factor: float = 1.0
    """Llama 3: original context over the wavelength below which a dimension is interpolated wholly."""
    high_freq_factor: float = 4.0
    """Llama 3: the same above which it is left as it is."""
    short_factor: tuple[float, ...] = ()
    """LongRoPE: a divisor for each pair of dimensions, for rows within the original context."""
    long_factor: tuple[float, ...] = ()
    """LongRoPE: the same for longer rows."""
    partial_rotary_factor: float = 1.0
    """Proportional: part of the head's dimensions that turn."""

    def problems(self, head: int) -> list[str]:
        """What is wrong and the way out, for heads that wide."""
        found: list[str] = []
        if not 0 < self.factor < math.inf:
            found.append("factor must be greater than 0")
        if self.theta is not None and not 1 < self.theta < math.inf:
            found.append("theta must be greater than 1")
        least = 2 if self.kind == "longrope" else 1
        if self.original_context is not None and self.original_context < least:
            found.append(f"original_context must be at least {least}")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            found.append("attention_factor must be greater than 0")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast < math.inf:
            found.append("beta_slow must be greater than 0, and beta_fast not less than it (use 1 and 32)")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            found.append("low_freq_factor must be greater than 0, and high_freq_factor greater than it (use 1 and 4)")
        if self.kind == "longrope":
            for key in ("short_factor", "long_factor"):
                values: tuple[float, ...] = getattr(self, key)
                if len(values) != head // 2 or not all(0 < value < math.inf for value in values):
                    found.append(f"{key} needs {head // 2} numbers above 0, one for each pair of a head's {head} dimensions")
        if self.kind in ("ntk", "dynamic") and head < 4:
            found.append(f"{self.kind} needs heads at least 4 wide (use linear)")
        if self.kind == "proportional" and not 0 < self.partial_rotary_factor <= 1:
            found.append("rotary_part must lie above 0 and not above 1")
        return found


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder of blocks, each of causal self-attention and an MLP; by default as Llama's are."""

    num_layers: int
    hidden_size: int
    """Size of the residual stream."""
    num_heads: int
    num_kv_heads: int | None = None
    """Key and value heads, shared by groups of query heads (1: multi-query); as many as `num_heads` where it is left out."""
    head_dim: int | None = None
    """Dimensions of a head; `hidden_size` over `num_heads` where it is left out."""
    intermediate_size: int | None = None
    """Width inside the MLP; where it is left out 4 times `hidden_size`, for SwiGLU 8/3 of it, rounded up to a multiple of 64."""
    position: Literal["rope", "alibi", "sinusoidal", "learned", "none"] = "rope"
    max_positions: int | None = None
    """Rows of the learned table; the first stage's context where it is left out."""
    max_position_embeddings: int | None = None
    """Positions that the model is made for, which an export says at the least; the longest rows where it is left out."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_place: Literal["pre", "post"] = "pre"
    """Before attention and MLP, with one more at the end; or after each, on the residual stream."""
    norm_eps: float = 1e-5
    embedding_norm: bool = False
    """One more norm, right after the embedding, as in BLOOM."""
    mlp: Literal["swiglu", "gelu", "relu"] = "swiglu"
    """`gelu` is the tanh approximation, which GPT-2 and BLOOM were trained with."""
    bias: bool = False
    """Linear and LayerNorm layers have biases, as in GPT-2 and BLOOM; the output layer never has."""
    attention_bias: bool | None = None
    """The same for the attention's linear layers alone; as `bias` where it is left out."""
    rope_theta: float = 10_000.0
    rope: Rope = Rope()
    """Stretching of rotary positions in stages that set none of their own."""
    tie_embeddings: bool = True
    """The output layer shares the embedding's weights."""
    vocabulary: int | None = None
    """Rows of the embedding, where there are to be more than the tokenizer has ids."""
    source: str | None = msgspec.field(default=None, name="from")
    """`hf:DIR`: begin with the weights of that Hugging Face directory, which then says all of the above."""
    source_digest: str | None = msgspec.field(default=None, name="from_digest")
    """What that directory said when the recipe was read, of its configuration and its tensors; filled in."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and optimizer state are kept in float32."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Matrix products inside the blocks in float8, with a scale for each tensor or for each row; needs `torchao`."""
    compile: bool = False
    """Blocks go through `torch.compile`: the first steps take minutes longer, the others less."""

    @property
    def key_value_heads(self) -> int:
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def head(self) -> int:
        """Dimensions of a head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def hidden_width(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-self.hidden_size * 8 // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.hidden_size

    @property
    def attention_biased(self) -> bool:
        return self.bias if self.attention_bias is None else self.attention_bias

    @property
    def position_rows(self) -> int:
        """Rows of the learned table of positions; 0 where there is none."""
        return (self.max_positions or 0) if self.position == "learned" else 0

    def problems(self) -> list[tuple[str, str]]:
        """(key, what is wrong and the way out) for each impossible size."""
        found: list[tuple[str, str]] = []
        for key, most in MOST.items():
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append((key, "must be at least 1"))
            elif value is not None and value > most:
                found.append((key, f"{value} is more than any model has (at most {most:,})"))
        if not found and self.num_layers * self.num_heads > MOST_HEADS:
            found.append(("num_heads", f"{self.num_heads} in each of {self.num_layers} layers are more than any model has"))
        if found:
            return found
        if self.head_dim is None and self.hidden_size % self.num_heads:
            heads = self.num_heads
            down = self.hidden_size // heads * heads
            found.append(
                (
                    "hidden_size",
                    f"{self.hidden_size} does not divide among {heads} heads (use {down or heads} or {down + heads})",
                )
            )
        elif self.position == "rope" and self.head % 2:
            key = "num_heads" if self.head_dim is None else "head_dim"
            found.append((key, f"a head is {self.head} wide, and rotary positions need an even width"))
        if self.key_value_heads < 1 or self.num_heads % self.key_value_heads:
            ways = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            found.append(
                (
                    "num_kv_heads",
                    f"{self.num_kv_heads} does not divide {self.num_heads} heads (use one of {', '.join(map(str, ways))})",
                )
            )
        if self.float8 != "none":
            found += self._float8_problems()
        if not 0 < self.norm_eps < math.inf:
            found.append(("norm_eps", "must be greater than 0"))
        return found + self._position_problems()

    def _float8_problems(self) -> list[tuple[str, str]]:
        """The kernels take sizes by sixteens."""
        queries, keys = self.num_heads * self.head, self.key_value_heads * self.head
        sizes = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_width,
            "num_heads x head_dim": queries,
            "num_kv_heads x head_dim": keys,
        }
        wrong = [f"{name} is {size}" for name, size in sizes.items() if size % 16]
        return [("float8", f"needs sizes that are multiples of 16, and {', '.join(wrong)} (drop it)")] if wrong else []

    def _position_problems(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if self.max_positions is not None and self.position != "learned":
            found.append(("max_positions", f'is for learned positions, these are "{self.position}" (drop it)'))
        if self.position == "sinusoidal" and self.hidden_size % 2:
            found.append(
                ("hidden_size", f"{self.hidden_size} is odd, and sinusoidal positions come in pairs (use {self.hidden_size + 1})")
            )
        if self.position != "rope":
            if self.rope != Rope():
                found.append(("rope", f'is for rotary positions, these are "{self.position}" (drop it)'))
            return found
        if not 1 < self.rope_theta < math.inf:
            found.append(("rope_theta", "must be greater than 1"))
        return found + [("rope", message) for message in self.rope.problems(self.head)]

    def parameters(self, vocabulary: int) -> int:
        """Number of trained parameters with a vocabulary of that many ids."""
        queries, keys = self.num_heads * self.head, self.key_value_heads * self.head
        attention = self.hidden_size * (2 * queries + 2 * keys)
        if self.attention_biased:
            attention += queries + 2 * keys + self.hidden_size
        inward = 2 if self.mlp == "swiglu" else 1
        mlp = (inward + 1) * self.hidden_size * self.hidden_width
        if self.bias:
            mlp += inward * self.hidden_width + self.hidden_size
        norm = self.hidden_size * (2 if self.norm == "layernorm" and self.bias else 1)
        norms = 2 * self.num_layers + (self.norm_place == "pre") + self.embedding_norm
        embeddings = (vocabulary * (1 if self.tie_embeddings else 2) + self.position_rows) * self.hidden_size
        return self.num_layers * (attention + mlp) + norms * norm + embeddings
