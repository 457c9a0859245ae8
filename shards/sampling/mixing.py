"""From a recipe's mixture to weights of what was built: parts of a source by label, shares by tokens, limits of epochs.

A build may split a source by a label into several, `SOURCE.LABEL`. A mixture that names `SOURCE.LABEL` means that one;
one that names `SOURCE`, where nothing of just that name was built, means all its parts. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from shards.common.errors import ShardError

MixtureBy = Literal["weight", "tokens"]


class Mixing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stage's mixture is to be taken."""

    by: MixtureBy = "weight"  # "tokens": weights are factors on what sources have for their tokens
    temperature: float = 1.0  # of the shares by tokens; above 1 small sources get more than their tokens' share
    max_epochs: dict[str, float] = {}  # times that a source, or each part of one, is read at the most


def covers(name: str, source: str) -> bool:
    """Whether a mixture's name may mean the source: it is the source, or the source is a part of it."""
    return source == name or source.startswith(f"{name}.")


def named(mixture: Iterable[str], built: Iterable[str]) -> dict[str, str]:
    """The sources that a mixture reads, each with the name in the mixture that means it.

    Raises ShardError for a name that means nothing, and for a source that two names mean.
    """
    there = sorted(built)
    found: dict[str, str] = {}
    for name in sorted(mixture):
        parts = [name] if name in there else [source for source in there if covers(name, source)]
        if not parts:
            raise ShardError(f'there is no source "{name}" (there are: {", ".join(there) or "none; build them"})')
        for part in parts:
            if part in found:
                raise ShardError(f'mixture: "{name}" and "{found[part]}" both mean "{part}" (name the whole, or its parts)')
            found[part] = name
    return found


def weigh(mixture: Mapping[str, float], sources: Mapping[str, str], tokens: Mapping[str, int], mixing: Mixing) -> dict[str, float]:
    """Each source's weight. sources: as `named` has them. tokens: of each.

    By weight, a name's weight is shared by its parts in proportion to their tokens. By tokens, p_i is proportional to
    weight_i * tokens_i^(1/T), every part being a source of its own: Arivazhagan et al. 2019 (arXiv:1907.05019), where T is
    the sampling temperature, with a factor on each; T = 1 is in proportion to tokens. A part without tokens is not read.
    """
    found = {}
    for source, name in sources.items():
        if name not in mixture:
            continue
        if mixing.by == "tokens":
            weight = mixture[name] * tokens[source] ** (1.0 / mixing.temperature)
        elif source == name:
            weight = mixture[name]
        else:
            whole = sum(tokens[part] for part, other in sources.items() if other == name)
            weight = mixture[name] * tokens[source] / whole if whole else 0.0
        # Rounded, so that machines whose powers differ in a last bit agree on every sample.
        found[source] = float(f"{weight:.12g}")
    return found


def limit(source: str, size: int, max_epochs: Mapping[str, float], built: Iterable[str]) -> int | None:
    """The samples that a source of `size` samples gives in all, at least 1; None where it is not limited.

    A limit of SOURCE.LABEL comes before one of SOURCE, which holds for each of its parts.
    """
    there = set(built)
    names = [name for name in max_epochs if name == source or (name not in there and covers(name, source))]
    return max(1, math.floor(max_epochs[max(names, key=len)] * size)) if names else None


def parts(root: Path, name: str, split: str = "train") -> list[str]:
    """The built sources that a mixture's name means, as far as there are any: [name] otherwise."""
    from shards.format.corpus import sources

    if (root / name / split).is_dir():
        return [name]
    return [source for source in sources(root, split) if covers(name, source)] or [name]


def shares(root: Path, mixture: Mapping[str, float], mixing: Mixing, split: str = "train") -> dict[str, float]:
    """The share of samples of each of the mixture's names, from what is built under `root`. Raises ShardError."""
    from shards.format.corpus import sources
    from shards.format.manifest import load

    meant = named(mixture, sources(root, split))
    weights = weigh(mixture, meant, {source: load(root / source / split).tokens for source in meant}, mixing)
    total = math.fsum(weights.values())
    return {name: math.fsum(weights[part] for part in meant if meant[part] == name) / total for name in mixture} if total else {}
