"""A recipe's text, whatever an editor, a shell or another system has made of the file."""

from __future__ import annotations

import codecs
from pathlib import Path

MOST_BYTES = 16 << 20
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class TextError(Exception):
    """The file holds no text that can be a recipe; the message names file, line and the way out."""


def read_recipe_text(file: Path) -> str:
    """Reads a file once: it may be a pipe. A byte order mark of UTF-8 is skipped and line ends become `\\n`.

    Raises TextError, or OSError where the file cannot be read.
    """
    with file.open("rb") as opened:
        raw = opened.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise TextError(f"{file}: is larger than {MOST_BYTES >> 20} MiB (name the recipe, a TOML file)")
    if raw.startswith(_UTF16_MARKS):
        raise TextError(f"{file}:1: is UTF-16 (save it as UTF-8)")
    raw = raw.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if (at := raw.find(0)) >= 0:
        raise TextError(f"{file}:{_line(raw, at)}: holds a NUL byte (is it UTF-16 or no text? save it as UTF-8)")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        wrong = raw[error.start]
        raise TextError(f"{file}:{_line(raw, error.start)}: is not UTF-8: byte 0x{wrong:02x} (save it as UTF-8)") from None


def home_expanded(path: str) -> Path:
    """The path with `~` or `~USER` replaced. Raises TextError where that home is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise TextError(f"{path}: there is no such home directory (name the directory in full)") from None


def _line(raw: bytes, at: int) -> int:
    return raw.count(b"\n", 0, at) + 1
