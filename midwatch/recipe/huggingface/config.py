"""A Hugging Face `config.json` as a `[model]`, and a model as a `config.json`.

A setting is read as `transformers` reads it. What contradicts itself, and what has a meaning that no model here has, is refused
by its name: a model that is nearly the right one would train without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from midwatch.recipe.huggingface.rope import DEFAULT_POSITIONS, read_rope
from midwatch.recipe.huggingface.weights_map import ARCHITECTURES, Family
from midwatch.recipe.model import Model, Rope
from shards.common.decoding import LARGEST, shown

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


FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_KINDS: dict[str, tuple[Family, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("llama", "MistralForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "bloom": ("bloom", "BloomForCausalLM"),
}
"""By `model_type`, which is what `transformers` goes by: the family whose layout it has, and its architecture."""
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
}
"""Where they are not those of Llama, by `model_type`."""
SYNONYMS = {
    "gpt2": {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads"}
    | {"n_layer": "num_hidden_layers"},
    "bloom": {"hidden_size": "n_embed", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"},
}
"""Two names of one size, by `model_type`."""


class UnknownConfigError(Exception):
    """The configuration is of no model that can be read; the message says what of it and the way out."""


def model_keys(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family, and the keys of `[model]` with their values, `vocabulary` among them. Raises UnknownConfigError."""
    family = _family(config)
    try:
        config = _typed({**DEFAULTS.get(config["model_type"], {}), **config})
    except ValueError as error:
        raise UnknownConfigError(f"is not the configuration of a {family}: {error}") from None
    _demand(config, {"quantization_config": (None,), "transformers_weights": (None,)})
    try:
        keys = _READERS[config["model_type"]](config)
    except KeyError as error:
        raise UnknownConfigError(f"{error} is missing") from None
    for key, value in keys.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise UnknownConfigError(f"what stands for {key} is {value}")
    return family, keys


def _family(config: Mapping[str, Any]) -> Family:
    kind, named = config.get("model_type"), config.get("architectures") or []
    if not isinstance(named, list):
        raise UnknownConfigError(f"architectures is {shown(named)}, not a list")
    if not isinstance(kind, str) or kind not in _KINDS:
        found = named[0] if named else kind or "of no known kind"
        known, name = ", ".join(each for _, each in _KINDS.values()), found if isinstance(found, str) else shown(found)
        raise UnknownConfigError(f"model_type is {shown(kind)} and the model {name}; those that can be read are {known}")
    family, architecture = _KINDS[kind]
    if named and architecture not in named:
        raise UnknownConfigError(f"architectures is {shown(named)}; of model_type {shown(kind)} only {architecture} can be read")
    return family


def _typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with sizes and factors that can be calculated with; null is as if it were left out. Raises ValueError."""
    given = dict(config)
    for key in FLAGS:
        if given.get(key) is None:
            given.pop(key, None)
        elif not isinstance(given[key], bool):
            raise ValueError(f"{key} is {shown(given[key])}, not true or false")
    for one, other in SYNONYMS.get(given["model_type"], {}).items():
        if given.get(one) is not None and given.get(other) is not None and given[one] != given[other]:
            raise ValueError(f"{one} is {shown(given[one])} and {other}, another name of it, {shown(given[other])}")
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
    try:
        rope, theta = read_rope(config)
    except ValueError as error:
        raise UnknownConfigError(str(error)) from None
    heads, width = config["num_attention_heads"], config["hidden_size"]
    keys: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or _share(width, heads, "heads"),
        "intermediate_size": config["intermediate_size"],
        "position": "rope",
        "norm": "rmsnorm",
        "norm_place": "pre",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "embedding_norm": False,
        "mlp": "swiglu",
        "bias": bool(config.get("mlp_bias", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
        "rope_theta": theta,
        "rope": rope,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "vocabulary": config["vocab_size"],
        "max_position_embeddings": config.get("max_position_embeddings", DEFAULT_POSITIONS),
    }
    return keys


def _from_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama without biases, and with a window that attention looks back over, which must reach over all positions here."""
    window, longest = config["sliding_window"], config.get("max_position_embeddings", DEFAULT_POSITIONS)
    if window is not None and (not isinstance(window, int) or window < longest):
        said = f"sliding_window is {shown(window)}, and can be read if it is null or at least max_position_embeddings, {longest}"
        raise UnknownConfigError(f"{said} (for rows within the window, lower max_position_embeddings to it)")
    return _from_llama({**config, "attention_bias": False, "mlp_bias": False})


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
        "intermediate_size": config.get("n_inner") or 4 * width,
        "position": "learned",
        "max_positions": config["n_positions"],
        "embedding_norm": False,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "vocabulary": config["vocab_size"],
    }


def _from_bloom(config: Mapping[str, Any]) -> dict[str, Any]:
    _demand(config, {"apply_residual_connection_post_layernorm": (False,)})
    width = config.get("hidden_size") or config["n_embed"]
    layers = config.get("n_layer") or config["num_hidden_layers"]
    heads = config.get("n_head") or config["num_attention_heads"]
    return _biased(layers, width, heads, config.get("layer_norm_epsilon", 1e-5)) | {
        "intermediate_size": 4 * width,
        "position": "alibi",
        "embedding_norm": True,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "vocabulary": config["vocab_size"],
    }


def _biased(layers: int, width: int, heads: int, eps: float) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _share(width, heads, "heads"),
        "norm": "layernorm",
        "norm_place": "pre",
        "norm_eps": float(eps),
        "mlp": "gelu",
        "bias": True,
        "attention_bias": True,
    }


_READERS = {"llama": _from_llama, "mistral": _from_mistral, "gpt2": _from_gpt2, "bloom": _from_bloom}


def family_of(model: Model) -> Family | None:
    """The family whose positions the model has."""
    families: dict[str, Family] = {"rope": "llama", "learned": "gpt2", "alibi": "bloom"}
    return families.get(model.position)


def config_of(model: Model, family: Family, rope: Rope, original_context: int, context: int, vocabulary: int) -> dict[str, Any]:
    """The `config.json` of a model that fits the family, without ids of tokens.

    rope: of the stage. original_context: what it is stretched from, where it does not say. context: of the longest rows. A model
    is never said to be made for fewer positions than it came with, than its rows have had, or than its rope is stretched to.
    """
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if family == "gpt2":
        return common | {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_heads,
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
            "n_layer": model.num_layers,
            "hidden_size": model.hidden_size,
            "n_head": model.num_heads,
            "layer_norm_epsilon": model.norm_eps,
            "seq_length": context,
        }
    original = rope.original_context or original_context
    declared = model.max_position_embeddings or 0
    # What a directory says of its positions has its own stretching in it already.
    own = rope.kind == "none" or (rope == model.rope and declared > 0)
    longest = max(context, declared, 0 if own else round(original * rope.factor))
    return common | {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head,
        "intermediate_size": model.hidden_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_bias": model.attention_biased,
        "mlp_bias": model.bias,
        # What `dynamic` takes for the context that it is stretched from.
        "max_position_embeddings": original if rope.kind == "dynamic" else longest,
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
        scaling["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.kind in ("yarn", "longrope") and rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    if rope.kind in ("yarn", "llama3", "longrope"):
        scaling["original_max_position_embeddings"] = original
    return scaling
