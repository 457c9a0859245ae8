"""A directory whose files contradict each other is refused by name, or its logits are those of `transformers`."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from midwatch.recipe.huggingface.files import DirectoryError, open_directory
from midwatch.recipe.model import Model
from trainer.huggingface.load import _fill
from trainer.model.decoder import Decoder

transformers = pytest.importorskip("transformers")

Config = dict[str, Any]
Weights = dict[str, Tensor]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
TOLERANCE = 1e-4


def sizes(family: str, rng: random.Random) -> Config:
    """A random configuration that is consistent."""
    if family == "gpt2":
        heads = rng.choice([2, 4])
        found: Config = {"n_embd": heads * rng.choice([4, 8]), "n_head": heads, "n_layer": 2, "n_inner": rng.choice([None, 40])}
        return found | {"n_positions": 64, "tie_word_embeddings": rng.random() < 0.5}
    if family == "bloom":
        heads = rng.choice([2, 3, 4])
        return {"hidden_size": heads * 8, "n_head": heads, "n_layer": 2, "tie_word_embeddings": rng.random() < 0.5}
    heads, groups = rng.choice([(4, 2), (4, 4), (6, 3), (2, 1)])
    found = {"hidden_size": heads * 8, "num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": 2}
    found |= {"intermediate_size": 40, "max_position_embeddings": 64, "tie_word_embeddings": rng.random() < 0.5}
    found |= {"head_dim": rng.choice([8, 16])}
    if family == "llama":
        found |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
        rope = rng.choice([None, YARN, LLAMA3, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
        found |= {"rope_parameters": (rope or {"rope_type": "default"}) | {"rope_theta": rng.choice([1e4, 5e5])}}
    return found | ({"sliding_window": None} if family == "mistral" else {})


CLASSES = {"llama": "Llama", "mistral": "Mistral", "gpt2": "GPT2", "bloom": "Bloom"}


def write(place: Path, family: str, config: Config) -> None:
    kind = CLASSES[family]
    model = getattr(transformers, f"{kind}LMHeadModel" if family == "gpt2" else f"{kind}ForCausalLM")
    found = model(getattr(transformers, f"{kind}Config")(vocab_size=50, **config))
    for parameter in found.parameters():
        parameter.data.normal_(0, 0.3)
    found.save_pretrained(place)


def theirs(place: Path, ids: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


def ours(place: Path, ids: Tensor) -> Tensor:
    """Raises DirectoryError."""
    directory = open_directory(place)
    config = msgspec.convert(directory.keys, Model)
    assert config.vocabulary is not None
    model = Decoder(config, config.vocabulary)
    model.set_positions(config.rope, config.rope.original_context or 64)
    _fill(dict(model.named_parameters()), config, directory, 0)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        out: Tensor = model(ids, positions, torch.zeros_like(ids))
    return out


def both(place: Path, seed: int = 0) -> str:
    """`equal`, or the refusal; fails where the directory was read otherwise than `transformers` reads it."""
    ids = torch.randint(0, 40, (1, 30), generator=torch.Generator().manual_seed(seed))
    try:
        found = ours(place, ids)
    except DirectoryError as error:
        return str(error)
    try:
        wanted = theirs(place, ids)
    except Exception as error:  # it raises whatever it meets with
        return f"not read by transformers: {type(error).__name__}"
    difference = float((found - wanted).abs().max())
    assert difference < TOLERANCE, f"read, but {difference:.1e} from transformers"
    return "equal"


def weights(change: Callable[[Weights], object]) -> Callable[[Path, Config], object]:
    def apply(place: Path, _: Config) -> None:
        held = load_file(place / "model.safetensors")
        change(held)
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**values: Any) -> Callable[[Path, Config], object]:
    return lambda _, found: found.update(values)


def _own_head(held: Weights) -> None:
    table = next(value for name, value in held.items() if "embed_tokens" in name or "wte" in name or "word_embeddings.w" in name)
    held["lm_head.weight"] = torch.randn_like(table)


def _same_head(held: Weights) -> None:
    table = next(value for name, value in held.items() if "embed_tokens" in name or "wte" in name or "word_embeddings.w" in name)
    held["lm_head.weight"] = table.clone()


def _tied(change: Callable[[Weights], None], tied: Any = True) -> Callable[[Path, Config], object]:
    def apply(place: Path, found: Config) -> None:
        weights(change)(place, found)
        found["tie_word_embeddings"] = tied

    return apply


def _no_head(held: Weights) -> None:
    held.pop("lm_head.weight", None)


def _drop(*keys: str) -> Callable[[Path, Config], object]:
    return lambda _, found: [found.pop(key, None) for key in keys]


def _two_copies(place: Path, _: Config) -> None:
    """A whole file, and beside it an index of others, as a model that was saved twice."""
    held = load_file(place / "model.safetensors")
    save_file({name: value + 1 for name, value in held.items()}, place / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "model-00001-of-00001.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _split(place: Path, twice: bool, misplaced: bool) -> None:
    held = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(held)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    parts = {first: names[:3], second: names[3:]}
    mapped = {name: file for file, members in parts.items() for name in members}
    if twice:
        parts[second] = names[2:]
    if misplaced:
        mapped[names[0]] = second
    for file, members in parts.items():
        shift = 1 if file == second and twice else 0
        save_file({name: held[name] + (shift if name == names[2] else 0) for name in members}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


CONTRADICTIONS: dict[str, Callable[[Path, Config], object]] = {
    "nothing": lambda place, found: None,
    "tied, and another head": _tied(_own_head),
    "tied, and the same head": _tied(_same_head),
    "untied, and no head": _tied(_no_head, tied=False),
    "nothing about the head": _drop("tie_word_embeddings"),
    "tied is a word": config(tie_word_embeddings="false"),
    "tied is null": config(tie_word_embeddings=None),
    "another vocabulary": config(vocab_size=51),
    "a layer more": config(num_hidden_layers=3, n_layer=3),
    "a layer less": config(num_hidden_layers=1, n_layer=1),
    "a tensor left over": weights(lambda held: held.update({"model.extra.weight": torch.ones(3)})),
    "a tensor missing": weights(lambda held: held.pop(sorted(held)[-1])),
    "half precision": weights(lambda held: held.update({name: value.to(torch.bfloat16) for name, value in held.items()})),
    "mixed precision": weights(lambda held: held.update({name: held[name].half() for name in sorted(held)[::2]})),
    "config says bfloat16": config(dtype="bfloat16", torch_dtype="bfloat16"),
    "quantized": config(quantization_config={"quant_method": "fp8"}),
    "two copies": _two_copies,
    "a tensor in two files": lambda place, _: _split(place, twice=True, misplaced=False),
    "an index that is wrong": lambda place, _: _split(place, twice=False, misplaced=True),
    "an adapter": lambda place, _: (place / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "another activation": config(hidden_act="gelu", activation_function="relu"),
    "rope twice": config(rope_scaling={"type": "linear", "factor": 2.0}),
    "rope twice, the same": lambda _, found: found.update(rope_scaling=found.get("rope_parameters")),
    "rope and another base": config(rope_theta=777.0),
    "rope by layer": config(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 99.0}}),
    "rope of two types": config(rope_parameters={"rope_type": "default", "type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "rope's type is null": config(rope_parameters={"rope_type": None, "type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "half of a head turns": config(partial_rotary_factor=0.5),
    "rope, two originals": config(
        rope_parameters=YARN | {"rope_theta": 1e4}, original_max_position_embeddings=32, max_position_embeddings=128
    ),
    "rope, another factor": config(rope_parameters=YARN | {"rope_theta": 1e4, "factor": 8.0}),
    "rope, no factor": config(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 16}),
    "rope, no original": config(rope_parameters={"rope_type": "yarn", "factor": 2.0}, max_position_embeddings=32),
    "rope, theta null": config(rope_parameters={"rope_type": "default", "rope_theta": None}, rope_theta=123.0),
    "heads of another width": config(head_dim=4),
    "no width of heads": _drop("head_dim"),
    "other heads": config(num_attention_heads=2, n_head=1),
    "other groups": config(num_key_value_heads=1),
    "no groups": _drop("num_key_value_heads"),
    "biases by config alone": config(attention_bias=True, mlp_bias=True),
    "biases by weights alone": config(attention_bias=False, mlp_bias=False),
    "biases are words": config(attention_bias="no"),
    "a window": config(sliding_window=8),
    "a window as long as the model": config(sliding_window=64),
    "nothing about a window": _drop("sliding_window"),
    "layers of kinds": config(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "mistral by type": config(model_type="mistral"),
    "llama by type": config(model_type="llama"),
    "no type": _drop("model_type"),
    "no architecture": _drop("architectures"),
    "another architecture": config(architectures=["LlamaForSequenceClassification"]),
    "names of another family": config(n_embd=24, n_embed=24, hidden_size=16),
    "layers by two names": config(n_layer=2, num_hidden_layers=1),
    "heads by two names": config(n_head=2, num_attention_heads=1),
    "residual after the norm": config(apply_residual_connection_post_layernorm=True),
    "scaled by layer": config(scale_attn_by_inverse_layer_idx=True),
    "not scaled": config(scale_attn_weights=False),
    "upcast": config(reorder_and_upcast_attn=True, slow_but_exact=True),
    "no epsilon": _drop("rms_norm_eps", "layer_norm_epsilon"),
    "epsilon by another name": config(layer_norm_eps=0.5, rms_norm_eps=1e-5),
    "a table of another length": config(n_positions=32, n_ctx=32),
    "cut for the vocabulary": config(pruned_heads={"0": [1]}),
    "in parts": config(pretraining_tp=2),
    "weights by another name": lambda place, found: (
        shutil.copy(place / "model.safetensors", place / "other.safetensors"),
        weights(lambda held: held.update({name: value + 1 for name, value in held.items()}))(place, found),
        found.update(transformers_weights="other.safetensors"),
    ),
}
"""What is done to a directory, by its name in a failure."""


ROTARY = (
    "rope",
    "half of a head",
    "heads of another",
    "no width",
    "no groups",
    "other groups",
    "biases",
    "a window",
    "nothing about a w",
)
GPT2 = ("scaled", "not scaled", "upcast", "a table")


def families(name: str) -> list[str]:
    """Where a contradiction has a meaning; of what means the same everywhere, one of Llama's layout and another."""
    if name.startswith((*ROTARY, "layers of kinds", "llama by", "mistral by", "in parts")):
        return ["llama", "mistral"]
    if name.startswith(("residual", "names of", "layers by", "heads by")):
        return ["gpt2", "bloom"]
    return ["gpt2"] if name.startswith(GPT2) else ["llama", "bloom"]


