"""AdamW against torch's own, the schedule against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from launcher.recipe import Stage
from trainer.optimizer import Optimizer, learning_rate

SETTINGS = {"lr": 0.1, "lr_scale": 1.0, "min_lr_ratio": 0.1, "weight_decay": 0.1, "clip": 1e9, "beta1": 0.9, "beta2": 0.95}
STAGE = Stage(name="s", objective="pretrain", steps=110, context=8, global_batch=1, mixture={"a": 1}, warmup=10)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "norm": (7,)}
    return {name: nn.Parameter(torch.empty(shape).normal_(generator=generator)) for name, shape in shapes.items()}


def gradients(step: int, named: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.empty(parameter.shape).normal_(generator=generator)


def update(optimizer: Optimizer, settings: dict[str, float] = SETTINGS) -> None:
    optimizer.update(settings, settings["lr"], 1e-8, optimizer.squared_norm().sqrt())


def test_it_is_torchs_adamw_with_decay_on_matrices_alone() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, torch.device("cpu"))
    groups = [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        gradients(step, ours)
        gradients(step, theirs)
        update(optimizer)
        reference.step()
    for name, parameter in ours.items():
        assert torch.allclose(parameter, theirs[name], atol=1e-6)


def test_clipping_shrinks_the_whole_gradient() -> None:
    ours = parameters()
    gradients(0, ours)
    norm = torch.cat([p.grad.flatten() for p in ours.values() if p.grad is not None]).norm()
    optimizer = Optimizer(ours, torch.device("cpu"))
    assert float(optimizer.squared_norm().sqrt()) == pytest.approx(float(norm), rel=1e-6)
    update(optimizer, SETTINGS | {"clip": 0.5})
    first = torch.cat([t.flatten() for name, t in optimizer.tensors().items() if name.startswith("optimizer.first")])
    assert float(first.norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad: float) -> None:
    ours = parameters()
    optimizer = Optimizer(ours, torch.device("cpu"))
    gradients(0, ours)
    update(optimizer)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()} | {
        n: p.detach().clone() for n, p in ours.items()
    }
    gradients(1, ours)
    assert ours["norm"].grad is not None
    ours["norm"].grad[2] = bad
    update(optimizer)
    after = optimizer.tensors() | {n: p.detach() for n, p in ours.items()}
    assert float(after.pop("optimizer.skipped")) == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_warm_up_cosine_and_then_constant() -> None:
    def rate(step: int) -> float:
        return learning_rate(STAGE, SETTINGS, step)

    assert rate(0) == pytest.approx(0.01) and rate(9) == pytest.approx(0.1) and rate(10) == pytest.approx(0.1)
    assert rate(60) == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))
    assert rate(35) == pytest.approx(0.1 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rate(110) == rate(500) == pytest.approx(0.01)
    assert learning_rate(STAGE, SETTINGS | {"lr_scale": 0.5}, 60) == pytest.approx(rate(60) / 2)
