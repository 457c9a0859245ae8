"""A checkpoint with a model in it, written by its format's description, and a tokenizer: what the probe needs of a run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import xxhash

from midwatch.recipe import Recipe, parse_recipe
from shards.tokenization.tokenizer import train

RECIPE = """
[run]
name = "talk"
[model]
num_layers = 1
hidden_size = 16
num_heads = 2
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[checkpoint]
keep = 1
[probe]
idle_seconds = {idle}
[[stage]]
name = "first"
objective = "pretrain"
steps = 50
context = 4096
global_batch = 1
mixture = {{ text = 1.0 }}
"""


def talking_recipe(idle: float = 600.0) -> Recipe:
    return parse_recipe(RECIPE.format(idle=idle))


def write_tokenizer(root: Path) -> None:
    (root / "data").mkdir(parents=True, exist_ok=True)
    words = ["the watch is long and the night is clear", "all is well at the turn of the watch"] * 20
    (root / "data" / "tokenizer.model").write_bytes(train(words, vocab=290))


def write_model(recipe: Recipe, root: Path, directory: str, id: str, step: int, seed: int = 0) -> str:
    """Weights drawn from the seed; the manifest's digest."""
    from trainer.model.decoder import Decoder

    decoder = Decoder(recipe.model, 290)
    decoder.initialise(seed)
    place = root / "checkpoints" / directory
    place.mkdir(parents=True)
    data = bytearray()
    tensors = {}
    for name, parameter in decoder.named_parameters():
        data += bytes(-len(data) % 4096)
        raw = (4 * parameter.detach().numpy().astype("<f4")).tobytes()
        shape = list(parameter.shape)
        chunk = {"offsets": [0] * len(shape), "sizes": shape, "file": "rank-00000.bin", "start": len(data), "bytes": len(raw)}
        tensors[f"model.{name}"] = {
            "shape": shape,
            "dtype": "float32",
            "chunks": [{**chunk, "xxh3": xxhash.xxh3_128_hexdigest(raw)}],
        }
        data += raw
    (place / "rank-00000.bin").write_bytes(data)
    files = {"rank-00000.bin": {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(bytes(data))}}
    state = {"lineage": 1, "step": step, "stage": 0, "stage_name": "first", "stage_step": step, "ended": False}
    manifest = {"format": 3, "id": id, "generation": 1, "world": 1, "files": files, "tensors": tensors, "state": state}
    content = msgspec.msgpack.encode(manifest)
    (place / "manifest.msgpack").write_bytes(content)
    return xxhash.xxh3_128_hexdigest(content)
