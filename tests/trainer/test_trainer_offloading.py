"""Activations in the host's memory: the same gradients, and as many buffers as tensors that wait together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.model import activation_checkpointing, offloading
from trainer.model.activation_checkpointing import checkpointed, recomputed

CPU = torch.device("cpu")


def through(x: Tensor, weights: list[Tensor], buffers: offloading.HostBuffers) -> Tensor:
    for weight in weights:

        def run(x: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.tanh(x @ weight)

        with offloading.on_host(buffers):
            x = checkpointed(run, x)
    return x


def plain(x: Tensor, weights: list[Tensor]) -> Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x


def test_gradients_are_the_same_and_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of several lengths, two micro-batches waiting at a time, and one whose backward never comes."""
    taken: list[int] = []

    def memory(size: int, *, pinned: bool) -> Tensor:
        taken.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(offloading, "host_memory", memory)
    source, buffers = torch.Generator().manual_seed(0), offloading.HostBuffers(CPU)
    weights = [torch.randn(8, 8, generator=source).requires_grad_() for _ in range(3)]
    for length in (5, 16, 9, 16, 7):
        inputs = [torch.randn(length, 8, generator=source).requires_grad_() for _ in range(2)]
        found = [through(x, weights, buffers) for x in inputs]
        through(inputs[0], weights, buffers)
        for x, out in zip(inputs, found, strict=True):
            expected = torch.autograd.grad(plain(x, weights).sum(), [x, *weights])
            given = torch.autograd.grad(out.sum(), [x, *weights])
            assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
        del found, out
    assert taken[-1] == 16 * 8 * 4, "what was asked for, not a power of two or a multiple of anything"
    assert len(taken) == 2 * 9, "nine wait at a time: once for the first length, and once for a longer one"
    assert len(buffers._free) == 9


def test_a_tensor_that_waits_keeps_what_it_held_though_the_first_is_changed() -> None:
    buffers = offloading.HostBuffers(CPU)
    x = torch.arange(6.0).view(2, 3).t()

    def waiting(values: Tensor) -> offloading._Waiting:
        return offloading._Waiting(values, buffers.take(values.nbytes), buffers)

    first, second = waiting(x), waiting(x + 1)
    expected = x.clone()
    x.zero_()
    assert torch.equal(first.fetch(), expected) and torch.equal(second.fetch(), expected + 1)
    del first
    third = waiting(expected + 2)
    assert torch.equal(second.fetch(), expected + 1) and torch.equal(third.fetch(), expected + 2)


def test_the_mode_uses_them_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, from which nothing can be copied: what goes there and back is seen."""
    seen: list[str] = []

    class Kept:
        def __init__(self, x: Tensor, buffer: Tensor, buffers: Any) -> None:
            assert buffers.device == x.device
            seen.append("kept")
            self._x = x

        def fetch(self) -> Tensor:
            seen.append("fetched")
            return self._x

    monkeypatch.setattr(offloading, "_Waiting", Kept)
    x = torch.zeros(4, 4, device="meta", requires_grad=True)
    recomputed("offloaded", torch.tanh, x).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert seen == ["kept", "fetched"]
    assert activation_checkpointing.recomputed("offloaded", torch.tanh, torch.zeros(2, requires_grad=True)).requires_grad
    assert len(seen) == 2, "on a CPU they are there already"
