"""`[model] from`: what a directory says of the model takes its place in the recipe, before the recipe is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from midwatch.recipe.huggingface.files import PREFIX, Directory, DirectoryError, open_directory
from midwatch.recipe.model import Model, Rope
from midwatch.recipe.text import TextError, home_expanded
from midwatch.recipe.toml_lines import Path as KeyPath
from shards.common.errors import ShardError

FREE = ("from", "dtype", "float8", "compile")
"""Keys of `[model]` that the directory does not decide."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""In the order in which `transformers` takes them."""


class OriginError(Exception):
    """What `from` names cannot be had, or contradicts the recipe: the key's path, and the message with the way out."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


def directory_of(source: str) -> Path:
    """The directory of `hf:DIR`. Raises DirectoryError for anything else."""
    if not source.startswith(PREFIX) or source == PREFIX:
        raise DirectoryError(f'"{source}" is not "{PREFIX}DIR", a Hugging Face directory')
    try:
        return home_expanded(source.removeprefix(PREFIX))
    except TextError as error:
        raise DirectoryError(str(error)) from None


def fill_in(raw: dict[str, Any], base: Path | None) -> dict[str, Any]:
    """The recipe as read from TOML with the directory's model and tokenizer in it. Raises OriginError.

    A recipe with a `from_digest` has been filled in before; the ranks see whether the directory is still the same.
    """
    given = raw.get("model")
    if not isinstance(given, dict) or not isinstance(given.get("from"), str):
        return raw
    place = ("model", "from")
    try:
        path = directory_of(given["from"])
        path = (base / path).absolute() if base is not None else path
        given = given | {"from": f"{PREFIX}{path}"}
        if "from_digest" in given:
            return raw | {"model": given}
        found = open_directory(path)
    except DirectoryError as error:
        raise OriginError(place, f"[model] from: {error}") from None
    for key, value in given.items():
        if key in found.keys and not _same(key, value, found.keys[key]):
            said = f"{value!r} contradicts {found.keys[key]!r} of {path / 'config.json'}"
            way = "set it in a stage" if key == "rope" else "drop it: the directory decides it"
            raise OriginError(("model", key), f"[model] {key}: {said} ({way})")
        if key not in found.keys and key not in FREE and key in {field.encode_name for field in msgspec.structs.fields(Model)}:
            raise OriginError(("model", key), f"[model] {key}: the model of {path} has none (drop it)")
    model = found.keys | given | {"from_digest": found.digest}
    return raw | {"model": model, "tokenizer": _tokenizer(raw.get("tokenizer", {}), found, base)}


def _same(key: str, value: Any, found: Any) -> bool:
    if key != "rope":
        return bool(value == found)
    try:
        return msgspec.convert(value, Rope) == msgspec.convert(found, Rope)
    except msgspec.ValidationError:
        return True  # which the check of the recipe tells better


def _tokenizer(given: Any, found: Directory, base: Path | None) -> Any:
    """`[tokenizer]` with the directory's own where the recipe names none; its ids fit the embedding."""
    if not isinstance(given, dict):
        return given
    given = dict(given)
    if "path" not in given:
        files = [found.path / name for name in TOKENIZERS if (found.path / name).is_file()]
        if not files:
            way = "give [tokenizer] path"
            raise OriginError(("model", "from"), f"[model] from: {found.path}: holds none of {', '.join(TOKENIZERS)} ({way})")
        given["path"] = str(files[0])
    from shards.tokenization.tokenizer import piece_count  # SentencePiece takes a while to import

    try:
        file = Path(given["path"]) if base is None else base / home_expanded(given["path"])
        ids = piece_count(file)
    except (ShardError, TextError) as error:
        raise OriginError(("tokenizer", "path"), f"[tokenizer] path: {error}") from None
    rows = found.keys["vocabulary"]
    if ids > rows:
        message = f"{file} has {ids} ids, the embedding of {found.path} {rows} rows"
        way = "give the tokenizer that it was trained with"
        raise OriginError(("tokenizer", "path"), f"[tokenizer] path: {message} ({way})")
    return given
