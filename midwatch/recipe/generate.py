"""`[generate]`: the engine that writes what the model would say."""

from __future__ import annotations

import math
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from midwatch.recipe.bounds import MOST_COUNT, MOST_TOKENS, bounded


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every rank has an engine with a whole copy of the model, or asks the user's server, for its share of the responses."""

    engine: Literal["own", "vllm"] = "own"
    """"vllm": a server that speaks its protocol, which the user runs."""
    max_num_seqs: int = 64
    """Sequences that a rank continues at a time; requests to a server under way at a time."""
    max_num_batched_tokens: int = 2048
    """Tokens that pass through the model at a time."""
    cache_mb: int = 1024
    """Megabytes of a rank's KV cache at the most; never less than one whole sequence needs."""
    block_size: int | None = None
    """Tokens of a page of the KV cache: 16, or 256 on a GPU, where it is left out."""
    url: str | None = None
    """Of the server: `http://HOST:PORT`."""
    model: str | None = None
    """Name that the server gives the model; the one that it serves, where it is left out."""
    weights: str | None = None
    """Directory that ranks and server both see under this name, for the policy's weights in Hugging Face's layout."""
    timeout: float = 600.0
    """Seconds for the server to answer a request, or to load the weights."""

    def problems(self) -> list[tuple[str, str]]:
        found = bounded(self, 1, MOST_COUNT, ("max_num_seqs", "block_size"))
        found += bounded(self, 1, MOST_TOKENS, ("max_num_batched_tokens", "cache_mb"))
        if not 0 < self.timeout < math.inf:
            found.append(("timeout", "must be greater than 0 and finite"))
        if self.engine == "own":
            given = [key for key in ("url", "model", "weights") if getattr(self, key) is not None]
            return found + [(key, 'is of a server (set engine = "vllm", or leave it out)') for key in given]
        if self.url is None:
            found.append(("engine", 'is "vllm", which needs url, e.g. "http://gpu9:8000"'))
        elif not _is_address(self.url):
            found.append(("url", f"{self.url!r} is not of the form http://HOST:PORT"))
        if self.weights is None:
            found.append(("engine", 'is "vllm", which needs weights, a directory that ranks and server both see'))
        return found


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query + parts.fragment
    except ValueError:
        return False
