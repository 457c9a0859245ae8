"""Whether a server took over new weights, from the log-probabilities of the same tokens by both sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.generate.reload import ReloadCheck

TOKENS = 512
LIMIT = 0.05


def drawn(seed: int, size: float) -> Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


BEFORE = drawn(0, 1.0) - 4
ROUNDING = 0.01  # what bfloat16 makes of a log-probability, about


@pytest.mark.parametrize("noise", [1e-7, ROUNDING])
@pytest.mark.parametrize("step", [1e-4, 3e-3, 0.03])
def test_a_server_that_follows_is_never_accused(noise: float, step: float) -> None:
    check, policy = ReloadCheck(LIMIT), BEFORE
    for version in range(40):
        assert check.problem(policy, policy + drawn(1000 + version, noise)) is None
        policy = policy + drawn(version, step)


@pytest.mark.parametrize(("noise", "step"), [(1e-7, 1e-5), (1e-7, 0.01), (ROUNDING, 0.01), (ROUNDING, 0.03)])
def test_weights_that_did_not_arrive_are_found_at_once(noise: float, step: float) -> None:
    check = ReloadCheck(LIMIT)
    assert check.problem(BEFORE, BEFORE + drawn(1, noise)) is None
    problem = check.problem(BEFORE + drawn(2, step), BEFORE + drawn(3, noise))
    assert problem is not None


def test_movements_too_small_to_judge_add_up_until_they_are_not() -> None:
    check, policy, found = ReloadCheck(LIMIT), BEFORE, []
    for version in range(60):
        found.append(check.problem(policy, BEFORE + drawn(100 + version, ROUNDING)))
        policy = policy + drawn(version, 1e-3)
    assert found[1] is None and found[-1] is not None


@pytest.mark.parametrize("noise", [1e-7, ROUNDING / 30])
def test_a_part_that_did_not_arrive_is_found(noise: float) -> None:
    """An output layer, say, which half of the movement is of."""
    check, body, head = ReloadCheck(LIMIT), drawn(2, 0.01), drawn(3, 0.01)
    assert check.problem(BEFORE, BEFORE + drawn(1, noise)) is None
    assert check.problem(BEFORE + body + head, BEFORE + body + drawn(4, noise)) is not None


def test_a_small_part_that_stays_behind_at_every_reload_is_found() -> None:
    """Each time it is within the tolerance; it must not add up."""
    check, policy, old, found = ReloadCheck(LIMIT), BEFORE, torch.zeros(TOKENS, dtype=torch.float64), []
    for version in range(6):
        found.append(check.problem(policy, policy + old + drawn(100 + version, 1e-7)))
        policy, old = policy + drawn(version, 0.01), old + drawn(50 + version, 0.002)
    assert found[0] is None and found[1] is not None


def test_another_model_is_found_by_its_distance_even_at_first() -> None:
    problem = ReloadCheck(LIMIT).problem(BEFORE, BEFORE + drawn(1, 0.2))
    assert problem is not None and "more than rollout.mismatch 0.05" in problem


def test_what_is_not_a_number_is_a_problem() -> None:
    assert ReloadCheck(LIMIT).problem(BEFORE, BEFORE * float("nan")) is not None