def contradict(place: Path, family: str, names: list[str], seed: int) -> str:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    write(place, family, sizes(family, rng))
    found = json.loads((place / "config.json").read_text())
    for name in names:
        CONTRADICTIONS[name](place, found)
    (place / "config.json").write_text(json.dumps(found))
    return both(place, seed)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_directory_is_refused_or_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    for seed, family in enumerate(families(name)):
        print(f"{name}: {family}: {contradict(tmp_path / family, family, [name], seed)}")


REFUSED = {
    "tied, and another head": "llama/model.safetensors: 'lm_head.weight' is not the embedding, with tie_word_embeddings true",
    "rope twice": "rope_scaling {'type': 'linear', 'factor': 2.0} (keep the one that the model was trained with)",
    "rope by layer": "rope_parameters has an object for 'full_attention'",
    "rope of two types": "rope_parameters has the rope_type 'default' and the type 'linear'",
    "tied is a word": "tie_word_embeddings is 'false', not true or false",
    "two copies": "holds model.safetensors and model.safetensors.index.json of other files",
    "a tensor in two files": "is in model-00001-of-00002.safetensors, and it is in model-00002-of-00002.safetensors",
    "an adapter": "adapter_config.json: an adapter changes the weights",
    "quantized": "quantization_config is {'quant_method': 'fp8'}",
    "mistral by type": "architectures is ['LlamaForCausalLM']; of model_type 'mistral' only MistralForCausalLM can be read",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_refused_by_the_names_of_its_two_sides(name: str, tmp_path: Path) -> None:
    assert REFUSED[name] in contradict(tmp_path / "llama", "llama", [name], 0)


def test_a_mistral_is_read_unless_its_window_matters(tmp_path: Path) -> None:
    assert contradict(tmp_path / "none", "mistral", ["nothing"], 0) == "equal"
    assert contradict(tmp_path / "long", "mistral", ["a window as long as the model"], 0) == "equal"
    assert "sliding_window is 8, and can be read if" in contradict(tmp_path / "short", "mistral", ["a window"], 0)


@pytest.mark.soak
def test_any_two_contradictions_in_any_family(tmp_path: Path) -> None:
    rng = random.Random(7)
    for seed in range(400):
        family, names = rng.choice(list(CLASSES)), rng.sample(list(CONTRADICTIONS), rng.choice([1, 2]))
        place = tmp_path / str(seed)
        try:
            contradict(place, family, names, seed)
        except (FileNotFoundError, KeyError):
            continue  # the second change finds nothing that the first has left
        except AssertionError as error:
            raise AssertionError(f"{family}, {names}, seed {seed}: {error}") from None
        shutil.rmtree(place)
