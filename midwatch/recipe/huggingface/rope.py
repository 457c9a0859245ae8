"""Rotary positions in a Hugging Face `config.json`: older releases of `transformers` write other keys than newer ones.

`rope_scaling` and, beside it, `rope_theta` are the older spelling; `rope_parameters` is the newer one, with the base inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shards.common.decoding import shown

DEFAULT_POSITIONS = 2048
"""Llama's `max_position_embeddings` where the configuration has none."""


def read_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The scaling, with only what its kind looks at, and the base. Raises ValueError."""
    given = _scaling(config)
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str):
        raise ValueError(f"rope type {shown(kind)} is not known")
    kind = "none" if kind == "default" else kind
    context = config.get("max_position_embeddings", DEFAULT_POSITIONS)
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or context
    known: dict[str, dict[str, str]] = {
        "none": {},
        "linear": {"factor": "factor"},
        "dynamic": {"factor": "factor"},
        "yarn": {k: k for k in ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")},
        "llama3": {k: k for k in ("factor", "low_freq_factor", "high_freq_factor")},
        "longrope": {k: k for k in ("factor", "short_factor", "long_factor", "attention_factor")},
        "proportional": {"factor": "factor", "partial_rotary_factor": "partial_rotary_factor"},
    }
    if kind not in known:
        raise ValueError(f"rope type {shown(kind)} is not known; those that can be read are {', '.join(known)}")
    part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind != "proportional" and part not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is {shown(part)}, and only rope type 'proportional' has one")
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


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, wherever they are. Raises ValueError where there are two that differ."""
    spelled = [(key, dict(config[key])) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    for key, given in spelled:
        inner = next((name for name, value in given.items() if isinstance(value, dict)), None)
        if inner is not None:
            raise ValueError(f"{key} has an object for {shown(inner)}, and only one setting for all layers can be read")
        if given.get("rope_type", given.get("type")) != given.get("type", given.get("rope_type")):
            raise ValueError(f"{key} has the rope_type {shown(given['rope_type'])} and the type {shown(given['type'])}")
    if len(spelled) == 2:
        (first, one), (second, other) = spelled
        if _settings(one, config) != _settings(other, config):
            raise ValueError(f"{first} is {shown(one)} and {second} {shown(other)} (keep the one that the model was trained with)")
    return spelled[0][1] if spelled else {}


def _settings(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """In one spelling."""
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", config.get("rope_theta"))
    return {key: value for key, value in given.items() if key != "type"} | {"rope_type": kind, "rope_theta": theta}
