"""What a node needs to join a run by itself: a key file, and a way to the controller that it is told beforehand.

A key file holds a node's identity and which run it is for. One that names no node lets its holder join as any: a cluster that hands
the same secret to all its nodes cannot do better.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from midwatch.journal.journal import JournalError, read_journal
from midwatch.journal.run_identity import claim, read_record, run_id
from midwatch.run_directory import Address, RunPaths, read_address
from midwatch.transport.tls_identity import (
    ANY_NODE,
    CONTROLLER_NAME,
    KeysError,
    RunKeys,
    TlsIdentity,
    client_context,
    load_identity,
)
from shards.common.decoding import DecodeError, json_as
from shards.common.terminal import write_error

RETRY_SECONDS = 2.0
CONNECT_SECONDS = 5.0


class NodeJoin(NamedTuple):
    """How a node that joins finds the run."""

    url: str
    """`wss://HOST:PORT`, told by whoever starts the agent."""
    run_key: str
    """The run's id, from the key file."""


class KeyFile(msgspec.Struct, frozen=True):
    """The content of a key file. Secret as a whole."""

    identity: TlsIdentity
    run: str
    """The run's directory, as the machine that wrote the key sees it."""
    run_key: str

    def __repr__(self) -> str:
        return f"KeyFile({self.run})"


def make_key(paths: RunPaths, node: str | None) -> bytes:
    """A key file for a node, or for any; one line. Raises KeysError."""
    try:
        run = claim(paths, read_journal(paths.journal).entries).run if read_record(paths) is None else run_id(paths)
    except (OSError, JournalError) as error:
        raise KeysError(f"{paths.root}: the run cannot be given an id: {error}") from None
    if not run:
        raise KeysError(f"{paths.root}: this is a copy of another run (midwatch resume {paths.root} makes it a run of its own)")
    identity = RunKeys.ensure(paths).issue("agent", ANY_NODE if node is None else node)
    return msgspec.json.encode(KeyFile(identity, str(paths.root.resolve()), run))


def read_key_file(file: Path) -> KeyFile:
    """Raises KeysError; also where anybody but its owner, or the group of a secret that root has put there, could read it."""
    try:
        with file.open("rb") as source:
            status = os.fstat(source.fileno())
            content = source.read()
    except OSError as error:
        raise KeysError(f"{file}: the key cannot be read: {error.strerror}") from None
    if status.st_uid not in (os.getuid(), 0) and os.getuid() != 0:
        raise KeysError(f"{file}: belongs to somebody else; a key must be one's own")
    lenient = status.st_uid == 0  # Kubernetes gives a secret to root and the group of the pod
    if stat.S_ISREG(status.st_mode) and status.st_mode & (0o037 if lenient else 0o077):
        raise KeysError(f"{file}: others can read this key (chmod 600 {file}; in a pod: defaultMode: 0400)")
    try:
        return json_as(content, KeyFile)
    except DecodeError:
        raise KeysError(f"{file}: holds no key of a run (midwatch node key RUN [NODE] > FILE makes one)") from None


def check_url(url: str) -> str:
    """What is wrong with the address of a controller; empty where nothing is."""
    try:
        place = urlsplit(url)
        good = place.scheme == "wss" and bool(place.hostname) and place.port is not None and not place.path.strip("/")
    except ValueError:
        good = False
    return "" if good else f"--join {url}: must be wss://HOST:PORT, where the controller listens ([cluster] port in the recipe)"


def ways_to(address: Address | None, joining: NodeJoin | None) -> tuple[str, ...]:
    """Ways to the controller from another machine: those that it has announced, and what the node was told."""
    announced = address.remotes if address is not None else ()
    return tuple(dict.fromkeys((*announced, *((joining.url,) if joining is not None else ()))))


def await_controller(joining: NodeJoin, paths: RunPaths, identity: Path) -> None:
    """Returns when a controller of this run answers; says once why it does not yet. Raises KeysError where another run's does."""
    tls = client_context(load_identity(identity))
    told = ""
    while True:
        why = ""
        for way in ways_to(read_address(paths.address), joining):
            place = urlsplit(way)
            try:
                wire = socket.create_connection((place.hostname or "", place.port or 0), CONNECT_SECONDS)
                with wire, tls.wrap_socket(wire, server_hostname=CONTROLLER_NAME):
                    return
            except ssl.SSLCertVerificationError:
                raise KeysError(
                    f"{way}: the controller there is of another run than the key (midwatch node key makes one)"
                ) from None
            except OSError as error:
                why = why or f"{way}: {error.strerror or error}"
        if why != told:
            told = why
            write_error(f"waiting for the controller ({why})")
        time.sleep(RETRY_SECONDS)
