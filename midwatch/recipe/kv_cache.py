"""How large the KV cache of a generation engine is: the plan and the engine size it alike."""

from __future__ import annotations


def kv_bytes_per_token(layers: int, key_value_heads: int, head_dim: int, element_bytes: int) -> int:
    """Keys and values of one token in all layers (Shazeer 2019; Ainslie et al. 2023 for fewer heads)."""
    return 2 * layers * key_value_heads * head_dim * element_bytes


def kv_cache_pages(context: int, page: int, sequences: int, budget: int, token_bytes: int) -> int:
    """Pages of `page` tokens: for `sequences` of a full context, or what fits into `budget` bytes; for one at least.

    token_bytes: from `kv_bytes_per_token`.
    """
    each = -(-context // page)
    return max(each, min(each * sequences, budget // (page * token_bytes)))
