"""Every way to lay a model over ranks, alone and with each other, against one rank that does all: losses and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from trainer_harness import logs, start_ranks
from trainer_kernels import FlashAttn

from midwatch.recipe import Cluster, Model, Parallel, Stage
from trainer.batches import DeviceRows
from trainer.model import document_offsets
from trainer.model.decoder import Decoder

VOCABULARY = 61
LLAMA = Model(num_layers=4, hidden_size=32, num_heads=8, num_kv_heads=4, intermediate_size=48)
MODELS = {
    "llama": LLAMA,
    "untied": msgspec.structs.replace(LLAMA, tie_embeddings=False),
    "one key head": msgspec.structs.replace(LLAMA, num_kv_heads=1, intermediate_size=40),
    "bloom": Model(
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        position="alibi",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        embedding_norm=True,
        intermediate_size=64,
    ),
    "gpt": Model(
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        position="learned",
        max_positions=64,
        norm="layernorm",
        mlp="relu",
        bias=True,
        norm_place="post",
    ),
}


def stage(**keys: Any) -> Stage:
    known = {"name": "s", "objective": "pretrain", "steps": 1, "context": 37, "global_batch": 8, "mixture": {"a": 1.0}}
    return Stage(**(known | keys))


class Case(msgspec.Struct):
    """One layout."""

    model: str
    parallel: Parallel = Parallel()
    context: int = 1
    masked: bool = False
    kernel: bool = False
    """Attention by documents' bounds."""
    more: dict[str, Any] = {}

    def __str__(self) -> str:
        sizes = {name: getattr(self.parallel, name) for name in ("tensor", "pipeline", "schedule", "hsdp_shard_size", "offload")}
        return f"{self.model} {sizes} context {self.context} masked {self.masked} kernel {self.kernel} {self.more}"


def rows(count: int, time: int = 37) -> DeviceRows:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (count, time + 1), generator=generator)
    mask = (torch.rand(count, time, generator=generator) < 0.9).float()
    segments = (torch.arange(time)[None] >= torch.randint(1, time, (count, 2), generator=generator)[..., None]).sum(1)
    starts = torch.stack([torch.searchsorted(row, row) for row in segments])
    return DeviceRows(tokens[:, :-1], tokens[:, 1:], mask, segments.to(torch.int32), torch.arange(time) - starts)


def known(rows: DeviceRows) -> DeviceRows:
    """With their documents."""
    starts, longest = document_offsets.found(rows.segments.numpy())
    return rows._replace(documents=document_offsets.Documents(torch.from_numpy(starts), longest))


def cut(rows: DeviceRows, start: int, count: int) -> DeviceRows:
    assert rows.documents is not None
    columns = (column[start : start + count] for column in rows[:-1])
    begun = rows.documents._replace(starts=rows.documents.starts[start : start + count])
    return DeviceRows(*columns, documents=begun)


