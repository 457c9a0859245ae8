"""The decoder, its positions and its masks, against numbers from elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from midwatch.recipe.model import Model, Rope
from trainer.model.decoder import Decoder
from trainer.model.logprobs import log_probs
from trainer.model.positions import learned
from trainer.model.rope import frequencies

CONFIG = Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48)


def decoder(config: Model = CONFIG, seed: int = 0, vocabulary: int = 64) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config, vocabulary)
    model.to_empty(device="cpu")
    model.initialise(seed)
    model.set_positions(Rope(), 32)
    return model


def rows(*documents: int) -> tuple[Tensor, Tensor]:
    """Positions and segments of one row of documents of these lengths."""
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate(documents)])[None]
    return positions, segments


# Hugging Face transformers 5.23, ROPE_INIT_FUNCTIONS["yarn"] and ["linear"].
HF_YARN = [1.0, 0.2371708, 0.05, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]
HF_YARN_64 = [1.0, 0.1939228, 0.03760603, 0.005165637, 0.0004517626, 3.428102e-05, 6.64787e-06, 1.289173e-06]
HF_LINEAR = [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]


def test_yarn_is_that_of_hugging_face() -> None:
    found, scale = frequencies(Rope(kind="yarn", factor=4.0), 16, 10_000.0, 64)
    assert found.tolist() == pytest.approx(HF_YARN, rel=1e-6)
    assert scale == pytest.approx(1.138629436111989, rel=1e-12)
    found, scale = frequencies(Rope(kind="yarn", factor=8.0), 64, 500_000.0, 8192)
    assert found.tolist()[::4] == pytest.approx(HF_YARN_64, rel=1e-6)
    assert scale == pytest.approx(1.2079441541679836, rel=1e-12)


def test_linear_and_ntk_stretch_as_published() -> None:
    assert frequencies(Rope(kind="linear", factor=4.0), 16, 10_000.0, 64)[0].tolist() == pytest.approx(HF_LINEAR, rel=1e-6)
    plain, ntk = (frequencies(Rope(kind=kind, factor=4.0), 16, 10_000.0, 64)[0] for kind in ("none", "ntk"))
    assert ntk[0] == plain[0]
    assert float(ntk[-1]) == pytest.approx(float(plain[-1]) / 4.0, rel=1e-5)


def test_yarn_at_factor_one_changes_nothing() -> None:
    plain, _ = frequencies(Rope(), 16, 10_000.0, 64)
    found, scale = frequencies(Rope(kind="yarn", factor=1.0), 16, 10_000.0, 64)
    assert torch.equal(found, plain) and scale == 1.0


def test_no_logit_depends_on_another_document() -> None:
    model = decoder()
    model.documents_masked = True
    positions, segments = rows(5, 9, 6)
    tokens = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, :5] = (other[:, :5] + 7) % 64
    other[:, 14:] = (other[:, 14:] + 7) % 64
    before, after = model(tokens, positions, segments), model(other, positions, segments)
    assert torch.equal(before[:, 5:14], after[:, 5:14])
    alone = model(tokens[:, 5:14], positions[:, 5:14], segments[:, 5:14])
    assert torch.allclose(before[:, 5:14], alone, atol=1e-6)


def test_unmasked_documents_see_each_other() -> None:
    model = decoder()
    positions, segments = rows(5, 9)
    tokens = torch.randint(0, 64, (1, 14), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, :5] = (other[:, :5] + 7) % 64
    assert not torch.allclose(model(tokens, positions, segments)[:, 5:], model(other, positions, segments)[:, 5:], atol=1e-4)


def test_no_logit_depends_on_what_follows() -> None:
    for masked in (False, True):
        model = decoder()
        model.documents_masked = masked
        positions, segments = rows(12)
        tokens = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
        other = tokens.clone()
        other[:, 8:] = (other[:, 8:] + 7) % 64
        assert torch.equal(model(tokens, positions, segments)[:, :8], model(other, positions, segments)[:, :8])


def every_model() -> Iterator[Model]:
    """All combinations of the recipe's choices, tiny."""
    shapes: tuple[dict[str, Any], ...] = ({}, {"num_kv_heads": 1}, {"num_kv_heads": 2, "head_dim": 6}, {"intermediate_size": 20})
    for position, norm, place, mlp, bias, tied in itertools.product(
        ("rope", "alibi", "sinusoidal", "learned", "none"),
        ("rmsnorm", "layernorm"),
        ("before", "after"),
        ("swiglu", "gelu", "relu"),
        (False, True),
        (False, True),
    ):
        more = shapes[(bias + 2 * tied + len(mlp)) % len(shapes)]
        rows = 24 if position == "learned" else None
        choices: dict[str, Any] = {
            "position": position,
            "norm": norm,
            "norm_place": place,
            "mlp": mlp,
            "bias": bias,
            "tie_embeddings": tied,
        }
        odd = (len(position) + len(norm) + len(place) + len(mlp)) % 2 == 1
        extras = {"embedding_norm": odd, "attention_bias": not bias if odd else None, "max_positions": rows}
        yield Model(num_layers=2, hidden_size=16, num_heads=4, **choices, **extras, **more)


