"""Which kernel attention takes, and that a step never waits for the device to know where documents begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_kernels import FlashAttn, use_flash_attn
from trainer_meter import VOCABULARY, MakeWorld, fake_worlds, stage

from launcher.recipe import Model
from shards.feed import Batch
from trainer.batch import micro_batches
from trainer.documents import Documents, found, joined
from trainer.model import Decoder
from trainer.network import Network

KINDS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "rope, grouped": {"position": "rope", "kv_heads": 2},
    "alibi": {"position": "alibi"},
}
CPU = torch.device("cpu")


def batch(rows: int = 6, time: int = 24) -> Batch:
    generator = np.random.default_rng(3)
    made = Batch.empty(rows, time, 0, [("a", 0, n) for n in range(rows)])
    made.tokens[:] = generator.integers(0, VOCABULARY, made.tokens.shape)
    made.targets[:] = generator.integers(0, VOCABULARY, made.targets.shape)
    made.mask[:] = 1
    made.segments[:] = np.cumsum(generator.random(made.segments.shape) < 0.2, axis=1)
    made.segments[1, 18:] = -1
    made.positions[:] = np.arange(time)
    return made


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
def test_documents_lie_where_counting_finds_them(lengths: list[list[int]], more: int) -> None:
    time = max(sum(row) for row in lengths)
    segments = np.full((len(lengths), time), -1, np.int32)
    wanted, sizes, ends = {0}, [], {time}
    for number, row in enumerate(lengths):
        numbers = np.repeat(np.arange(len(row)), row)
        segments[number, : len(numbers)] = numbers
        parts = [*row, time - sum(row)] if sum(row) < time else row
        sizes += parts
        first = number * (time + more)
        wanted |= {first + sum(parts[:count]) for count in range(len(parts))} | {first + time + more}
        ends |= {first + time}
    starts, longest = found(segments)
    assert longest == max(sizes)
    bounds, most = Documents(torch.from_numpy(starts), longest).bounds(time, time + more)
    assert bounds.dtype == torch.int32 and len(bounds) == starts.size + 1
    assert wanted <= set(bounds.tolist()) <= wanted | ends and most == longest + more
    assert int(bounds.diff().min()) >= 0 and int(bounds.diff().max()) <= most


def test_micro_batches_know_their_documents_and_fill_up_with_rows_that_are_one() -> None:
    parts = list(micro_batches(batch(), 2, 4, 3, CPU))
    joint = joined([part.documents for part in parts])
    assert joint is not None and joint.longest == 24
    for part in parts:
        assert part.documents is not None
        starts, longest = found(part.segments.numpy())
        again = Documents(torch.from_numpy(starts), longest).bounds(24, 24)[0]
        assert torch.equal(part.documents.bounds(24, 24)[0].unique(), again.unique())
    assert joined([parts[0].documents, None]) is None


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_varlen_kernel_gives_what_a_mask_gives(kind: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(Model(layers=2, width=32, heads=4, **KINDS[kind]), VOCABULARY)
    model.initialise(3)
    model.to(torch.bfloat16)
    model.documents_masked = masked
    (rows,) = micro_batches(batch(), 1, 6, 6, CPU)

    def run(documents: Documents | None) -> list[Tensor]:
        model.zero_grad()
        found = model(rows.tokens, rows.positions, rows.segments, rows.targets, documents=documents)
        (found * rows.mask).sum().backward()
        return [found, *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = run(rows.documents)
    kernel = FlashAttn()
    use_flash_attn(monkeypatch, kernel)
    for before, after in zip(plain, run(rows.documents), strict=True):
        assert float((before - after).detach().float().norm()) <= 0.02 * float(before.detach().float().norm())
    if masked or kind == "alibi":
        kernel.check()
    assert bool(kernel.bounds) == (masked or kind == "alibi")
    if masked:
        kernel.bounds.clear()
        assert torch.equal(run(None)[0], plain[0]) and not kernel.bounds, "documents that the host does not know are masked"


class Asked(TorchDispatchMode):
    """Operations that would wait for a device to say what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [{}, {"activation_checkpointing": "selective"}, {"mlp_tile": 16, "loss_tile": 16}])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_never_ask_what_the_device_computed(
    kind: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, asked = FlashAttn(), Asked()
    use_flash_attn(monkeypatch, kernel)
    make: MakeWorld
    with fake_worlds() as make:
        network = Network(Model(layers=2, width=32, heads=4, dtype="bfloat16", **KINDS[kind]), VOCABULARY, make(1))
        network.initialise(3)
        network.follow(stage(24, 6, 3, masked_documents=True, **way), 24)
        parts = list(micro_batches(batch(), 1, 6, 3, CPU))
        with asked:
            network.backward(parts, lambda number, policy: -(policy * parts[number].mask).sum())
            network.log_probs(parts[0])
            network.next_logits(parts[0].tokens, parts[0].positions, torch.tensor([3, 5, 7]))
    kernel.check()
    assert asked.names == []
