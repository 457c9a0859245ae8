"""A run's id, and the one directory that has it: a copy of a run is another run.

`control/run` holds the id and the directory that it was given to. A controller that takes over finds its own directory there, or
that its directory is a copy; then it gives the copy an id of its own. The id is in the journal, too: a lost file costs nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from midwatch.directory_identity import DirectoryId
from midwatch.journal import entries as j
from midwatch.run_directory import PUBLIC_FILE, RunPaths
from shards.common.decoding import DecodeError, json_as
from shards.common.files import write_atomically


class RunRecord(msgspec.Struct, frozen=True):
    """The content of `control/run`."""

    id: str
    directory: DirectoryId
    path: str
    """Where the directory was when the record was written; for messages."""


class RunIdentity(NamedTuple):
    """Who a run is."""

    run: str
    original: str | None = None
    """Where the run was that this one has just been found to be a copy of; empty where that is not known."""


def read_record(paths: RunPaths) -> RunRecord | None:
    try:
        return json_as(paths.record.read_bytes(), RunRecord)
    except (OSError, DecodeError):
        return None


def run_id(paths: RunPaths) -> str:
    """The id of the run in this directory; empty where it has none yet, as in a copy that no controller has taken over."""
    record = read_record(paths)
    try:
        return record.id if record is not None and record.directory.same(DirectoryId.of(paths.root)) else ""
    except OSError:
        return ""


def claim(paths: RunPaths, entries: Iterable[tuple[int, j.Entry]]) -> RunIdentity:
    """The identity of a run, made where it has none, and made anew in a copy. Called by its controller. Raises OSError.

    The journal's `entries` say which id the run had. Where that is another one than the directory's, the journal was copied.
    """
    here, path = DirectoryId.of(paths.root), str(paths.root.resolve())
    known = next((e.id for _, e in reversed(list(entries)) if isinstance(e, j.RunBegan | j.RunCopied) and e.id), "")
    record = read_record(paths)
    # A volume that was mounted again may have another device number, but not another path.
    stays = record is not None and record.path == path and record.directory.inode == here.inode
    copied = record is not None and not stays and not record.directory.same(here)
    mine = secrets.token_hex(8) if copied else record.id if record is not None else known or secrets.token_hex(8)
    new = RunRecord(id=mine, directory=here, path=path)
    if record != new:
        write_atomically(paths.record, msgspec.json.encode(new), mode=PUBLIC_FILE)
    if copied or (known and known != mine):
        return RunIdentity(mine, record.path if record is not None and copied else "")
    return RunIdentity(mine)
