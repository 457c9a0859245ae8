"""`python -m trainer.huggingface.export RUN --checkpoint ID --to DIR`: a checkpoint as a Hugging Face directory.

What it is read from is verified first; what it writes appears whole, under its name, or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.manifest import CheckpointError, TensorEntry
from midwatch.recipe import Recipe, RecipeError, Rope, Stage, load_recipe
from midwatch.recipe.huggingface.config import config_of, family_of
from midwatch.recipe.huggingface.files import INDEX, SINGLE
from midwatch.recipe.huggingface.weights_map import ARCHITECTURES, SCORING, Family, MappedParameter, file_shapes, layout, misfits
from midwatch.recipe.model import Model
from shards.common.errors import ShardError
from shards.common.terminal import Parser, run_command, write_error, write_path
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer
from trainer.checkpoint.provenance import made_from
from trainer.control.standalone import newest
from trainer.huggingface import tokenizer as hf_tokenizer
from trainer.model.positions import learned
from trainer.progress import TrainProgress, from_manifest

SHARD_BYTES = 5_000_000_000
Tensors = dict[str, Callable[[], Tensor]]
"""Parameters by name, each read when it is asked for."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ExportError(Exception):
    """The checkpoint cannot be exported; the message says why and the way out."""


def main(arguments: list[str]) -> int:
    """The exit status: 0 written, 1 refused or failed, 2 the arguments or the recipe are wrong."""
    parser = Parser(prog="midwatch export")
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", default="latest")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(TYPES), default="float32")
    parser.add_argument("--file-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--untied", action="store_true")
    given = parser.parse_args(arguments)
    try:
        write_path(export(given.run, given.checkpoint, given.to, given.dtype, given.file_bytes, given.untied))
    except (RecipeError, ExportError, CheckpointError, ShardError, hf_tokenizer.TokenizerError) as error:
        write_error(f"midwatch: {error}")
        return 2 if isinstance(error, RecipeError) else 1
    except OSError as error:
        write_error(f"midwatch: {error.filename or given.to}: {error.strerror} (make room or access)")
        return 1
    return 0


