"""OUT/build.json: which spec a directory was built from, and whether the build is complete."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shards.common.errors import SpecError
from shards.common.files import TEMPORARY, write_atomically
from shards.format import manifest as manifests
from shards.spec import STDLIB_KINDS, TEMPLATES, Build, Source
from shards.tokenization.templates import DEFAULT, read

MARKER = "build.json"
READING = 2
"""Changes when the same files are read as other documents or other learned tokens: older shards are then built again.

2: fields of conversations that change the meaning; TeX; scripts without spaces; hidden files.
"""
FIRST_KEYS = {
    "name", "kind", "origin", "path", "text_field", "prompt_field", "response_field", "chosen_field", "rejected_field",
    "max_documents", "max_tokens",
}  # fmt: skip
"""A source's keys in the first release; see build_key."""


class Marker(msgspec.Struct, frozen=True):
    """OUT/build.json."""

    key: str
    done: bool
    python: str
    spec: Build
    digests: dict[str, str] = {}  # by SOURCE/SPLIT, once the build is done
    tokenizer: str = ""  # its hash, once it is there


def build_key(build: Build) -> str:
    """A hash that is equal for specs that give equal shards.

    It covers the spec without its directories, the shards' format, the text of a template file, and the Python version if a
    source reads Python's library.
    """
    plain = msgspec.to_builtins(msgspec.structs.replace(build, out="", data=msgspec.structs.replace(build.data, dir=None)))
    for key in ("executor", "executor_tasks", "slurm"):  # they decide where the build runs, not what it gives
        del plain["data"][key]
    # Keys of later releases count only where they are used, so that shards built before them keep their key.
    if build.data.clean is None:
        del plain["data"]["clean"]
    late = [(field.name, field.default) for field in msgspec.structs.fields(Source) if field.name not in FIRST_KEYS]
    for table, key, default in [(plain["tokenizer"], "template", DEFAULT.name)] + [
        (source, key, msgspec.to_builtins(default)) for source in plain["data"]["source"] for key, default in late
    ]:
        if table[key] == default:
            del table[key]
    if build.tokenizer.template not in TEMPLATES:
        with suppress(SpecError):  # the build itself reports an unreadable template better
            plain["tokenizer"]["template"] = read(build.tokenizer).jinja
    reads_library = any(source.origin in STDLIB_KINDS for source in build.data.source)
    decides = [manifests.FORMAT, READING, platform.python_version() if reads_library else "", plain]
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(decides, order="sorted"))


def is_built(build: Build) -> bool:
    """Whether OUT already holds all of this spec. Fast: it reads no shards."""
    marker = read_marker(Path(build.out))
    if marker is None or not marker.done or marker.key != build_key(build):
        return False
    return all(Path(build.out, name, manifests.FILE_NAME).is_file() for name in marker.digests)


def read_marker(out: Path) -> Marker | None:
    """The marker of a directory; None where there is none that can be read."""
    try:
        return msgspec.json.decode((out / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_marker(spec: Build, out: Path, digests: dict[str, str] | None = None, tokenizer: str = "") -> None:
    """Write the marker of a build; it is done if there are `digests`."""
    marker = Marker(build_key(spec), digests is not None, platform.python_version(), spec, digests or {}, tokenizer)
    write_atomically(out / MARKER, msgspec.json.format(msgspec.json.encode(marker), indent=1) + b"\n")


def conflict(spec: Build) -> str:
    """Why OUT cannot take this build, to be asked before it starts; empty where it can."""
    out = Path(spec.out)
    marker = read_marker(out)
    if marker is not None and marker.key != build_key(spec):
        return f"{out}: built from another spec: {_difference(marker, spec)} (use another out, or delete it)"
    return ""


def claim(spec: Build, out: Path) -> None:
    """Mark an empty directory as this build's, or check that it is already. Removes the temporary files of a killed build.

    Raises SpecError for a directory that holds anything else.
    """
    if why := conflict(spec):
        raise SpecError(why)
    if read_marker(out) is None:
        others = sorted(path.name for path in out.iterdir() if path.name != ".lock" and not path.name.endswith(TEMPORARY))
        if MARKER in others:
            raise SpecError(f"{out / MARKER}: damaged (delete {out}, or use another out; check this disk)")
        if others:
            raise SpecError(f'{out}: not empty and not a build of shards: holds "{others[0]}" (use another out)')
        write_marker(spec, out)
    for leftover in out.rglob(f"*{TEMPORARY}"):
        leftover.unlink()


def _difference(marker: Marker, spec: Build) -> str:
    """The settings in which two specs differ, three at most."""
    old, new = _flat(msgspec.to_builtins(marker.spec)), _flat(msgspec.to_builtins(spec))
    for name in ("out", "data.dir"):
        old.pop(name, None), new.pop(name, None)
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not changed:
        template = "" if spec.tokenizer.template in TEMPLATES else f" when {spec.tokenizer.template} had other content,"
        return f"{template} by Python {marker.python}, or by a release that read the same files differently".strip()
    shown = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed[:3]]
    return "; ".join(shown) + ("; ..." if len(changed) > 3 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {name: leaf for key, inner in items for name, leaf in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
