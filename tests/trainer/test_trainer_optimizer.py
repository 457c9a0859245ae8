"""AdamW against torch's own, the schedule against its formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.manifest import FORMAT, Manifest
from midwatch.recipe import Stage
from trainer.checkpoint import storage
from trainer.optimizer import STREAMED, Optimizer, learning_rate

SETTINGS = {"lr": 0.1, "lr_scale": 1.0, "min_lr_ratio": 0.1, "weight_decay": 0.1, "max_grad_norm": 1e9, "beta1": 0.9, "beta2": 0.95}
STAGE = Stage(name="s", objective="pretrain", steps=110, context=8, global_batch=1, mixture={"a": 1}, warmup_steps=10)


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
    update(optimizer, SETTINGS | {"max_grad_norm": 0.5})
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


def many() -> dict[str, nn.Parameter]:
    """More than are fetched at a time, with decay and without."""
    generator = torch.Generator().manual_seed(2)
    shapes = {f"{n}": (n + 2, 3) if n % 3 else (n + 5,) for n in range(2 * STREAMED + 3)}
    return {name: nn.Parameter(torch.empty(shape).normal_(generator=generator)) for name, shape in shapes.items()}


def test_moments_that_are_fetched_for_an_update_give_the_same_bits() -> None:
    """A gradient that is not finite among them, and another stage's beginning."""
    ours, theirs = many(), many()
    streamed = Optimizer(ours, torch.device("cpu"), streamed=True)
    plain = Optimizer(theirs, torch.device("cpu"))
    for step in range(6):
        for optimizer, named in ((streamed, ours), (plain, theirs)):
            gradients(step, named)
            if step == 2:
                next(iter(named.values())).grad.fill_(float("nan"))  # type: ignore[union-attr]
            if step == 4:
                optimizer.reset()
            update(optimizer, SETTINGS | {"max_grad_norm": 0.5})
        assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
        assert all(torch.equal(tensor, plain.tensors()[name]) for name, tensor in streamed.tensors().items())
    assert float(streamed.skipped) == 1


def test_a_checkpoint_goes_into_moments_that_are_fetched(tmp_path: Path) -> None:
    """Of an optimizer that does not fetch them; both go on with the same bits."""
    ours, theirs = many(), many()
    streamed, plain = Optimizer(ours, torch.device("cpu"), streamed=True), Optimizer(theirs, torch.device("cpu"))
    for step in range(2):
        gradients(step, theirs)
        update(plain)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = cast(dist.ProcessGroup, dist.group.WORLD)
        directory, content = tmp_path / "checkpoint", plain.tensors() | theirs
        parts = {name: tensor.detach() for name, tensor in content.items()}
        storage.save(directory, parts, parts, Manifest(FORMAT, {}, {}, {"step": 2}, 1, "2-1", 1), group, lambda: False)
        targets = {name: tensor.detach() for name, tensor in (streamed.tensors() | ours).items()}
        storage.load(directory, manifest.read(directory)[0], targets, lambda problem: problem, group)
    finally:
        dist.destroy_process_group()
    for optimizer, named in ((streamed, ours), (plain, theirs)):
        gradients(3, named)
        update(optimizer)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert all(torch.equal(tensor, plain.tensors()[name]) for name, tensor in streamed.tensors().items())
