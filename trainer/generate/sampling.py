"""From logits to tokens, for many requests at once.

What is drawn is a function of the logits, the request's seed and the token's number alone: neither who shares the batch nor
whether the sequence was sent back in between matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.generate.request import Sequence
from trainer.transfer import HostCopy, on_device

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SampledTokens:
    tokens: list[int]
    log_probs: list[float]
    alternatives: list[tuple[tuple[int, float], ...]]


def sample_tokens(logits: Tensor, sequences: Items[Sequence]) -> SampledTokens:
    """A token for each of the sequences, from logits [sequences, vocabulary] in float32."""
    requests, device = [sequence.request for sequence in sequences], logits.device
    likeliest = logits.argmax(-1)
    temperature = on_device([request.temperature or 1.0 for request in requests], torch.float32, device)
    every = (logits / temperature[:, None]).log_softmax(-1)
    tokens = likeliest
    if any(request.temperature for request in requests):
        greedy = on_device([request.temperature == 0 for request in requests], torch.bool, device)
        tokens = torch.where(greedy, likeliest, _chosen(every, sequences))
    log_probs = every.gather(-1, tokens[:, None])[:, 0]
    drawn = HostCopy(torch.stack([tokens.double(), log_probs.double()]))
    alternatives = _alternatives(logits, sequences)
    ids, values = drawn.tolist()
    return SampledTokens([int(token) for token in ids], values, alternatives)


_WHOLE = 2.0**52
"""Of which chances are whole numbers when they are summed: a float's sum over a row has no deterministic kernel on CUDA."""


def _chosen(every: Tensor, sequences: Items[Sequence]) -> Tensor:
    """By the inverse of the distribution: [sequences].

    A chance is rounded to a multiple of 2^-52. Sums of whole numbers are exact, in whatever order they are added.
    """
    requests, device = [sequence.request for sequence in sequences], every.device
    chances = (every.double().exp() * _WHOLE).long()
    if any(request.top_k or request.top_p < 1 for request in requests):
        most = every.shape[-1]
        top_k = on_device([min(request.top_k or most, most) for request in requests], torch.int64, device)
        # Without a limit where nothing is to be left out: rounded chances may add up to more than 1.
        top_p = on_device([request.top_p if request.top_p < 1 else math.inf for request in requests], torch.float64, device)
        chances = _cut(chances, top_k, top_p)
    sums = chances.cumsum(-1)
    seeds = np.array([request.seed % 2**64 for request in requests], np.uint64)
    numbers = np.array([sequence.drawn for sequence in sequences], np.uint64)
    drawn = on_device(uniform(seeds, numbers), torch.float64, device)[:, None]
    wanted = torch.minimum((drawn * sums[:, -1:]).long(), sums[:, -1:] - 1)
    # The first whose sum is beyond it: never one whose chance is 0. There may be none where logits are NaN.
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=every.shape[-1] - 1)


def _cut(chances: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Without what is past the likeliest k, or past those that reach p together."""
    ordered, places = chances.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p[:, None] * _WHOLE) & (torch.arange(chances.shape[-1], device=chances.device) < top_k[:, None])
    return torch.zeros_like(chances).scatter_(-1, places, ordered * kept)


def _alternatives(logits: Tensor, sequences: Items[Sequence]) -> list[tuple[tuple[int, float], ...]]:
    found: list[tuple[tuple[int, float], ...]] = [()] * len(sequences)
    wanted = [at for at, sequence in enumerate(sequences) if sequence.request.alternatives]
    if wanted:
        most = min(max(sequences[at].request.alternatives for at in wanted), logits.shape[-1])
        values, ids = logits[on_device(wanted, torch.int64, logits.device)].log_softmax(-1).topk(most)
        chosen, likely = HostCopy(ids), HostCopy(values)
        for at, chances, tokens in zip(wanted, likely.tolist(), chosen.tolist(), strict=True):
            count = sequences[at].request.alternatives
            found[at] = tuple(zip(tokens[:count], chances[:count], strict=True))
    return found


def uniform(seeds: npt.NDArray[np.uint64], numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, number): SplitMix64 (Steele et al. 2014) of the one, then of it with the other."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) ^ (numbers + np.uint64(1)) * _GOLDEN)
    found: npt.NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
