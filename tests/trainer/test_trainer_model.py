"""The decoder, its positions and its masks, against numbers from elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from launcher.recipe.model import Model, Rope
from trainer.model import Decoder, log_probs
from trainer.rope import frequencies

CONFIG = Model(layers=2, width=32, heads=4, kv_heads=2, hidden=48)


def decoder(config: Model = CONFIG, seed: int = 0) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config, 64)
    model.to_empty(device="cpu")
    model.initialise(seed)
    model.set_rope(Rope(), 32, torch.device("cpu"))
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


def test_the_recipe_counts_the_parameters_there_are() -> None:
    for tied in (True, False):
        config = Model(layers=2, width=32, heads=4, kv_heads=2, hidden=48, tied=tied)
        assert sum(p.numel() for p in decoder(config).parameters()) == config.parameters(64)


def test_the_seed_alone_decides_the_weights() -> None:
    one, same, other = decoder(seed=1), decoder(seed=1), decoder(seed=2)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_layers_that_write_to_the_residual_stream_begin_smaller() -> None:
    model = decoder(Model(layers=8, width=64, heads=4))
    block = model.blocks[0]
    assert float(block.attention.query.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(block.attention.out.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)


def test_log_probs_are_those_of_the_targets() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]])
    found = log_probs(logits, torch.tensor([[2, 0]]))
    assert found.tolist()[0] == pytest.approx([-0.40760596, -0.09492296])