def test_the_recipe_counts_the_parameters_there_are_in_every_model() -> None:
    for config in every_model():
        assert config.problems() == []
        with torch.device("meta"):
            model = Decoder(config, 40)
        assert sum(p.numel() for p in model.parameters()) == config.parameters(40), config


def test_no_model_lets_a_document_or_the_future_show() -> None:
    positions, segments = rows(5, 9, 6)
    tokens = torch.randint(0, 40, (1, 20), generator=torch.Generator().manual_seed(1))
    others, later = tokens.clone(), tokens.clone()
    others[:, :5], others[:, 14:] = (others[:, :5] + 7) % 40, (others[:, 14:] + 7) % 40
    later[:, 10:] = (later[:, 10:] + 7) % 40
    for config in every_model():
        if not config.tie_embeddings:
            continue
        model = decoder(config, vocabulary=40)
        model.documents_masked = True
        with torch.no_grad():
            before, after, past = (model(row, positions, segments) for row in (tokens, others, later))
            alone = model(tokens[:, 5:14], positions[:, 5:14], segments[:, 5:14])
        assert torch.allclose(before[:, 5:14], after[:, 5:14], atol=1e-6), config
        assert torch.allclose(before[:, 5:14], alone, atol=1e-5), config
        assert torch.allclose(before[:, :10], past[:, :10], atol=1e-6), config
        assert not torch.allclose(before, after, atol=1e-3), config


def test_every_model_but_one_without_positions_tells_orders_apart() -> None:
    positions, segments = rows(8)
    tokens = torch.arange(8)[None]
    swapped = tokens.clone()
    swapped[0, 1], swapped[0, 3] = tokens[0, 3], tokens[0, 1]
    for config in every_model():
        if config.norm == "rmsnorm" and config.mlp == "relu" and not config.bias:
            model = decoder(msgspec.structs.replace(config, num_layers=1), vocabulary=40)
            with torch.no_grad():
                model.blocks["0"].attention.qkv.weight.mul_(20)
                last, other = (model(row, positions, segments)[0, -1] for row in (tokens, swapped))
            assert torch.allclose(last, other, atol=1e-6) == (config.position == "none"), config


def test_learned_positions_are_read_between_their_rows() -> None:
    table = torch.tensor([[0.0], [1.0], [4.0]])
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 9]])
    assert learned(table, places, 2.0).flatten().tolist() == pytest.approx([0.0, 0.5, 1.0, 2.5, 4.0, 4.0, 4.0])
    assert learned(table, places[:, :3], 1.0).flatten().tolist() == [0.0, 1.0, 4.0]


def test_a_stage_changes_how_positions_are_read_without_changing_a_parameter() -> None:
    positions, segments = rows(20)
    tokens = torch.randint(0, 40, (1, 20), generator=torch.Generator().manual_seed(1))
    for position, rope, factor in (("rope", Rope(kind="linear", factor=2.0), 1.0), ("learned", Rope(), 2.0)):
        rows_of = 10 if position == "learned" else None
        model = decoder(Model(num_layers=1, hidden_size=16, num_heads=2, position=position, max_positions=rows_of), vocabulary=40)  # type: ignore[arg-type]
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        plain = model(tokens, positions, segments)
        model.set_positions(rope, 10, factor)
        stretched = model(tokens, positions, segments)
        assert not torch.allclose(plain, stretched, atol=1e-6)
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        if position == "learned":
            even = model(tokens[:, :1], torch.tensor([[6]]), segments[:, :1])
            model.set_positions(rope, 10, 1.0)
            assert torch.equal(even, model(tokens[:, :1], torch.tensor([[3]]), segments[:, :1]))


def test_flops_count_matrix_products_and_not_what_is_looked_up() -> None:
    plain = decoder(Model(num_layers=2, hidden_size=16, num_heads=4), vocabulary=40)
    untied = decoder(Model(num_layers=2, hidden_size=16, num_heads=4, tie_embeddings=False), vocabulary=40)
    table = decoder(Model(num_layers=2, hidden_size=16, num_heads=4, position="learned", max_positions=64), vocabulary=40)
    assert plain.flops_per_token(64) == untied.flops_per_token(64) == table.flops_per_token(64)
    wide = decoder(Model(num_layers=2, hidden_size=16, num_heads=4, head_dim=8), vocabulary=40)
    dense = wide.config.parameters(40)
    assert wide.flops_per_token(64) == 6 * dense + 12 * 2 * 32 * 64


def test_the_seed_alone_decides_the_weights() -> None:
    one, same, other = decoder(seed=1), decoder(seed=1), decoder(seed=2)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_layers_that_write_to_the_residual_stream_begin_smaller() -> None:
    model = decoder(Model(num_layers=8, hidden_size=64, num_heads=4))
    block = model.blocks["0"]
    assert float(block.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(block.attention.out.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)


def test_log_probs_are_those_of_the_targets() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]])
    found = log_probs(logits, torch.tensor([[2, 0]]))
    assert found.tolist()[0] == pytest.approx([-0.40760596, -0.09492296])
