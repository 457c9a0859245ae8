"""A Hugging Face `config.json` as a `[model]`, and a model as a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.recipe.hf_layout import ARCHITECTURES, Family
from launcher.recipe.model import Model, Rope
from shards.decoding import LARGEST, shown

SIZES = frozenset(
    [
        "num_attention_heads",
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "n_embd",
        "n_embed",
        "n_layer",
        "n_head",
        "n_inner",
        "n_positions",
    ]
)
FACTORS = frozenset(
    [
        "rms_norm_eps",
        "layer_norm_epsilon",
        "rope_theta",
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "low_freq_factor",
        "high_freq_factor",
        "partial_rotary_factor",
        "mscale",
        "mscale_all_dim",
    ]
)


class UnknownConfigError(Exception):
    """The configuration is of no model that can be read; the message says what of it and the way out."""


def model_keys(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family, and the keys of `[model]` with their values, `vocabulary` among them. Raises UnknownConfigError."""
    family = _family(config)
    try:
        config = _typed(config)
    except ValueError as error:
        raise UnknownConfigError(f"is not the configuration of a {family}: {error}") from None
    try:
        keys = {"llama": _from_llama, "gpt2": _from_gpt2, "bloom": _from_bloom}[family](config)
    except KeyError as error:
        raise UnknownConfigError(f"{error} is missing") from None
    for key, value in keys.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise UnknownConfigError(f"what stands for {key} is {value}")
    return family, keys


def _family(config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise UnknownConfigError(f"architectures is {shown(named)}, not a list")
    for family, architecture in ARCHITECTURES.items():
        if kind == family and (not named or architecture in named):
            return family
    found = named[0] if named else kind or "of no known kind"
    known, name = ", ".join(ARCHITECTURES.values()), found if isinstance(found, str) else shown(found)
    raise UnknownConfigError(f"the model is {name}; those that can be read are {known}")


def _typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with sizes and factors that can be calculated with; null is as if it were left out. Raises ValueError."""
    given = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        if given.get(key):
            if not isinstance(given[key], dict):
                raise ValueError(f"{key} is {shown(given[key])}, not an object")
            given[key] = _numbers(given[key], f"{key}.")
    return _numbers(given, "")


def _numbers(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {}
    for key, value in given.items():
        if key in SIZES or key in FACTORS:
            if value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
            if key in SIZES and not whole:
                raise ValueError(f"{where}{key} is {shown(value)}, not a number of things")
            if not whole and not (isinstance(value, float) and math.isfinite(value)):
                raise ValueError(f"{where}{key} is {shown(value)}, not a finite number")
        found[key] = value
    return found


def _share(whole: int, parts: int, what: str) -> int:
    if parts < 1:
        raise UnknownConfigError(f"it has {parts} {what}")
    return whole // parts


def _demand(config: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]) -> None:
    """Settings of which only these values are known here, the first being what counts where it is left out."""
    for key, known in values.items():
        if config.get(key, known[0]) not in known:
            raise UnknownConfigError(f"{key} is {shown(config[key])}, and only {' or '.join(map(repr, known))} can be read")


def _from_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    _demand(config, {"hidden_act": ("silu", "swish"), "pretraining_tp": (1, None)})
    rope, theta = _rope(config)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    keys: dict[str, Any] = {
        "layers": config["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": config.get("head_dim") or _share(width, heads, "heads"),
        "hidden": config["intermediate_size"],
        "position": "rope",
        "norm": "rmsnorm",
        "norm_place": "before",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "embedding_norm": False,
        "mlp": "swiglu",
        "bias": bool(config.get("mlp_bias", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
        "rope_theta": theta,
        "rope": rope,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "vocabulary": config["vocab_size"],
    }
    return keys


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The scaling, with only what its kind looks at, and the base."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str):
        raise UnknownConfigError(f"rope type {shown(kind)} is not known")
    kind = "none" if kind == "default" else kind
    context = config.get("max_position_embeddings", 2048)
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or context
    known: dict[str, dict[str, str]] = {
        "none": {},
        "linear": {"factor": "factor"},
        "dynamic": {"factor": "factor"},
        "yarn": {k: k for k in ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")},
        "llama3": {k: k for k in ("factor", "low_freq_factor", "high_freq_factor")},
        "longrope": {k: k for k in ("factor", "short_factor", "long_factor", "attention_factor")},
        "proportional": {"factor": "factor", "partial_rotary_factor": "rotary_part"},
    }
    if kind not in known:
        raise UnknownConfigError(f"rope type {shown(kind)} is not known; those that can be read are {', '.join(known)}")
    part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind != "proportional" and part not in (None, 1, 1.0):
        raise UnknownConfigError(f"partial_rotary_factor is {shown(part)}, and only rope type 'proportional' has one")
    rope: dict[str, Any] = {"kind": kind, "original_context": context if kind == "dynamic" else original}
    rope |= {ours: given[theirs] for theirs, ours in known[kind].items() if given.get(theirs) is not None}
    if kind in ("yarn", "longrope") and given.get("factor") is None:
        rope["factor"] = context / max(1, original)
    if kind == "yarn" and "attention_factor" not in rope and given.get("mscale") and given.get("mscale_all_dim"):
        rope["attention_factor"] = _mscale(rope["factor"], given["mscale"]) / _mscale(rope["factor"], given["mscale_all_dim"])
    return rope, theta


def _mscale(factor: float, scale: float) -> float:
    """DeepSeek's way to give YaRN's temperature."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _from_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _demand(
        config,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )
    width = config["n_embd"]
    return _biased(config["n_layer"], width, config["n_head"], config.get("layer_norm_epsilon", 1e-5)) | {
        "hidden": config.get("n_inner") or 4 * width,
        "position": "learned",
        "max_positions": config["n_positions"],
        "embedding_norm": False,
        "tied": bool(config.get("tie_word_embeddings", True)),
        "vocabulary": config["vocab_size"],
    }