def export(run: Path, id: str, to: Path, dtype: str = "float32", file_bytes: int = SHARD_BYTES, untied: bool = False) -> str:
    """Writes the directory; a line that says what it is. Raises ExportError and what it reads with raises.

    untied: as in `placed`.
    """
    missing = [name for name in ("safetensors", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"needs the package `{missing[0]}` (pip install 'midwatch[train]')")
    recipe = load_recipe(run / "recipe.toml")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ExportError(f"{to}: is there already (name a new directory)")
    family = like(recipe.model)
    directory = _checkpoint(run, id)
    known, digest = manifest.read(directory)
    progress = from_manifest(known.state, str(directory), recipe)
    tokenizer = _tokenizer(recipe, run, progress)
    for problem in manifest.verify(directory):
        raise CheckpointError(f"{problem} (use another checkpoint)")
    stage = recipe.stage[progress.stage]
    context = max(each.context for each in recipe.stage[: progress.stage + 1])
    vocabulary = known.tensors["model.embedding.weight"].shape[0]
    tensors: Tensors = {
        name: partial(whole, directory, known.tensors[f"model.{name}"])
        for name in layout(recipe.model, family, vocabulary, stage.scalar)
    }
    parts, tensors = placed(recipe.model, family, vocabulary, tensors, stage, context, untied)
    known_as = {"run": recipe.run.name, "checkpoint": directory.name, "step": progress.step, "stage": stage.name, "digest": digest}
    origin = known_as | made_from(recipe, _data(recipe, run), directory, progress)
    small = described(recipe, stage, parts, context, tokenizer, dtype) | {"midwatch.json": dumped(origin)}
    half = to.with_name(f"{to.name}.part-{os.getpid()}")
    try:
        half.mkdir(parents=True)
        for name, body in small.items():
            (half / name).write_bytes(body)
        write(half, parts, tensors, TYPES[dtype], file_bytes)
        if to.exists():
            to.rmdir()
        half.rename(to)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    kind = (SCORING if stage.scalar else ARCHITECTURES)[family]
    return f"{to}: {kind} of checkpoint {directory.name}, step {progress.step}, {vocabulary} ids, {dtype}"


def like(model: Model) -> Family:
    """What the model is in Hugging Face's layout. Raises ExportError."""
    family = family_of(model)
    if family is None:
        raise ExportError(f'no Hugging Face model has these positions: position is "{model.position}"')
    found = misfits(model, family)
    if found:
        raise ExportError(f"no Hugging Face model is like this one; {ARCHITECTURES[family]} is the nearest, but {'; '.join(found)}")
    return family


def _checkpoint(run: Path, id: str) -> Path:
    checkpoints = run / "checkpoints"
    there = sorted(path.name for path in checkpoints.iterdir() if not path.name.startswith(".")) if checkpoints.is_dir() else []
    name = newest(checkpoints) if id == "latest" and there else id
    if name is None or name not in there:
        raise ExportError(f'{run}: there is no checkpoint "{id}" (there are: {", ".join(there) or "none"})')
    return checkpoints / name


def _data(recipe: Recipe, run: Path) -> Path:
    return Path(recipe.data.dir) if recipe.data.dir is not None else run / "data"


def _tokenizer(recipe: Recipe, run: Path, progress: TrainProgress) -> Tokenizer:
    file = _data(recipe, run) / TOKENIZER_FILE
    tokenizer = Tokenizer.load(file)
    if progress.origin.tokenizer and tokenizer.hash != progress.origin.tokenizer:
        raise ExportError(f"{file}: is not the tokenizer that the checkpoint was trained with (put that one back)")
    return tokenizer


def _rope(recipe: Recipe, stage: Stage) -> Rope:
    return stage.rope or recipe.model.rope


def dumped(value: dict[str, Any]) -> bytes:
    """As JSON."""
    return json.dumps(value, indent=2).encode() + b"\n"


def described(
    recipe: Recipe, stage: Stage, parts: dict[str, MappedParameter], context: int, tokenizer: Tokenizer, dtype: str
) -> dict[str, bytes]:
    """What is beside the weights, by file. context: of the longest rows. Raises TokenizerError.

    parts: from `placed`; an output layer among them makes the model an untied one.
    """
    family, vocabulary = like(recipe.model), parts["embedding.weight"].shape[0]
    if family == "gpt2":
        context = parts["positions.weight"].shape[0]
    config = config_of(recipe.model, family, _rope(recipe, stage), recipe.stage[0].context, context, vocabulary)
    if "head.weight" in parts:
        config["tie_word_embeddings"] = False
    context = config.get("max_position_embeddings", context)
    # Without BOS it says null: left out, it would be what the architecture has by default.
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    if stage.scalar:
        head = {"architectures": [SCORING[family]], "num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        return hf_tokenizer.files(tokenizer, context) | {"config.json": dumped(config | ids | head | {"torch_dtype": dtype})}
    stops = {"eos_token_id": sorted(tokenizer.stops)} if len(tokenizer.stops) > 1 else {}
    return hf_tokenizer.files(tokenizer, context) | {
        "config.json": dumped(config | ids | {"torch_dtype": dtype}),
        "generation_config.json": dumped(ids | stops | {"do_sample": True, "temperature": 0.8}),
    }


def placed(
    model: Model, family: Family, vocabulary: int, tensors: Tensors, stage: Stage, context: int, untied: bool = False
) -> tuple[dict[str, MappedParameter], Tensors]:
    """Where each parameter goes, and the parameters, each to be read when it is its turn.

    untied: a model whose output layer is its embedding gets that table a second time, as an output layer of its own. A server
    that loads new weights into a running model needs it: vLLM keeps the old output layer where the file has none.
    """
    if untied and model.tie_embeddings and not stage.scalar:
        model = msgspec.structs.replace(model, tie_embeddings=False)
        tensors = tensors | {"head.weight": tensors["embedding.weight"]}
    parts = layout(model, family, vocabulary, stage.scalar)
    if stage.position_factor != 1.0 and family == "gpt2":
        # GPT-2 reads its table as it is, so what the stage reads between the rows is written out.
        table = tensors["positions.weight"]()
        rows = max(context, math.ceil(len(table) * stage.position_factor))
        tensors = tensors | {"positions.weight": partial(learned, table, torch.arange(rows), stage.position_factor)}
        pieces = (parts["positions.weight"].pieces[0]._replace(length=rows),)
        parts["positions.weight"] = MappedParameter((rows, model.hidden_size), pieces)
    return parts, tensors


def whole(directory: Path, entry: TensorEntry) -> Tensor:
    """A tensor of a checkpoint, put together from the ranks' parts, which cover it."""
    kind = np.dtype(entry.dtype)
    found = np.empty(entry.shape, kind)
    for chunk in entry.chunks:
        if chunk.bytes:
            box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
            found[box] = np.memmap(directory / chunk.file, kind, "r", chunk.start, chunk.sizes)
    return torch.from_numpy(found)


def write(to: Path, parts: dict[str, MappedParameter], tensors: Tensors, dtype: torch.dtype, file_bytes: int) -> None:
    """The safetensors, in files of about that size at the most, and their index where there are several. Raises ExportError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shapes = file_shapes(parts)
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        length = math.prod(shape) * dtype.itemsize
        if files[-1] and size + length > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += length
    weight_map: dict[str, str] = {}
    for number, members in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        try:
            save_file(_gathered(members, shapes, parts, tensors, dtype), to / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise ExportError(f"{to / file}: cannot be written: {error} (make room or access)") from None
        follow_umask(to / file)
        weight_map |= dict.fromkeys(members, file)
    if len(files) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
        (to / INDEX).write_bytes(dumped({"metadata": {"total_size": total}, "weight_map": weight_map}))


def follow_umask(file: Path) -> None:
    """Gives a file the mode of any other that the user makes; safetensors writes for its owner alone."""
    probe = file.with_name(f".{file.name}.mode")
    probe.touch(0o666)
    file.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def _gathered(
    members: list[str], shapes: dict[str, tuple[int, ...]], parts: dict[str, MappedParameter], tensors: Tensors, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The files' tensors of these names, out of ours: the layout read the other way."""
    found = {name: torch.empty(shapes[name], dtype=dtype) for name in members}
    for ours, part in parts.items():
        if not any(piece.tensor in found for piece in part.pieces):
            continue
        rows = torch.split(tensors[ours](), [piece.length for piece in part.pieces])
        for piece, values in zip(part.pieces, rows, strict=True):
            if piece.tensor in found:
                target = found[piece.tensor].T if part.transposed else found[piece.tensor]
                target[piece.start : piece.start + piece.length].copy_(values)
    return found


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
