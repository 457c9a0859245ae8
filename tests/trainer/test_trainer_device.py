"""What a step asks of a GPU: nothing that waits for it, and nothing that gives another result the next time.

There is no GPU here. The steps run on torch's meta device, which computes nothing but has autograd, and each operation is
looked at. (torch's fake tensors on "cuda" have no autograd where there is no CUDA.)
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from midwatch.recipe import Model, Parallel
from midwatch.recipe.model import Rope
from shards.sampling.batches import Batch
from trainer import transfer
from trainer.batches import micro_batches
from trainer.control.reporting import MetricReporter, NoLink, StepReport
from trainer.distributed import sequence_parallel
from trainer.distributed.mesh import World, lay_out
from trainer.generate import Engine, Request, paged_attention, sampling
from trainer.loop import loop
from trainer.model import attention
from trainer.model.decoder import Decoder
from trainer.model.norms import RMSNorm
from trainer.model.sharded_model import ShardedModel
from trainer.objectives import CRITIC, OBJECTIVES, Objective
from trainer.objectives.ppo import RolloutData as Noted
from trainer.optimizer import Optimizer
from trainer.rollout.buffer import RolloutBuffer
from trainer.stage.model_roles import TrainableModel

ACCELERATOR = torch.device("meta")
CONFIG = Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64)
VOCABULARY, CONTEXT = 64, 24
SETTINGS = {
    "max_grad_norm": 1.0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "ratio_clip": 0.2, "value_clip": 0.3, "kl_coef": 0.1,
    "beta": 0.3, "label_smoothing": 0.1, "margin": 0.2, "center_rewards": 0.05,
}  # fmt: skip

WAITS = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "is_nonzero", "equal", "allclose", "_cudnn_rnn", "bincount", "histc", "_linalg_check_errors",
}  # fmt: skip
"""The host looks at what the device has computed: at a value, or at how many there are."""
ALWAYS = {
    "adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "_embedding_bag", "_embedding_bag_backward",
    "grid_sampler_2d_backward",
    "histc", "kthvalue", "median", "nanmedian", "mode", "nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "put_",
    "put", "reflection_pad1d_backward", "replication_pad1d_backward", "resize_", "scatter_reduce", "scatter_reduce_",
    "upsample_bilinear2d_backward", "upsample_linear1d_backward", "_cdist_backward", "segment_reduce",
}  # fmt: skip
"""Operations without a deterministic implementation on CUDA (torch.use_deterministic_algorithms)."""
OF_FLOATS = {"cumsum", "cumsum_", "cumprod", "cumprod_", "logcumsumexp", "bincount"}
"""The same, of floating point alone."""
ADDED = {"scatter_add", "scatter_add_", "index_add", "index_add_", "index_reduce", "index_reduce_"}
"""By atomics, or with the flag set by sorting first."""


class Made(TorchFunctionMode):
    """Fails on a tensor of the accelerator's that is made from numbers of the host's: a copy that no dispatch shows."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        more = more or {}
        if function in (torch.tensor, torch.as_tensor) and more.get("device") is not None:
            assert torch.device(more["device"]) != ACCELERATOR, f"{function.__name__} waits for the device"
        return function(*arguments, **more)


