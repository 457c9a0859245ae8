"""What makes steps faster without changing what is computed, or by how much it may: compiled blocks, products in float8."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from midwatch.recipe import Model
from trainer.model.activation_checkpointing import Mode
from trainer.model.decoder import Block, ColumnParallelLinear, Decoder, MemoryOptions, RowParallelLinear
from trainer.model.float8 import float8_product

SHAPE = Model(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2)
VOCABULARY = 100


def decoder(config: Model = SHAPE, mode: Mode = "none") -> Decoder:
    model = Decoder(config, VOCABULARY)
    model.initialise(0)
    model.documents_masked, model.memory = True, MemoryOptions(recompute=mode)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 34), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(33).expand(2, 33)
    found = model(tokens[:, :-1], positions, (positions > 15).int(), tokens[:, 1:])
    (-found.mean()).backward()
    return {"loss": -found.mean().detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_a_compiled_block_is_one_graph_and_computes_the_same(mode: Mode, backend: str) -> None:
    torch._dynamo.reset()
    plain, compiled = decoder(mode=mode), decoder(mode=mode)
    for block in compiled.blocks.values():
        assert isinstance(block, Block)
        block.compiled = torch.compile(block.through, fullgraph=True, backend=backend)
    expected, found = gradients(plain), gradients(compiled)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_products_in_float8_are_near_those_in_bfloat16(scaling: str) -> None:
    plain, rounded = (decoder().to(torch.bfloat16) for _ in range(2))
    product = float8_product(scaling, torch.device("cpu"))
    changed = [module for module in rounded.blocks.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    for module in changed:
        module.product = product
    assert len(changed) == 2 * 5
    expected, found = gradients(plain), gradients(rounded)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=0.01)
    for name, value in expected.items():
        if value.ndim > 1:
            off = float((found[name] - value).float().norm() / value.float().norm())
            assert 0 < off < 0.15, f"{name}: {off:.3f}"


def test_float8_wants_sizes_by_sixteens() -> None:
    def problems(**keys: Any) -> list[tuple[str, str]]:
        return msgspec.structs.replace(SHAPE, float8="tensorwise", **keys).problems()

    assert problems() == []
    assert problems(intermediate_size=100) == [
        ("float8", "needs sizes that are multiples of 16, and intermediate_size is 100 (drop it)")
    ]
