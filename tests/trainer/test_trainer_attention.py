"""Which kernel attention takes, and that a step never waits for the device to know where documents begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_kernels import FlashAttn, TorchsVarlen, by_documents, use_kernels
from trainer_meter import VOCABULARY, MakeWorld, fake_worlds, stage

from midwatch.recipe import Model
from shards.sampling.batches import Batch
from trainer.batches import micro_batches
from trainer.distributed.sequence_parallel import SequenceSharding
from trainer.document_offsets import Documents, found, joined
from trainer.model import attention
from trainer.model.decoder import Decoder
from trainer.model.sharded_model import ShardedModel

KINDS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "rope, grouped": {"position": "rope", "num_kv_heads": 2},
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


@pytest.fixture(params=["flash-attn's", "torch's"])
def kernel(request: pytest.FixtureRequest) -> Iterator[FlashAttn | TorchsVarlen]:
    yield FlashAttn() if request.param == "flash-attn's" else TorchsVarlen()
    attention._torchs.cache_clear()


def install(kernel: FlashAttn | TorchsVarlen, patch: pytest.MonkeyPatch) -> None:
    if isinstance(kernel, FlashAttn):
        use_kernels(patch, kernel)
    else:
        use_kernels(patch, None, kernel)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_varlen_kernel_gives_what_a_mask_gives(
    kind: str, masked: bool, kernel: FlashAttn | TorchsVarlen, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Decoder(Model(num_layers=2, hidden_size=32, num_heads=4, **KINDS[kind]), VOCABULARY)
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
    install(kernel, monkeypatch)
    for before, after in zip(plain, run(rows.documents), strict=True):
        assert float((before - after).detach().float().norm()) <= 0.02 * float(before.detach().float().norm())
    used = isinstance(kernel, FlashAttn) if kind == "alibi" else masked
    assert bool(kernel.bounds) == used
    if used:
        kernel.check()
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


@pytest.mark.parametrize("way", [{}, {"activation_checkpointing": "selective"}, {"mlp_chunk_tokens": 16, "loss_chunk_tokens": 16}])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_never_ask_what_the_device_computed(
    kind: str, way: dict[str, Any], kernel: FlashAttn | TorchsVarlen, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "alibi" and isinstance(kernel, TorchsVarlen):
        return  # torch's knows no slopes, and is not asked
    asked = Asked()
    install(kernel, monkeypatch)
    make: MakeWorld
    with fake_worlds() as make:
        network = ShardedModel(
            Model(num_layers=2, hidden_size=32, num_heads=4, dtype="bfloat16", **KINDS[kind]), VOCABULARY, make(1)
        )
        network.initialise(3)
        network.configure_stage(stage(24, 6, 3, masked_documents=True, **way), 24)
        parts = list(micro_batches(batch(), 1, 6, 3, CPU))
        with asked:
            network.backward(parts, lambda number, policy: -(policy * parts[number].mask).sum())
            network.log_probs(parts[0])
    kernel.check()
    assert asked.names == []


def test_flash_attn_comes_before_torchs_own_and_both_before_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(dtype: torch.dtype = torch.bfloat16, head: int = 64, slopes: bool = False) -> str:
        found = attention._varlen_kernel(CPU, dtype, head, slopes)
        return "mask" if found is None else "flash-attn" if found is attention._flash_attn else "torch"

    assert kernel() == "mask", "a CPU has none"
    use_kernels(monkeypatch, FlashAttn())
    assert kernel() == kernel(slopes=True) == kernel(head=36) == kernel(torch.float16) == "flash-attn"
    assert kernel(torch.float32) == kernel(head=264) == "mask"
    use_kernels(monkeypatch, None)
    assert kernel() == kernel(torch.float16) == kernel(head=256) == "torch"
    assert kernel(torch.float32) == kernel(slopes=True) == kernel(head=36) == kernel(head=264) == "mask"
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal: query)
    attention._torchs.cache_clear()
    assert kernel() == "mask", "an older torch's is called otherwise"
    attention._torchs.cache_clear()


def test_torchs_kernel_takes_what_it_is_called_with() -> None:
    """Its own checks and shapes, forward and backward; nothing is computed."""
    attention._torchs.cache_clear()
    kernel = attention._torchs()
    assert kernel is not None
    q, k, v = (torch.empty(2, heads, 24, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    bounds = torch.empty(9, device="meta", dtype=torch.int32)
    out = attention.attend(q, k, v, attention.Visible(bounds=bounds, longest=24, kernel=kernel), SequenceSharding())
    assert out.shape == q.shape
    out.sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize("flash", [True, False])
def test_attention_is_one_graph_that_is_not_compiled_again_for_each_number_of_documents(
    flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, window_size: Any = 0, enable_gqa: Any = 0, **__: Any
    ) -> Tensor:
        return by_documents(q, k, v, bounds)

    use_kernels(monkeypatch, kernel if flash else None, kernel)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(attention.attend, backend=counter, fullgraph=True)
    found = attention._varlen_kernel(CPU, torch.bfloat16, 16, False)
    for count in (3, 5, 7, 8):
        bounds = torch.linspace(0, 48, count).int()
        q, k, v = (torch.randn(2, heads, 24, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
        seen = attention.Visible(bounds=bounds, longest=int(bounds.diff().max()), kernel=found)
        compiled(q, k, v, seen, SequenceSharding())
    assert counter.frame_count <= 2
    attention._torchs.cache_clear()
