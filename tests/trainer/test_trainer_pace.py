"""A rank's own time: what it reads and computes, and nothing of what it waits for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.control.step_timer import SMOOTH_SECONDS, WARM_STEPS, Pace

CPU = torch.device("cpu")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Block(nn.Module):
    """Takes a second by the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.seconds = clock, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        return x + 1


def _pace(blocks: nn.ModuleList, clock: Clock) -> Pace:
    """Past its first steps, which do not count."""
    pace = Pace(blocks, CPU, clock)
    for _ in range(WARM_STEPS):
        pace.begin()
        assert pace.end(99.0) == 0
    return pace


def _step(pace: Pace, blocks: nn.ModuleList, clock: Clock, passes: int = 2, reading: float = 0.5) -> float:
    pace.begin()
    for _ in range(passes):
        x = torch.zeros(1)
        for block in blocks:
            clock.now += 7.0  # a wait for other ranks, between the blocks
            x = block(x)
        assert x.item() == len(blocks)
    clock.now += 1000
    return pace.end(reading)


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_reading_and_forward_passes_count_and_waiting_between_them_does_not(count: int) -> None:
    clock = Clock()
    blocks = nn.ModuleList(Block(clock) for _ in range(count))
    pace = _pace(blocks, clock)
    assert _step(pace, blocks, clock) == pytest.approx(0.5 + 2 * count)
    assert _step(pace, blocks, clock, passes=40) == pytest.approx(0.5 + 40 * count, rel=0.01)  # more than are measured


def test_it_is_smoothed_over_time_whatever_a_step_takes() -> None:
    clock = Clock()
    blocks = nn.ModuleList([Block(clock)])
    pace = _pace(blocks, clock)
    _step(pace, blocks, clock, 1, 0.0)
    pace.begin()
    clock.now += SMOOTH_SECONDS
    pace.end(2.0)
    assert 1.6 < pace.own < 1.7


def test_passes_outside_a_step_are_not_its_own() -> None:
    clock = Clock()
    blocks = nn.ModuleList([Block(clock)])
    pace = _pace(blocks, clock)
    _step(pace, blocks, clock, 1, 0.0)
    blocks[0](torch.zeros(1))
    assert pace.own == 1.0 and pace._spans == [(100.0 + 7, 100.0 + 8)]