class Watch(TorchDispatchMode):
    """Fails on what waits for the accelerator, or is not deterministic there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._made = Made()

    def __enter__(self) -> Watch:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        more = more or {}
        problem = found(function.overloadpacket.__name__, [*arguments, *more.values()], more)
        assert problem is None, problem
        self.seen.add(function.overloadpacket.__name__)
        return function(*arguments, **more)


def found(name: str, arguments: list[Any], more: dict[str, Any]) -> str | None:
    """What is wrong with an operation."""
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    there = any(each.device == ACCELERATOR for each in tensors)
    if there and name in WAITS:
        return f"{name} waits for the device"
    if there and (name in ALWAYS or name in ADDED or (name in OF_FLOATS and tensors[0].is_floating_point())):
        return f"{name} is not deterministic"
    if there and name.startswith("index"):
        places = [each for each in arguments[1] or () if isinstance(each, Tensor)] if isinstance(arguments[1], list | tuple) else []
        if any(each.dtype in (torch.bool, torch.uint8) for each in places):
            return f"{name} by a mask waits for the device"
        if name.startswith("index_put") and len(arguments) > 3 and arguments[3]:
            return f"{name} adds up"
    if name in ("_to_copy", "copy_"):
        to = more.get("device") or tensors[0].device
        source = tensors[-1]
        asynchronous = more.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2] is True)
        if ACCELERATOR in (torch.device(to), source.device) and torch.device(to) != source.device and not asynchronous:
            return f"{name} between {source.device} and {to} waits"
    return None


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = lay_out(torch.device("cpu"), Parallel())
    yield World(0, 1, ACCELERATOR, alone.mesh, alone.outer, alone.control, alone.checkpoint)
    dist.destroy_process_group()


def batch(rows: int) -> Batch:
    made = Batch.empty(rows, CONTEXT, 0, [("a", 0, number) for number in range(rows)])
    for row in range(rows):
        made.put(row, 0, np.arange(1, 12), np.ones(10, np.float32), 0)
        made.put(row, 10, np.arange(1, 10), np.ones(8, np.float32), 1)
    return made


def noted() -> list[Noted]:
    """Rollouts' numbers for two micro-batches, by the way that they take in a run."""
    held = RolloutBuffer(4, CONTEXT, ACCELERATOR, critic=True)
    return [each for _, each in held.parts(torch.arange(4), 4, 2, CONTEXT)]