def alone(case: Case, batch: DeviceRows) -> tuple[Tensor, dict[str, Tensor]]:
    """On one rank, without any of this: log-probabilities and the gradients of a weighed sum of them."""
    model = Decoder(MODELS[case.model], VOCABULARY)
    model.initialise(3)
    model.documents_masked = case.masked
    found = model(batch.tokens, batch.positions, batch.segments, batch.targets)
    (found * batch.mask).square().mean().backward()
    return found.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_on_rank(root: Path, cases: list[Case]) -> None:
    """What each rank does: each layout in turn; the largest differences from one rank."""
    from torch.distributed.tensor import DTensor

    from trainer.batches import filled, share
    from trainer.distributed import ring_attention
    from trainer.distributed.mesh import join, lay_out, open_store
    from trainer.model import attention
    from trainer.model.sharded_model import ShardedModel
    from trainer.optimizer import Optimizer, total

    torch.set_num_threads(1)
    ring_attention.TILE = 8  # more than one, for rows as short as these
    world = join(open_store(), "test", Cluster(device="cpu"), Parallel())
    said: list[tuple[str, float, float]] = []
    attention.flash_attn_varlen_func = kernel = FlashAttn()
    for case in cases:
        here = lay_out(world.device, case.parallel)
        network = ShardedModel(MODELS[case.model], VOCABULARY, here)
        network.initialise(3)
        where = stage(context_parallel=case.context, masked_documents=case.masked, **case.more)
        network.configure_stage(where, 37)
        batch = rows(8)
        attention._varlen_kernel = lambda *_: None
        expected, gradients = alone(case, batch)
        if case.kernel:
            attention._varlen_kernel = lambda *_: attention._flash_attn  # in float32 too
        first, last = share(0, 8, network.replica, network.replicas)
        mine = known(DeviceRows(*(column[first:last] for column in batch[:-1])))
        size = min(2, last - first)
        samples, size = filled(last - first, size, here.pipeline.size)
        whole = known(DeviceRows(*(_padded(column, 0, samples) for column in mine[:-1])))
        parts = [cut(whole, n, size) for n in range(0, samples, size)]

        def loss(number: int, found: Tensor, parts: list[DeviceRows] = parts, batch: DeviceRows = batch) -> Tensor:
            return (found * parts[number].mask).square().sum() / batch.mask.numel()

        if case.parallel.pipeline > 1 and case.context > 1:
            # A stage before it had rows of the same length, and shared them among none.
            network.configure_stage(stage(masked_documents=case.masked), 37)
            network.backward(parts, loss)
            network.configure_stage(where, 37)
            for parameter in network.parameters().values():
                parameter.grad = None
        network.backward(parts, loss)
        off = 0.0
        for name, parameter in network.parameters().items():
            found = parameter.grad
            assert isinstance(found, DTensor), name
            off = max(off, float((found.full_tensor() - gradients[name]).norm() / gradients[name].norm()))
        optimizer = Optimizer(network.parameters(), here.device, network.owned())
        whole = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
        off = max(off, float((total(optimizer.squared_norm()) / whole - 1).abs()))
        probable = network.log_probs(mine)
        network.reshard()
        if case.kernel:
            kernel.check()
            kernel.bounds.clear()
        said.append((str(case), off, float((probable - expected[first:last]).abs().max())))
    (root / f"said-{world.rank}.json").write_text(json.dumps(said))


def _padded(column: Tensor, start: int, size: int) -> Tensor:
    part = column[start : start + size]
    return torch.cat([part, torch.zeros(size - len(part), *column.shape[1:], dtype=column.dtype)])


def hold(tmp_path: Path, ranks: int, cases: list[Case]) -> None:
    statuses = start_ranks(tmp_path, ranks, check_on_rank, cases).wait(300)
    assert statuses == [0] * ranks, logs(tmp_path)
    for rank in range(ranks):
        said = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert len(said) == len(cases)
        for name, gradients, log_probs in said:
            print(f"{gradients:.1e} {log_probs:.1e} {name}")
            assert gradients < 1e-6 and log_probs < 2e-6, name


LAYOUTS: dict[str, tuple[Parallel, int]] = {
    "tensor": (Parallel(tensor=4), 1),
    "pipeline": (Parallel(pipeline=2), 1),
    "interleaved": (Parallel(pipeline=2, schedule="interleaved"), 1),
    "context": (Parallel(), 4),
    "hybrid": (Parallel(hsdp_shard_size=2), 1),
    "tensor, data": (Parallel(tensor=2), 1),
    "tensor, pipeline": (Parallel(tensor=2, pipeline=2), 1),
    "tensor, interleaved": (Parallel(tensor=2, pipeline=2, schedule="interleaved"), 1),
    "tensor, context": (Parallel(tensor=2), 2),
    "pipeline, context": (Parallel(pipeline=2), 2),
    "context, data": (Parallel(), 2),
    "context, hybrid": (Parallel(hsdp_shard_size=2), 2),
    "offloaded": (Parallel(tensor=2, offload="parameters"), 1),
}


def test_every_pair_of_ways_gives_what_one_rank_gives(tmp_path: Path) -> None:
    """Rows that do not divide, documents in them, masked in every other layout."""
    hold(tmp_path, 4, [Case("llama", *layout, masked=number % 2 == 1) for number, layout in enumerate(LAYOUTS.values())])


@pytest.mark.soak  # what it does shorter tests do in parts
def test_every_model_is_the_same_however_it_is_laid_out(tmp_path: Path) -> None:
    """One key head, which no tensor-parallel ranks can divide, goes round in a ring; of four heads two are a rank's of two."""
    cases = [Case(name, Parallel(tensor=2, pipeline=2)) for name in ("untied", "bloom", "gpt")]
    cases += [Case(name, Parallel(tensor=2), 2, masked) for name in ("untied", "bloom", "gpt") for masked in (False, True)]
    cases += [Case("one key head", Parallel(), size, masked) for size in (2, 4) for masked in (False, True)]
    cases += [Case("bloom", Parallel(), 4, True), Case("bloom", Parallel(pipeline=2), 2, False)]
    cases += [Case("llama", Parallel(reshard_after_forward=kept)) for kept in (True, False, 2)]
    hold(tmp_path, 4, cases)


