"""A directory such as the recipes begin from: Llama 3.1 8B's configuration, a tokenizer, and weights with nothing in them."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec

from midwatch.recipe.huggingface.config import model_keys
from midwatch.recipe.huggingface.weights_map import file_shapes, layout
from midwatch.recipe.model import Model
from shards.tokenization.tokenizer import train

RECIPES = Path(__file__).parents[1] / "recipes"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
"""What Llama 3.1 8B says of itself, as far as anything here looks at it."""


def write_llama(place: Path, **changes: Any) -> Path:
    """Makes it. The weights are a hole in a file: as long as they must be, and no bytes of the disk."""
    place.mkdir(parents=True)
    config = LLAMA | changes
    (place / "config.json").write_text(json.dumps(config))
    family, keys = model_keys(config)
    header, end = {}, 0
    for name, shape in file_shapes(layout(msgspec.convert(keys, Model), family, config["vocab_size"])).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    body = json.dumps(header).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(body)) + body)
        file.truncate(8 + len(body) + end)
    (place / "tokenizer.model").write_bytes(train([RECIPES.joinpath("demo.toml").read_text()] * 20, vocab=400))
    return place


def at_hand(recipe: Path, place: Path) -> Path:
    """A copy of a recipe with the model that it begins from, and a file for each of its sources, where it says that they are."""
    copy = place / "recipes" / recipe.name
    copy.parent.mkdir(parents=True)
    shutil.copy(recipe, copy)
    text = recipe.read_text()
    if 'from = "hf:../Llama-3.1-8B"' in text:
        write_llama(place / "Llama-3.1-8B")
    for line in text.splitlines():
        if line.startswith('path = "'):
            file = copy.parent / line.split('"')[1].replace("*", "part")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return copy
