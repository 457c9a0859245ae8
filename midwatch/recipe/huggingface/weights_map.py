"""Where each parameter of ours lies in the tensors of a Hugging Face model, for Llama, GPT-2 and BLOOM; and back.

One table serves reading and writing, so what goes through both comes out as the same bits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from midwatch.recipe.model import Model

Family = Literal["llama", "gpt2", "bloom"]

ARCHITECTURES: dict[Family, str] = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bloom": "BloomForCausalLM"}

SCORING: dict[Family, str] = {
    "llama": "LlamaForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "bloom": "BloomForSequenceClassification",
}
"""With a scalar head: reward models."""


class TensorSlice(NamedTuple):
    """Rows of a tensor in a file; columns where it is transposed."""

    tensor: str
    start: int
    length: int


class MappedParameter(NamedTuple):
    """A parameter of ours: pieces one below the other."""

    shape: tuple[int, ...]
    pieces: tuple[TensorSlice, ...]
    transposed: bool = False
    """GPT-2 keeps linear layers as [in, out]."""


def misfits(model: Model, family: Family) -> list[str]:
    """What of the model the family does not have; empty where it fits."""
    want: dict[str, object] = {"norm_place": "pre"}
    if family == "llama":
        want |= {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "embedding_norm": False}
    else:
        position = "learned" if family == "gpt2" else "alibi"
        want |= {"position": position, "norm": "layernorm", "mlp": "gelu", "bias": True, "attention_biased": True}
        want |= {"embedding_norm": family == "bloom", "key_value_heads": model.num_heads}
    found = []
    for name, value in want.items():
        if getattr(model, name) != value:
            key = {"attention_biased": "attention_bias", "key_value_heads": "num_kv_heads"}.get(name, name)
            found.append(f"{key} is {_shown(getattr(model, name))}, not {_shown(value)}")
    if family != "llama" and model.num_heads * model.head != model.hidden_size:
        found.append(f"its {model.num_heads} heads of {model.head} are not as wide as the model, {model.hidden_size}")
    if family == "llama" and model.hidden_size % model.num_heads:
        found.append(f"width {model.hidden_size} does not divide among {model.num_heads} heads")
    if family == "bloom" and model.hidden_width != 4 * model.hidden_size:
        found.append(f"hidden is {model.hidden_width}, not 4 times the width")
    return found


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def layout(model: Model, family: Family, vocabulary: int, scalar: bool = False) -> dict[str, MappedParameter]:
    """Our parameters by name, each where it is in the family's files, for an embedding of so many rows.

    scalar: of a model with a scalar head in place of the output layer.
    """
    tables = {"llama": _llama, "gpt2": _gpt2, "bloom": _bloom}
    found = tables[family](model, vocabulary)
    if scalar:
        found.pop("head.weight", None)
        found["score.weight"] = _whole("score.weight", 1, model.hidden_size)
    return found


def file_shapes(parts: dict[str, MappedParameter]) -> dict[str, tuple[int, ...]]:
    """The shapes of the files' tensors."""
    rows: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts.values():
        for piece in part.pieces:
            rows[piece.tensor] = rows.get(piece.tensor, 0) + piece.length
            inner = part.shape[1:]
            shapes[piece.tensor] = (*inner, rows[piece.tensor]) if part.transposed else (rows[piece.tensor], *inner)
    return shapes