STEPS: dict[str, tuple[Objective, bool, bool]] = {
    **{name: (OBJECTIVES[name], name == "reward", name in ("reward", "dpo")) for name in OBJECTIVES},
    "critic": (CRITIC, True, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_nothing_and_is_deterministic(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the batch on the host to the update: forward, objective, metrics, backward, norm, clipping, AdamW."""
    objective, scalar, pairs = STEPS[name]
    network = ShardedModel(CONFIG, VOCABULARY, world, scalar)
    optimizer = Optimizer(network.parameters(), ACCELERATOR)
    reference = ShardedModel(CONFIG, VOCABULARY, world).freeze() if name == "dpo" else None
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    with Watch() as watch:
        halves = 2 if pairs else 1
        parts = list(micro_batches(batch(4 * halves), halves, 4, 2, ACCELERATOR))
        held: list[Any] = [reference.log_probs(part) if reference else None for part in parts]
        train_batch: Any = SimpleNamespace(parts=parts, held=noted() if name in ("ppo", "grpo", "critic") else held, weight=64)
        training: Any = SimpleNamespace(world=world, progress=SimpleNamespace(settings=SETTINGS))
        sums = loop._gradients(training, loop.TrainableObjective(TrainableModel(network, optimizer), objective, "lr"), train_batch)
        values = loop.total(torch.cat([sums, optimizer.squared_norm()[None]]))
        optimizer.update(SETTINGS, 1e-3, 1e-8, values[-1:].sqrt_()[0])
    assert {"mm", "_fused_adamw_"} <= watch.seen


def test_the_watch_finds_what_it_is_to_find() -> None:
    x, at = torch.zeros(4, 4, device=ACCELERATOR), torch.zeros(4, dtype=torch.int64, device=ACCELERATOR)
    forbidden: list[Callable[[], Any]] = [
        lambda: x.sum().item(), lambda: x.cumsum(0), lambda: x[x > 0], lambda: torch.zeros(4).to(ACCELERATOR), lambda: x.median(),
        lambda: torch.tensor([1.0], device=ACCELERATOR), lambda: x.index_add(0, at, x), lambda: x.scatter_add(0, at[:, None], x),
        lambda: x.copy_(torch.zeros(4, 4)), lambda: x.kthvalue(1), lambda: x.nonzero(), lambda: bool(x.sum() > 0),
    ]  # fmt: skip
    for each in forbidden:
        with pytest.raises((AssertionError, RuntimeError)), Watch():
            each()
    with Watch():
        assert at.cumsum(0).device == ACCELERATOR
        x.copy_(torch.zeros(4, 4), non_blocking=True)


class Fetched:
    """For `HostCopy`: what the host is given of a step, which is looked at a moment later."""

    def __init__(self, values: Tensor) -> None:
        self._shape = values.shape

    def tolist(self) -> Any:
        return torch.ones(self._shape).tolist()


@pytest.mark.parametrize("kernel", [False, True])
def test_a_step_of_the_engine_waits_for_its_tokens_alone(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in pieces, tokens one by one, top-k and top-p, greedy requests and alternatives included."""
    monkeypatch.setattr(sampling, "HostCopy", Fetched)
    monkeypatch.setattr(paged_attention, "_flash", lambda: lambda q, *_, **__: torch.empty_like(q))
    engine = Engine(CONFIG, VOCABULARY, ACCELERATOR, 64, page=16, running=4, step_tokens=8, kernel=kernel)
    for seed, more in enumerate(({}, {"top_k": 3}, {"top_p": 0.5, "alternatives": 2}, {"temperature": 0.0})):
        engine.add(Request(tuple(range(1, 20)), 5, seed=seed, **more))  # type: ignore[arg-type]
    with Watch() as watch:
        steps = 0
        while engine.busy:
            engine.step()
            steps += 1
    assert steps >= 8
    assert {"cumsum", "searchsorted", "sort"} <= watch.seen


def test_a_steps_metrics_are_copied_before_the_next_step_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a copy that is asked for after the next step was queued waits for that step."""
    asked: list[str] = []

    class Copied:
        def __init__(self, values: Tensor) -> None:
            asked.append(f"copy {values[0]:g}")
            self._values = values

        def tolist(self) -> Any:
            asked.append(f"read {self._values[0]:g}")
            return self._values.tolist()

    monkeypatch.setattr("trainer.control.reporting.HostCopy", Copied)
    reporter = MetricReporter(NoLink(), lambda step, finite, loss: None)
    for step in (1, 2):
        read = {"train/loss": 0.0, "train/grad_norm": 0.0}
        reporter.put(StepReport(1, step, 0, {}, torch.tensor([float(step)]), lambda _, read=read: read))  # type: ignore[misc]
    reporter.flush()
    assert asked == ["copy 1", "copy 2", "read 1", "read 2"]


def drawn_by_floats(every: Tensor, wanted: Tensor) -> Tensor:
    """As it was drawn before: by float64 sums."""
    sums = every.double().exp().cumsum(-1)
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(sums[:, -1:]))
    return torch.searchsorted(sums, torch.minimum(wanted[:, None] * sums[:, -1:], below), right=True)[:, 0]


def test_whole_chances_draw_what_floats_did() -> None:
    """10,000 draws from a vocabulary of 1,000: the same but where a draw falls within rounding of a border; none of chance 0."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(10_000, 1_000, generator=source) * 3
    logits[:, ::7] = -torch.inf
    requests = [Request((1,), 1, seed=seed) for seed in range(len(logits))]
    sequences: list[Any] = [SimpleNamespace(request=request, drawn=0) for request in requests]
    found = torch.tensor(sampling.sample_tokens(logits, sequences).tokens)
    seeds, numbers = np.arange(len(logits), dtype=np.uint64), np.zeros(len(logits), np.uint64)
    expected = drawn_by_floats(logits.log_softmax(-1), torch.from_numpy(sampling.uniform(seeds, numbers)))
    assert int((found != expected).sum()) <= 1
    assert not (found % 7 == 0).any()


@pytest.mark.parametrize(
    ("changes", "serves"),
    [
        ({}, True),
        ({"capability": (7, 5)}, False),
        ({"head": 264}, False),
        ({"head": 60}, False),
        ({"size": 128}, False),
        ({"dtype": torch.float32}, False),
        ({"device": torch.device("cpu")}, False),
        ({"alibi": True}, False),
        ({"alibi": True, "flash": True}, True),
    ],
)
def test_the_engines_kernel_is_used_for_what_it_takes(
    changes: dict[str, Any], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "device": torch.device("cuda", 0),
        "dtype": torch.bfloat16,
        "head": 128,
        "size": 256,
        "alibi": False,
    } | changes
    capability = given.pop("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", object() if given.pop("flash", False) else None)
    attention.runs_varlen.cache_clear()
    assert paged_attention.kernel_serves(**given) == serves
    attention.runs_varlen.cache_clear()


def test_frequencies_stay_where_a_graph_reads_them() -> None:
    """However many other tables are made in the meantime."""
    model = Decoder(CONFIG, VOCABULARY)
    first, _ = model._table(CONTEXT, torch.device("cpu"))
    others = [Decoder(CONFIG, VOCABULARY) for _ in range(3)]
    for number, other in enumerate(others):
        for factor in range(1, 200):
            other.set_positions(Rope(kind="linear", factor=float(factor + number)), CONTEXT)
            other._table(CONTEXT, torch.device("cpu"))
    again, _ = model._table(CONTEXT + 8, torch.device("cpu"))
    assert again.data_ptr() == first.data_ptr()


def test_rms_norm_rounds_once() -> None:
    """bfloat16: what float64 gives, rounded; before, the normalised input was rounded too, and up to two units were lost."""
    source = torch.Generator().manual_seed(1)
    x = (torch.randn(64, 96, generator=source) * 3).bfloat16()
    norm = RMSNorm(96, 1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1, generator=source)
    norm.bfloat16()
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    assert float((norm(x) == exact.bfloat16()).float().mean()) > 0.999


def test_pinned_memory_is_what_was_asked_for_and_unpinned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not rounded up to a power of two, but to a page."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(transfer, "_cudart", lambda: SimpleNamespace(
        cudaHostRegister=lambda *arguments: calls.append(("pin", *arguments)) or 0,
        cudaHostUnregister=lambda *arguments: calls.append(("unpin", *arguments)),
    ))  # fmt: skip
    size = 5 * mmap.PAGESIZE + 3
    memory = transfer.host_memory(size, pinned=True)
    view = memory[8:16].view(torch.float32)
    assert memory.shape == (size,) and not memory.any() and memory.data_ptr() % mmap.PAGESIZE == 0
    assert calls == [("pin", memory.data_ptr(), size, 0)]
    del memory
    assert len(calls) == 1, "a view keeps it"
    place = view.data_ptr() - 8
    del view
    assert calls[1:] == [("unpin", place)]
    assert transfer.host_memory(0, pinned=False).shape == (0,)


def test_exchanges_of_heads_are_all_under_way_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def started(x: Tensor, *_: Any) -> Tensor:
        order.append("start")
        return x

    def arrived(x: Tensor) -> Tensor:
        order.append("wait")
        return x

    monkeypatch.setattr(sequence_parallel.collectives, "all_to_all_single_autograd", started)
    monkeypatch.setattr(sequence_parallel, "_arrived", arrived)
    q, k = torch.zeros(2, 8, 5, 4), torch.zeros(2, 2, 5, 4)
    found = sequence_parallel.SequenceSharding(context=sequence_parallel.RankGroup(size=2)).heads(q, k, k)
    assert order == ["start"] * 3 + ["wait"] * 3
    assert [tuple(each.shape) for each in found] == [(2, 4, 10, 4), (2, 1, 10, 4), (2, 1, 10, 4)]
