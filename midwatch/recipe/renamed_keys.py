"""Keys, values and metrics that had other names in earlier releases: each is refused with its new name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from midwatch.recipe.toml_lines import Path as KeyPath

_STAGE_ROLLOUT = {
    "tokens": "max_new_tokens",
    "responses": "num_generations",
    "kl": "kl_coef",
    "lam": "gae_lambda",
    "missing_eos": "missing_eos_penalty",
}
SETTINGS = {"clip": "max_grad_norm", "kl": "kl_coef", "centre": "center_rewards"}
"""Live settings."""
KEYS: dict[tuple[str, ...], dict[str, str]] = {
    ("model",): {
        "width": "hidden_size",
        "hidden": "intermediate_size",
        "layers": "num_layers",
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "head_width": "head_dim",
        "tied": "tie_embeddings",
    },
    ("model", "rope"): {"rotary_part": "partial_rotary_factor"},
    ("stage",): {
        "clip": "max_grad_norm",
        "warmup": "warmup_steps",
        "centre": "center_rewards",
        "mlp_tile": "mlp_chunk_tokens",
        "loss_tile": "loss_chunk_tokens",
        "policy": "rollout",
    },
    ("stage", "rope"): {"rotary_part": "partial_rotary_factor"},
    ("stage", "policy"): _STAGE_ROLLOUT,
    ("stage", "rollout"): _STAGE_ROLLOUT,
    ("generate",): {"running": "max_num_seqs", "step_tokens": "max_num_batched_tokens", "page": "block_size"},
    ("parallel",): {"virtual": "virtual_stages", "shard": "hsdp_shard_size"},
    ("data", "clean"): {"near": "near_dup_threshold"},
}
"""By table: old key and new one."""
VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("model", "norm_place"): {"before": "pre", "after": "post"},
    ("stage", "objective"): {"rejection": "rejection_sampling", "constitution": "constitutional"},
    ("cluster", "backend"): {"agents": "external"},
    ("watch", "metric"): {
        "policy/mismatch": "policy/logprob_mismatch",
        "policy/approximate_kl": "policy/approx_kl",
        "policy/reward_deviation": "policy/reward_std",
        "policy/ratio_outside": "policy/ratio_outlier_fraction",
        "policy/truncated": "policy/truncated_fraction",
        "policy/version": "policy/weights_step",
        "perf/kv_used": "perf/kv_cache_utilization",
        "perf/kv_padded": "perf/kv_padded_ratio",
        "made/skipped": "synthetic/skipped",
        "made/best": "synthetic/best",
        "made/pairs": "synthetic/pairs",
        "made/gain": "synthetic/gain",
        "made/revisions": "synthetic/revisions",
        "made/changed": "synthetic/changed",
        "made/judged": "synthetic/judged",
        "made/certainty": "synthetic/certainty",
        "made/reference": "synthetic/reference",
    },
}
"""By key: old value and new one. A rule on a metric that no longer exists would never act, so these are refused as well."""
VALUES["watch", "and", "metric"] = VALUES["watch", "metric"]


def renamed(raw: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Every old name in a recipe: (path of the key, the message)."""
    yield from _renamed((), (), raw)


def _renamed(path: KeyPath, names: tuple[str, ...], value: object) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _renamed((*path, number), names, each)
    elif isinstance(value, dict):
        for key, inner in value.items():
            new = KEYS.get(names, {}).get(key)
            if new is not None:
                yield (*path, key), f"{_table(names)} {key} is named {new} now (rename it)"
            yield from _renamed((*path, key), (*names, key), inner)
    elif isinstance(value, str):
        new = VALUES.get(names, {}).get(value)
        if new is not None:
            yield path, f'{_table(names[:-1])} {names[-1]} = "{value}" is "{new}" now (rename it)'


def _table(names: tuple[str, ...]) -> str:
    return f"[[{'.'.join(names)}]]" if names in (("stage",), ("watch",)) else f"[{'.'.join(names)}]"
