"""Loss near boundaries and documents in a row, against rows counted by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.batches import DeviceRows
from trainer.loop.packing_metrics import COUNT, NEAR, means, near_boundaries, sums

METRICS = ["train/loss_near_boundaries", "train/loss_within_documents", "data/documents_per_row"]


def segments_of(*lengths: int, padding: int = 0) -> Tensor:
    """One row of documents of these lengths, [time]."""
    parts = [torch.full((length,), number) for number, length in enumerate(lengths)]
    return torch.cat([*parts, torch.full((padding,), -1)]).to(torch.int32)


def rows_of(segments: Tensor) -> DeviceRows:
    tokens = torch.zeros_like(segments, dtype=torch.int64)
    return DeviceRows(tokens, tokens, (segments >= 0).float(), segments, tokens)


def test_near_are_the_first_tokens_of_every_document_but_the_rows_first() -> None:
    found = near_boundaries(torch.stack([segments_of(5, 2, 4, padding=1), segments_of(12)]), near=3)
    assert found.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0], [0] * 12]


def test_losses_are_summed_by_where_their_tokens_lie() -> None:
    segments = torch.stack([segments_of(3, NEAR + 5), segments_of(2, 4, padding=NEAR + 2)])
    policy = torch.zeros(segments.shape)
    policy[0, :3], policy[0, 3 : 3 + NEAR], policy[0, 3 + NEAR :] = -1.0, -4.0, -2.0
    policy[1, :2], policy[1, 2:6], policy[1, 6:] = -3.0, -5.0, -100.0
    rows = rows_of(segments)
    rows.mask[0, 3] = 0
    near, within = NEAR - 1 + 4, 3 + 5 + 2
    found = sums(policy, rows)
    assert found.shape == (COUNT,)
    assert found.tolist() == [4.0 * (NEAR - 1) + 5.0 * 4, near, 3.0 + 2.0 * 5 + 3.0 * 2, within, 4, 2]
    assert means(found.tolist()) == {
        "train/loss_near_boundaries": pytest.approx((4.0 * (NEAR - 1) + 20.0) / near),
        "train/loss_within_documents": pytest.approx(19.0 / within),
        "data/documents_per_row": 2.0,
    }


def test_what_fills_up_a_batch_weighs_nothing_and_what_is_not_there_is_not_told() -> None:
    segments = torch.stack([segments_of(9), torch.zeros(9, dtype=torch.int32)])
    rows = rows_of(segments)
    rows.mask[1] = 0
    found = means(sums(torch.full((2, 9), -2.0), rows).tolist())
    assert found == {"train/loss_within_documents": 2.0, "data/documents_per_row": 1.0}
    assert means([0.0] * COUNT) == {}


def test_parts_of_rows_add_up_to_the_rows() -> None:
    segments = torch.stack([segments_of(7, 20, 37), segments_of(40, 20, padding=4)])
    rows, policy = rows_of(segments), -torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    near = near_boundaries(segments)
    parts = []
    for start in (0, 16, 32, 48):
        cut = slice(start, start + 16)
        parts.append(sums(policy[:, cut], DeviceRows(*(each[:, cut] for each in rows[:-1])), near[:, cut]))
    added, whole = torch.stack(parts).sum(0), sums(policy, rows)
    assert torch.allclose(added[:4], whole[:4])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 6))
def test_near_is_what_counting_finds(lengths: list[int], padding: int, near: int) -> None:
    wanted = [number > 0 and place < near for number, length in enumerate(lengths) for place in range(length)]
    segments = segments_of(*lengths, padding=padding)
    assert near_boundaries(segments[None], near)[0].tolist() == wanted + [False] * padding


def test_the_metrics_are_documented() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs/recipe.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []
