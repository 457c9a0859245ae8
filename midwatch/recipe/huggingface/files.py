"""What a Hugging Face directory holds, from its configuration and the headers of its safetensors.

Reads no weights, but for an output layer that is written beside the embedding that it shares, to see whether it is the same.

The format of a header: https://huggingface.co/docs/safetensors, "Format": 8 bytes of length, then JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from midwatch.recipe.huggingface.config import UnknownConfigError, model_keys
from midwatch.recipe.huggingface.weights_map import Family, file_shapes, layout
from midwatch.recipe.model import Model
from shards.common.decoding import Count, DecodeError, brief, json_value, shown

PREFIX = "hf:"
INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
LONGEST_HEADER = 100_000_000
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
"""Types of weights that can be read."""
COMPARED_BYTES = 1 << 22
"""Of two tensors at once."""

_PASSED_OVER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")
"""Buffers that older releases of transformers saved along."""


class DirectoryError(Exception):
    """The directory cannot be read; the message names the file, what is wrong and the way out."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


class StoredTensor(NamedTuple):
    """A tensor in a file, by the name it has there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Its first byte in the file."""


class _Tensor(msgspec.Struct):
    """What a header says of a tensor."""

    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[Count, Count]


class Directory(NamedTuple):
    """A model whose every tensor is there, with the shape that it must have."""

    path: Path
    family: Family
    keys: dict[str, Any]
    """Of `[model]`."""
    tensors: dict[str, StoredTensor]
    """By the family's name."""
    digest: str
    """Of the configuration and of the headers."""


def open_directory(path: Path) -> Directory:
    """Reads configuration and headers, and checks each against the other. Raises DirectoryError."""
    config = _json(path / "config.json", "give the directory that holds config.json")
    try:
        family, keys = model_keys(config)
        model = msgspec.convert(keys, Model)
    except UnknownConfigError as error:
        raise DirectoryError(f"{path / 'config.json'}: {error}") from None
    except msgspec.ValidationError as error:
        raise DirectoryError(f"{path / 'config.json'}: is not the configuration of a {family}: {error}") from None
    problems = model.problems()
    if problems:
        raise DirectoryError(f"{path / 'config.json'}: {problems[0][0]}: {problems[0][1]}")
    if (path / ADAPTER).exists():
        raise DirectoryError(f"{path / ADAPTER}: an adapter changes the weights (merge it into them, or take it away)")
    tensors = _tensors(path, family)
    _check(path, model, family, tensors)
    known = sorted((name, stored.file.name, stored.shape, stored.dtype) for name, stored in tensors.items())
    digest = hashlib.blake2b(json.dumps([config, known], sort_keys=True).encode(), digest_size=16).hexdigest()
    return Directory(path, family, keys, tensors, digest)


def _json(file: Path, way: str) -> dict[str, Any]:
    try:
        found = json_value(file.read_bytes())
    except OSError as error:
        raise DirectoryError(f"{file}: cannot be read: {error.strerror} ({way})") from None
    except DecodeError as error:
        raise DirectoryError(f"{file}: is {error} (fetch it again)") from None
    if not isinstance(found, dict):
        raise DirectoryError(f"{file}: is not a JSON object (fetch it again)")
    return found


def _tensors(path: Path, family: Family) -> dict[str, StoredTensor]:
    index: dict[str, str] = {}
    if (path / INDEX).exists():
        index = _json(path / INDEX, "fetch it again").get("weight_map") or {}
        if not (isinstance(index, dict) and index and all(isinstance(name, str) and _is_name(name) for name in index.values())):
            raise DirectoryError(f"{path / INDEX}: has no weight_map of tensors to files beside it (fetch it again)")
        names = sorted(set(index.values()))
        if (path / SINGLE).exists() and names != [SINGLE]:
            # transformers reads the one file, vLLM reads all that are there.
            raise DirectoryError(f"{path}: holds {SINGLE} and {INDEX} of other files (take away what is not of this model)")
    elif (path / SINGLE).exists():
        names = [SINGLE]
    else:
        way = "other formats are read and written again by transformers: from_pretrained, then save_pretrained"
        raise DirectoryError(f"{path}: holds neither {SINGLE} nor {INDEX} ({way})")
    found: dict[str, StoredTensor] = {}
    for name in names:
        for stored in _header(path / name):
            if index.get(stored.name, name) != name:
                said = f"{path / INDEX}: says that tensor {shown(stored.name)} is in {index[stored.name]}, and it is in {name}"
                raise DirectoryError(f"{said} (fetch all of it again)")
            # Some directories hold the model inside the one with an output layer, and leave out its prefix.
            bare = family != "llama" and not stored.name.startswith(("transformer.", "lm_head."))
            known = f"transformer.{stored.name}" if bare else stored.name
            if known in found:
                both = f"{found[known].file.name} and {name}" if found[known].file.name != name else f"{name}, by two names"
                raise DirectoryError(f"{path}: tensor {shown(known)} is there twice, in {both} (fetch all of it again)")
            found[known] = stored
    return found