def _llama(model: Model, vocabulary: int) -> dict[str, MappedParameter]:
    found = {"embedding.weight": _whole("model.embed_tokens.weight", vocabulary, model.hidden_size)}
    queries, keys = model.num_heads * model.head, model.key_value_heads * model.head
    for i in range(model.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        found[f"{ours}.attention_norm.weight"] = _whole(f"{theirs}.input_layernorm.weight", model.hidden_size)
        for kind in ("weight", "bias") if model.attention_biased else ("weight",):
            inner = (model.hidden_size,) if kind == "weight" else ()
            pieces = _groups(model, *(f"{theirs}.self_attn.{name}_proj.{kind}" for name in "qkv"))
            found[f"{ours}.attention.qkv.{kind}"] = MappedParameter((queries + 2 * keys, *inner), pieces)
            inner = (queries,) if kind == "weight" else ()
            found[f"{ours}.attention.out.{kind}"] = _whole(f"{theirs}.self_attn.o_proj.{kind}", model.hidden_size, *inner)
        found[f"{ours}.mlp_norm.weight"] = _whole(f"{theirs}.post_attention_layernorm.weight", model.hidden_size)
        for name, rows, columns in (
            ("gate", model.hidden_width, model.hidden_size),
            ("up", model.hidden_width, model.hidden_size),
            ("down", model.hidden_size, model.hidden_width),
        ):
            found[f"{ours}.mlp.{name}.weight"] = _whole(f"{theirs}.mlp.{name}_proj.weight", rows, columns)
            if model.bias:
                found[f"{ours}.mlp.{name}.bias"] = _whole(f"{theirs}.mlp.{name}_proj.bias", rows)
    found["norm.weight"] = _whole("model.norm.weight", model.hidden_size)
    return found | _head(model, vocabulary)


def _gpt2(model: Model, vocabulary: int) -> dict[str, MappedParameter]:
    found = {"embedding.weight": _whole("transformer.wte.weight", vocabulary, model.hidden_size)}
    found["positions.weight"] = _whole("transformer.wpe.weight", model.position_rows, model.hidden_size)
    for i in range(model.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        found |= _normed(f"{ours}.attention_norm", f"{theirs}.ln_1", model.hidden_size)
        found |= _linear(
            f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", 3 * model.hidden_size, model.hidden_size, transposed=True
        )
        for kind in ("weight", "bias"):
            # GPT-2 has all queries, then all keys, then all values.
            pieces = tuple(
                TensorSlice(f"{theirs}.attn.c_attn.{kind}", which * model.hidden_size + head * model.head, model.head)
                for head in range(model.num_heads)
                for which in range(3)
            )
            found[f"{ours}.attention.qkv.{kind}"] = found[f"{ours}.attention.qkv.{kind}"]._replace(pieces=pieces)
        found |= _linear(f"{ours}.attention.out", f"{theirs}.attn.c_proj", model.hidden_size, model.hidden_size, transposed=True)
        found |= _normed(f"{ours}.mlp_norm", f"{theirs}.ln_2", model.hidden_size)
        found |= _linear(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", model.hidden_width, model.hidden_size, transposed=True)
        found |= _linear(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", model.hidden_size, model.hidden_width, transposed=True)
    found |= _normed("norm", "transformer.ln_f", model.hidden_size)
    return found | _head(model, vocabulary)


def _bloom(model: Model, vocabulary: int) -> dict[str, MappedParameter]:
    found = {"embedding.weight": _whole("transformer.word_embeddings.weight", vocabulary, model.hidden_size)}
    found |= _normed("embedding_norm", "transformer.word_embeddings_layernorm", model.hidden_size)
    for i in range(model.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        found |= _normed(f"{ours}.attention_norm", f"{theirs}.input_layernorm", model.hidden_size)
        found |= _linear(
            f"{ours}.attention.qkv", f"{theirs}.self_attention.query_key_value", 3 * model.hidden_size, model.hidden_size
        )
        found |= _linear(f"{ours}.attention.out", f"{theirs}.self_attention.dense", model.hidden_size, model.hidden_size)
        found |= _normed(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", model.hidden_size)
        found |= _linear(f"{ours}.mlp.up", f"{theirs}.mlp.dense_h_to_4h", model.hidden_width, model.hidden_size)
        found |= _linear(f"{ours}.mlp.down", f"{theirs}.mlp.dense_4h_to_h", model.hidden_size, model.hidden_width)
    found |= _normed("norm", "transformer.ln_f", model.hidden_size)
    return found | _head(model, vocabulary)


def _groups(model: Model, queries: str, keys: str, values: str) -> tuple[TensorSlice, ...]:
    """Group after group its query heads, its key head and its value head, out of three tensors."""
    each, wide = model.head, model.num_heads // model.key_value_heads * model.head
    return tuple(
        piece
        for group in range(model.key_value_heads)
        for piece in (
            TensorSlice(queries, group * wide, wide),
            TensorSlice(keys, group * each, each),
            TensorSlice(values, group * each, each),
        )
    )


def _head(model: Model, vocabulary: int) -> dict[str, MappedParameter]:
    return {} if model.tie_embeddings else {"head.weight": _whole("lm_head.weight", vocabulary, model.hidden_size)}


def _whole(name: str, *shape: int) -> MappedParameter:
    return MappedParameter(shape, (TensorSlice(name, 0, shape[0]),))


def _normed(ours: str, theirs: str, width: int) -> dict[str, MappedParameter]:
    return {f"{ours}.{kind}": _whole(f"{theirs}.{kind}", width) for kind in ("weight", "bias")}


def _linear(ours: str, theirs: str, rows: int, columns: int, transposed: bool = False) -> dict[str, MappedParameter]:
    weight = _whole(f"{theirs}.weight", rows, columns)._replace(transposed=transposed)
    return {f"{ours}.weight": weight, f"{ours}.bias": _whole(f"{theirs}.bias", rows)}
