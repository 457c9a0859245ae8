"""Losses against numbers worked out by hand, and shares of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives_by_name import OBJECTIVES
from test_trainer_model import decoder
from torch import Tensor

from shards.sampling.batches import Batch
from trainer.batches import DeviceRows, micro_batches, samples_a_replica, share
from trainer.model.decoder import Decoder
from trainer.objectives.dpo.loss import preferences


def test_dpo_is_the_formula_worked_out_by_hand() -> None:
    policy, reference = torch.tensor([-10.0, -8.0, -12.0, -7.0]), torch.tensor([-11.0, -8.5, -11.0, -8.0])
    # h = (-10 + 11) - (-12 + 11) = 2 and (-8 + 8.5) - (-7 + 8) = -0.5; beta h = 0.2 and -0.05.
    values, metrics = preferences(policy, reference, 0.1, 0.0)
    assert values.tolist() == pytest.approx([math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(0.05))], rel=1e-6)
    assert metrics["preference/accuracy"].tolist() == [1.0, 0.0]
    assert metrics["preference/margin"].tolist() == pytest.approx([0.2, -0.05], rel=1e-5)
    assert metrics["preference/chosen_reward"].tolist() == pytest.approx([0.1, 0.05], rel=1e-5)
    assert metrics["preference/rejected_reward"].tolist() == pytest.approx([-0.1, 0.1], rel=1e-5)


def test_label_smoothing_takes_the_other_answer_for_a_part() -> None:
    policy, reference = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.0])
    values, _ = preferences(policy, reference, 0.1, 0.25)
    right, wrong = math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(0.2))
    assert values.tolist() == pytest.approx([0.75 * right + 0.25 * wrong], rel=1e-6)


def test_dpo_against_itself_is_the_logarithm_of_two() -> None:
    rows = _rows(4, 10)
    policy = _log_probs(decoder(), rows)
    loss, weight, metrics = OBJECTIVES["dpo"].loss(policy, rows, {"beta": 0.1, "label_smoothing": 0.0}, policy)
    assert float(loss / weight) == pytest.approx(math.log(2))
    assert float(metrics["preference/margin"]) == 0.0


def test_filled_up_rows_weigh_nothing() -> None:
    settings = {"beta": 0.1, "label_smoothing": 0.0}
    for name in ("pretrain", "dpo"):
        objective = OBJECTIVES[name]
        rows = _rows(4, 10)
        half = [DeviceRows(*(torch.cat([part[:1], part[2:3]]) for part in rows[:-1]))][0]
        filled = half._replace(mask=half.mask)
        empty = DeviceRows(
            *(torch.cat([part[0:1], torch.zeros_like(part[:1]), part[1:2], torch.zeros_like(part[:1])]) for part in filled[:-1])
        )
        models = decoder(seed=0), decoder(seed=1)
        alone, padded = (
            objective.loss(_log_probs(models[0], part), part, settings, _log_probs(models[1], part)) for part in (half, empty)
        )
        assert float(alone[0]) == pytest.approx(float(padded[0]), rel=1e-5)
        assert float(alone[1]) == float(padded[1]) == objective.weight(half.mask.numpy()) == objective.weight(empty.mask.numpy())


def test_fine_tuning_learns_from_the_response_alone() -> None:
    model, rows = decoder(), _rows(1, 10)
    mask = rows.mask.clone()
    mask[:, :6] = 0
    loss, weight, _ = OBJECTIVES["sft"].loss(_log_probs(model, rows), rows._replace(mask=mask), {}, None)
    targets = rows.targets.clone()
    targets[:, :6] = 0
    other = rows._replace(mask=mask, targets=targets)
    changed, _, _ = OBJECTIVES["sft"].loss(_log_probs(model, other), other, {}, None)
    assert float(loss) == float(changed) and float(weight) == 4


@torch.no_grad()
def _log_probs(model: Decoder, rows: DeviceRows) -> Tensor:
    found: Tensor = model(rows.tokens, rows.positions, rows.segments, rows.targets)
    return found


def _rows(count: int, time: int) -> DeviceRows:
    tokens = torch.randint(0, 64, (count, time + 1), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(time).expand(count, time)
    return DeviceRows(
        tokens[:, :-1], tokens[:, 1:], torch.ones(count, time), torch.zeros(count, time, dtype=torch.int32), positions
    )


@given(st.integers(0, 1000), st.integers(1, 64), st.integers(1, 9))
def test_ranks_read_each_sample_once_in_order(position: int, batch: int, world: int) -> None:
    read = [p for rank in range(world) for p in range(*share(position, batch, rank, world))]
    assert read == list(range(position, position + batch))
    assert all(
        stop - start <= samples_a_replica(batch, world) for start, stop in (share(position, batch, r, world) for r in range(world))
    )


@given(st.integers(0, 7), st.integers(1, 8), st.integers(1, 5), st.integers(1, 2))
def test_micro_batches_hold_every_sample_and_are_as_many_on_every_rank(have: int, samples: int, size: int, halves: int) -> None:
    have = min(have, samples)
    batch = Batch.empty(have * halves, 4, 0, [("a", 0, n) for n in range(have)])
    batch.tokens[:] = np.arange(1, have * halves + 1)[:, None]
    batch.mask[:] = 1
    parts = list(micro_batches(batch, halves, samples, size, torch.device("cpu")))
    assert len(parts) == -(-samples // size)
    firsts, seconds = _halves(parts, halves)
    assert [n for n in firsts if n] == list(range(1, have + 1))
    if halves == 2:
        assert [n for n in seconds if n] == list(range(have + 1, 2 * have + 1))
    assert sum(float(part.mask.sum()) for part in parts) == have * halves * 4


def _halves(parts: list[DeviceRows], halves: int) -> tuple[list[int], list[int]]:
    def column(tokens: Tensor) -> list[int]:
        return [int(value) for value in tokens[:, 0]]

    split = [part.tokens.chunk(halves) for part in parts]
    return [n for part in split for n in column(part[0])], [n for part in split for n in column(part[-1])]


@pytest.mark.parametrize("halves", [1, 2])
def test_rows_cut_behind_their_ends_hold_all_that_counts(halves: int) -> None:
    have, time = 3, 64
    batch = Batch.empty(have * halves, time, 0, [("a", 0, n) for n in range(have)])
    lengths = [5, 40, 20, 18, 7, 33][: have * halves]
    for row, length in enumerate(lengths):
        batch.put(row, 0, np.arange(1, length + 2), np.ones(length, np.float32), 0)
    cut = list(micro_batches(batch, halves, 4, 2, torch.device("cpu"), trims=True))
    whole = list(micro_batches(batch, halves, 4, 2, torch.device("cpu")))
    # The longest of the first two samples' rows, and of the third's, which a sample that is not there comes with.
    assert [part.tokens.shape[1] for part in cut] == ([48, 32] if halves == 1 else [48, 48])
    for short, long in zip(cut, whole, strict=True):
        length = short.tokens.shape[1]
        assert all(torch.equal(a, b[:, :length]) for a, b in zip(short[:5], long[:5], strict=True))
        assert float(short.mask.sum()) == float(long.mask.sum())