def _is_name(name: str) -> bool:
    """Whether it can be that of a file in the same directory."""
    return 0 < len(name) < 256 and "/" not in name and name.isprintable() and name not in (".", "..")


def _header(file: Path) -> list[StoredTensor]:
    """The tensors of one file; the file is as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as source:
            start = source.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise DirectoryError(f"{file}: is not a safetensors file, or is cut off (fetch it again)")
            header = json_value(source.read(length))
    except OSError as error:
        raise DirectoryError(f"{file}: cannot be read: {error.strerror} (fetch it again)") from None
    except DecodeError:
        raise DirectoryError(f"{file}: its header is not JSON (fetch it again)") from None
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    try:
        entries = msgspec.convert(header, dict[str, _Tensor])
    except msgspec.ValidationError:
        raise DirectoryError(f"{file}: its header is not that of a safetensors file (fetch it again)") from None
    found, end = [], 0
    for name, entry in entries.items():
        begin, stop = entry.data_offsets
        stored = StoredTensor(file, name, entry.shape, entry.dtype, 8 + length + begin)
        if begin > stop or (entry.dtype in ITEM_BYTES and stop - begin != math.prod(stored.shape) * ITEM_BYTES[stored.dtype]):
            raise DirectoryError(f"{file}: tensor {shown(name)} has another number of bytes than its shape needs (fetch it again)")
        found.append(stored)
        end = max(end, stop)
    if size != 8 + length + end:
        raise DirectoryError(f"{file}: has {size} bytes where its header needs {8 + length + end} (fetch it again)")
    return found


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes, as they do where a shared tensor was written twice. Raises DirectoryError."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left = math.prod(one.shape) * ITEM_BYTES.get(one.dtype, 0)
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            while left > 0:
                size = min(left, COMPARED_BYTES)
                if first.read(size) != second.read(size):
                    return False
                left -= size
    except OSError as error:
        raise DirectoryError(f"{one.file}: cannot be read: {error.strerror} (fetch it again)") from None
    return True


def _check(path: Path, model: Model, family: Family, tensors: dict[str, StoredTensor]) -> None:
    assert model.vocabulary is not None
    parts = layout(model, family, model.vocabulary)
    wanted = file_shapes(parts)
    for name, shape in wanted.items():
        if name not in tensors:
            raise DirectoryError(f"{path}: tensor {name!r} is missing, which config.json asks for (fetch all of it again)")
        stored = tensors[name]
        if stored.shape != shape:
            found, asked = list(stored.shape), list(shape)
            said = f"{stored.file}: tensor {shown(stored.name)} is {shown(found)}, by config.json it is {asked}"
            raise DirectoryError(f"{said} (fetch both again)")
        if stored.dtype not in ITEM_BYTES:
            way = f"only {', '.join(ITEM_BYTES)} can be read; dequantize it"
            raise DirectoryError(f"{stored.file}: tensor {shown(stored.name)} is {shown(stored.dtype)} ({way})")
    spared = tensors.get("lm_head.weight") if model.tie_embeddings else None
    embedding = tensors[parts["embedding.weight"].pieces[0].tensor]
    if spared is not None and not same_values(spared, embedding):
        way = "set it to false to keep this output layer, or drop the tensor"
        raise DirectoryError(f"{spared.file}: {shown(spared.name)} is not the embedding, with tie_word_embeddings true ({way})")
    for name, stored in tensors.items():
        spare = stored is spared
        if name not in wanted and not spare and not _PASSED_OVER.fullmatch(name):
            said = f"{stored.file}: tensor {shown(stored.name)} is left over: config.json has none such"
            raise DirectoryError(f"{said} (fetch both again)")