def _from_bloom(config: Mapping[str, Any]) -> dict[str, Any]:
    _demand(config, {"apply_residual_connection_post_layernorm": (False,)})
    width = config.get("hidden_size") or config["n_embed"]
    layers = config.get("n_layer") or config["num_hidden_layers"]
    heads = config.get("n_head") or config["num_attention_heads"]
    return _biased(layers, width, heads, config.get("layer_norm_epsilon", 1e-5)) | {
        "hidden": 4 * width,
        "position": "alibi",
        "embedding_norm": True,
        "tied": bool(config.get("tie_word_embeddings", True)),
        "vocabulary": config["vocab_size"],
    }


def _biased(layers: int, width: int, heads: int, eps: float) -> dict[str, Any]:
    return {
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_width": _share(width, heads, "heads"),
        "norm": "layernorm",
        "norm_place": "before",
        "norm_eps": float(eps),
        "mlp": "gelu",
        "bias": True,
        "attention_bias": True,
    }


def family_of(model: Model) -> Family | None:
    """The family whose positions the model has."""
    families: dict[str, Family] = {"rope": "llama", "learned": "gpt2", "alibi": "bloom"}
    return families.get(model.position)


def config_of(model: Model, family: Family, rope: Rope, original_context: int, context: int, vocabulary: int) -> dict[str, Any]:
    """The `config.json` of a model that fits the family, without ids of tokens.

    rope: of the stage. original_context: what it is stretched from, where it does not say. context: of the longest rows.
    """
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        "tie_word_embeddings": model.tied,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if family == "gpt2":
        return common | {
            "n_layer": model.layers,
            "n_embd": model.width,
            "n_head": model.heads,
            "n_inner": model.hidden_width,
            "n_positions": context,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": model.norm_eps,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    if family == "bloom":
        return common | {
            "n_layer": model.layers,
            "hidden_size": model.width,
            "n_head": model.heads,
            "layer_norm_epsilon": model.norm_eps,
            "seq_length": context,
        }
    original = rope.original_context or original_context
    return common | {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head,
        "intermediate_size": model.hidden_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_bias": model.attention_biased,
        "mlp_bias": model.bias,
        # What `dynamic` takes for the context that it is stretched from.
        "max_position_embeddings": original if rope.kind == "dynamic" else context,
        "rope_theta": _base(rope, model),
        "rope_scaling": _scaling(rope, original),
    }


def _base(rope: Rope, model: Model) -> float:
    base = rope.theta if rope.theta is not None else model.rope_theta
    # A fixed NTK-aware stretching is another base, and nothing else; transformers has no name for it.
    return base * float(rope.factor ** (model.head / (model.head - 2))) if rope.kind == "ntk" else base


def _scaling(rope: Rope, original: int) -> dict[str, Any] | None:
    if rope.kind in ("none", "ntk"):
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "longrope":
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.kind == "proportional":
        scaling["partial_rotary_factor"] = rope.rotary_part
    if rope.kind in ("yarn", "longrope") and rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    if rope.kind in ("yarn", "llama3", "longrope"):
        scaling["original_max_position_embeddings"] = original
    return scaling