def test_a_kernel_that_wants_documents_bounds_is_given_them_in_every_layout(tmp_path: Path) -> None:
    """A ring has none."""
    names = ("tensor", "interleaved", "context, data", "tensor, pipeline", "pipeline, context")
    cases = [Case("llama", *LAYOUTS[name], masked=True, kernel=True) for name in names]
    hold(tmp_path, 4, [*cases, Case("bloom", Parallel(tensor=2), 2, True, kernel=True)])


def test_what_needs_less_memory_gives_the_same(tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"activation_checkpointing": mode, "mlp_chunk_tokens": tile, "loss_chunk_tokens": 16}
        for mode in ("none", "selective", "block", "offloaded")
        for tile in (None, 11)
    ]
    layouts = [(Parallel(), 1), (Parallel(tensor=2, pipeline=2), 1), (Parallel(tensor=2), 2)]
    hold(tmp_path, 4, [Case("llama", *layouts[n % 3], masked=n % 2 == 0, more=way) for n, way in enumerate(ways)])


def products_on_rank(root: Path) -> None:
    """What each rank does: products of gathered tokens in both ways, and when what was begun."""
    import torch.nn.functional as F

    from trainer.distributed import sequence_parallel
    from trainer.distributed.mesh import join, open_store

    torch.set_num_threads(1)
    world = join(open_store(), "test", Cluster(device="cpu"), Parallel(tensor=2))
    spread = sequence_parallel.SequenceSharding(world.tensor)
    same = []
    for dtype in (torch.float32, torch.bfloat16):
        for widths, biased in (((40,), True), ((24, 24), False)):
            source = torch.Generator().manual_seed(world.rank)

            def drawn(*shape: int, source: torch.Generator = source, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(*shape, generator=source).to(dtype).requires_grad_()

            x, weights = drawn(3, 8, 16), [drawn(width, 16) for width in widths]
            biases = [drawn(width) if biased else None for width in widths]
            back = [drawn(3, 16, width).detach() for width in widths]
            given = [each for each in (x, *weights, *biases) if each is not None]
            whole = spread.gather(x)
            expected = [F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            exact = torch.autograd.grad(expected, given, back)
            found = spread.gathered_products(x, weights, biases)
            gradients = torch.autograd.grad(found, given, back)
            same += [torch.equal(*each) for each in zip((*found, *gradients), (*expected, *exact), strict=True)]
    (root / f"same-{world.rank}.json").write_text(json.dumps(same))


def test_gathered_products_are_the_same_to_the_bit(tmp_path: Path) -> None:
    assert start_ranks(tmp_path, 2, products_on_rank).wait(120) == [0, 0], logs(tmp_path)
    for rank in range(2):
        same = json.loads((tmp_path / f"same-{rank}.json").read_text())
        assert len(same) == 2 * (1 + 3 + 2 + 3) and all(same)


def test_weights_gradients_are_computed_while_the_inputs_is_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank's own gradient is waited for last."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainer.distributed import sequence_parallel

    order: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
            if function is torch.ops.aten.mm.default:
                order.append("product")
            return function(*arguments, **(more or {}))

    def begun(x: Tensor, *_: Any) -> Tensor:
        order.append("begun")
        return x[:, : x.shape[1] // 2]

    monkeypatch.setattr(sequence_parallel, "_gather", lambda x, *_: torch.cat([x, x], 1))
    monkeypatch.setattr(sequence_parallel, "_begin_scatter", begun)
    arrived = sequence_parallel._arrived
    x, weights = torch.randn(1, 4, 8, requires_grad=True), [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    found = sequence_parallel.SequenceSharding(sequence_parallel.RankGroup(size=2)).gathered_products(x, weights, [None, None])
    monkeypatch.setattr(sequence_parallel, "_arrived", lambda x: (order.append("waited"), arrived(x))[1])
    with Products():
        torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert order == ["product", "product", "begun", "product", "product", "waited"]
