"""Logits equal those of Hugging Face's models with the same random weights, in float32."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from midwatch.recipe.huggingface.config import model_keys
from midwatch.recipe.huggingface.weights_map import MappedParameter, layout, misfits
from midwatch.recipe.model import Model, Rope
from trainer.model.decoder import Decoder
from trainer.model.norms import RMSNorm
from trainer.model.positions import alibi_slopes, sinusoids

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VOCABULARY = 96
ORIGINAL = 32
"""Context before any stretching; rows of twice that are looked at too."""

LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "tie_word_embeddings": True,
}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, with its temperature given": {"factor": 4.0, "attention_factor": 1.3, "original_max_position_embeddings": ORIGINAL},
    "yarn, as DeepSeek": {
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.8, 2.4, 3.0],
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"factor": 1.5, "partial_rotary_factor": 0.5},
}


def roughen(model: Any) -> Any:
    """Random weights everywhere, biases and norms too, so that nothing is equal by being zero or one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def gathered(part: MappedParameter, tensors: dict[str, Tensor]) -> Tensor:
    """A parameter of ours out of theirs, by the layout."""
    rows = []
    for piece in part.pieces:
        whole = tensors[piece.tensor].T if part.transposed else tensors[piece.tensor]
        rows.append(whole[piece.start : piece.start + piece.length])
    return torch.cat(rows)


def ours(theirs: Any, context: int = ORIGINAL) -> Decoder:
    """Our model with the weights of theirs."""
    family, keys = model_keys(theirs.config.to_dict())
    config = msgspec.convert(keys, Model)
    assert config.problems() == [] and misfits(config, family) == []
    model = Decoder(config, VOCABULARY)
    parts = layout(config, family, VOCABULARY)
    parameters = dict(model.named_parameters())
    assert set(parts) == set(parameters)
    tensors = theirs.state_dict()
    with torch.no_grad():
        for name, part in parts.items():
            parameters[name].copy_(gathered(part, tensors))
    model.set_positions(config.rope, context)
    return model


@torch.no_grad()
def difference(theirs: Any, length: int) -> float:
    """Largest difference of a logit, over a batch of rows."""
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    positions = torch.arange(length).expand_as(tokens)
    found = ours(theirs)(tokens, positions, torch.zeros_like(tokens))
    wanted = theirs(input_ids=tokens).logits.float()
    assert wanted.std() > 0.3
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama_with_grouped_queries_and_tied_weights_is_that_of_hugging_face_at_every_rope_scaling(scaling: str) -> None:
    settings = {"rope_type": scaling.split(",")[0], "rope_theta": 5_000.0} | SCALINGS[scaling]
    longer = {"max_position_embeddings": 4 * ORIGINAL} if "original_max_position_embeddings" in settings else {}
    config = transformers.LlamaConfig(**LLAMA | longer, rope_parameters=settings, attn_implementation="eager")
    theirs = roughen(transformers.LlamaForCausalLM(config))
    for length in (ORIGINAL // 2, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL):
        found = difference(theirs, length)
        print(f"llama, {scaling}, {length} tokens: {found:.1e}")
        assert found < TOLERANCE


def test_every_rope_scaling_that_transformers_has_is_tested() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert {scaling.split(",")[0] for scaling in SCALINGS} >= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
        {"head_dim": 16, "rms_norm_eps": 1e-3},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_llama_in_its_other_shapes_is_that_of_hugging_face(changes: dict[str, Any]) -> None:
    theirs = roughen(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes, attn_implementation="eager")))
    assert difference(theirs, 24) < TOLERANCE


@pytest.mark.parametrize("heads", [4, 6, 8])
def test_alibi_is_that_of_bloom(heads: int) -> None:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=3, n_head=heads)
    theirs = roughen(transformers.BloomForCausalLM(config))
    found = difference(theirs, 40)
    print(f"bloom, {heads} heads: {found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 40, 71])
def test_alibi_slopes_are_those_of_bloom_for_any_number_of_heads(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert torch.allclose(alibi_slopes(heads, torch.device("cpu")), theirs, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_learned_positions_are_those_of_gpt2(tied: bool) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=48, n_layer=3, n_head=4, tie_word_embeddings=tied
    )
    theirs = roughen(transformers.GPT2LMHeadModel(config))
    found = difference(theirs, 40)
    print(f"gpt2, tied {tied}: {found:.1e}")
    assert found < TOLERANCE


@torch.no_grad()
def test_norms_after_are_those_of_the_first_gpt() -> None:
    settings = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=40, n_embd=48, n_layer=3, n_head=4)
    theirs = roughen(transformers.OpenAIGPTLMHeadModel(settings))
    shape = Model(num_layers=3, hidden_size=48, num_heads=4, position="learned", max_positions=40)
    config = msgspec.structs.replace(shape, norm="layernorm", norm_place="post", mlp="gelu", bias=True)
    model, tensors = Decoder(config, VOCABULARY), theirs.state_dict()
    names = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    names |= {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    for name, parameter in model.named_parameters():
        outer = {"embedding.weight": "transformer.tokens_embed.weight", "positions.weight": "transformer.positions_embed.weight"}
        if name in outer:
            parameter.copy_(tensors[outer[name]])
            continue
        _, layer, inner = name.split(".", 2)
        part, _, kind = inner.rpartition(".")
        tensor = tensors[f"transformer.h.{layer}.{names[part]}.{kind}"]
        tensor = tensor.T if tensor.ndim == 2 else tensor
        if part == "attention.qkv":  # theirs: all queries, all keys, all values; ours: those of a head, then of the next
            tensor = tensor.view(3, 4, 12, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        parameter.copy_(tensor)
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    found = model(tokens, torch.arange(40).expand_as(tokens), torch.zeros_like(tokens))
    wanted = theirs(input_ids=tokens).logits
    print(f"openai-gpt: {(found - wanted).abs().max():.1e}")
    assert (found - wanted).abs().max() < TOLERANCE


def test_sinusoids_are_those_published() -> None:
    found = sinusoids(torch.arange(50)[None], 16)[0]
    for place in (0, 1, 7, 49):
        for pair in range(8):
            angle = place / 10_000 ** (2 * pair / 16)
            assert float(found[place, 2 * pair]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(found[place, 2 * pair + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


def test_a_theta_of_the_stage_takes_the_place_of_the_models() -> None:
    theirs = roughen(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attn_implementation="eager")))
    model = ours(theirs)
    model.set_positions(Rope(theta=1e6), ORIGINAL)
    theirs.config.rope_parameters["rope_theta"] = 1e6
    other = transformers.LlamaForCausalLM(theirs.config)
    other.load_state_dict(theirs.state_dict())
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        found, wanted = model(tokens, tokens, torch.zeros_like(tokens)), other.eval()(input_ids=tokens).logits
    assert torch.allclose(found, wanted, atol=TOLERANCE)


def test_rmsnorms_gradients_are_those_of_hugging_face() -> None:
    """Whose operations are one after the other; ours are by hand."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(1)
    for shape, eps in (((2, 9, 64), 1e-5), ((1, 1, 8), 1e-6), ((3, 300), 1e-2)):
        x, back = (3 * torch.randn(shape, generator=generator) + 1 for _ in range(2))
        weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
        found = []
        for norm in (RMSNorm(shape[-1], eps), LlamaRMSNorm(shape[-1], eps)):
            norm.weight.data.copy_(weight)
            taken = x.clone().requires_grad_()
            out = norm(taken)
            out.backward(back)
            assert taken.grad is not None and norm.weight.grad is not None
            found.append((out.detach(), taken.grad, norm.weight.grad))
        for mine, theirs in zip(*found, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
