"""What a node is and has, in one JSON line: `python -P -m launcher.preflight.node_report`, run there by `midwatch check`.

It needs Python and Midwatch's files alone: where a package is missing, that is a finding and not the end of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from shards.common.terminal import Parser, write_error, write_out

PACKAGES = ("launcher", "midwatch", "shards", "trainer")
"""What runs on nodes: their files are what must be the same everywhere."""
CALL_SECONDS = 3.0
RUNTIME_BYTES = 128 * 1024
"""Room that the files of an agent and its ranks take."""


@dataclass(frozen=True)
class Call:
    """The way back to the checking side: what came of it, and both clocks."""

    address: str = ""
    """HOST:PORT that answered."""
    problem: str = ""
    answer: str = ""
    before: float = 0.0
    """This node's clock when it asked."""
    theirs: float = 0.0
    """The other's clock when it answered."""
    after: float = 0.0
    """This node's clock when it had the answer."""


@dataclass(frozen=True)
class Storage:
    """What the node sees of the run's storage."""

    problem: str = ""
    read: str = ""
    """What stands in the file that the checking side wrote."""
    wrote: str = ""
    """Name of the file that the node wrote beside it, with the same words."""
    free: int | None = None
    """Bytes."""


@dataclass(frozen=True)
class Findings:
    """A node as it sees itself."""

    host: str
    machine: str
    """The same for two names of one machine, and for nothing else."""
    user: str
    uid: int
    python: str
    midwatch: str
    """Its version; empty where it is run without being installed."""
    code: str
    """Hash of Midwatch's files."""
    torch: str
    """Its version; empty where there is none."""
    lacking: tuple[str, ...]
    """Packages that Midwatch needs and that are not there."""
    gpus: tuple[str, ...]
    gpu_note: str
    """Why there are none."""
    driver: str
    interfaces: tuple[str, ...]
    clock: float
    runtime: str = ""
    """Why the directory for sockets cannot be used; empty where it can."""
    storage: Storage = Storage()
    call: Call = Call()


def look(storage: Path | None = None, addresses: tuple[str, ...] = ()) -> Findings:
    """Looks at this machine, at a file on the run's storage, and whether one of the addresses answers."""
    gpus, gpu_note, driver = _gpus()
    return Findings(
        host=socket.gethostname(),
        machine=_machine(),
        user=_user(),
        uid=os.getuid(),
        python=platform.python_version(),
        midwatch=_version("midwatch"),
        code=code_hash(),
        torch=_version("torch"),
        lacking=_lacking(),
        gpus=gpus,
        gpu_note=gpu_note,
        driver=driver,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        storage=_storage(storage) if storage is not None else Storage(),
        call=asyncio.run(_call(addresses)) if addresses else Call(),
        runtime=runtime_problem(),
        clock=time.time(),
    )


def code_hash() -> str:
    """Hash of the files that run on nodes: the same version may be other code."""
    digest = hashlib.blake2b(digest_size=8)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            for file in sorted(Path(place).rglob("*.py")):
                with contextlib.suppress(OSError):  # a file that has just gone
                    digest.update(f"{package}/{file.relative_to(place)}\0".encode() + hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def _machine() -> str:
    parts = [socket.gethostname()]
    for file in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError):
            parts.append(Path(file).read_text().strip())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _lacking() -> tuple[str, ...]:
    try:
        needed = metadata.requires("midwatch") or []
    except metadata.PackageNotFoundError:
        return ()
    names = [re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in needed if "extra ==" not in line]
    return tuple(name for name in names if not _version(name))


def _gpus() -> tuple[tuple[str, ...], str, str]:
    """Names of the GPUs, why there are none, and the driver's version."""
    try:
        import pynvml
    except ImportError:
        return (), "nvidia-ml-py is not installed", ""
    try:
        pynvml.nvmlInit()
        try:
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            names = tuple(_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
        finally:
            pynvml.nvmlShutdown()
        return names, "" if names else "the driver sees no GPU", driver
    except pynvml.NVMLError as error:
        return (), str(error), ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def runtime_problem() -> str:
    """Makes a file where agents and ranks have their sockets, and takes it away again."""
    try:
        from midwatch.run_directory import runtime_directory

        directory = runtime_directory()
    except ImportError:  # a package that is missing is told elsewhere
        return ""
    except OSError as error:
        return str(error) if error.errno is None else f"{error.filename}: {error.strerror}"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\1" * RUNTIME_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{directory}: cannot be written ({error.strerror})"
    return ""


def _storage(file: Path) -> Storage:
    try:
        read = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        gone = isinstance(error, FileNotFoundError)
        here = file.parent.parent.is_dir()
        if gone and here:
            return Storage(f"{file.parent.parent} is there, but it is another directory than the checking machine's")
        why = "is not there" if gone else f"cannot be read ({getattr(error, 'strerror', None) or error})"
        return Storage(f"{file.parent.parent} {why}")
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(file.parent).free
    mine = file.with_name(f"seen-{os.getpid()}-{time.time_ns()}")
    try:
        with mine.open("w") as out:
            out.write(read)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        return Storage(f"{file.parent.parent} cannot be written ({error.strerror})", read=read, free=free)
    return Storage(read=read, wrote=mine.name, free=free)


async def _call(addresses: tuple[str, ...]) -> Call:
    """The first of the addresses to answer; else what each of them did."""
    tasks = [asyncio.create_task(_call_one(address)) for address in addresses]
    calls: list[Call] = []
    for next_done in asyncio.as_completed(tasks):
        calls.append(await next_done)
        if not calls[-1].problem:
            break
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if not calls[-1].problem:
        return calls[-1]
    return Call(problem=", ".join(sorted(call.problem for call in calls)))


async def _call_one(address: str) -> Call:
    host, _, port = address.rpartition(":")
    writer = None
    try:
        async with asyncio.timeout(CALL_SECONDS):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            before = time.time()
            writer.write(b"?\n")
            answer, _, theirs = (await reader.readline()).decode().strip().partition(" ")
            return Call(address, "", answer, before, float(theirs), time.time())
    except TimeoutError:
        return Call(address, f"{address} does not answer")
    except OSError as error:
        return Call(address, f"{address}: {os.strerror(error.errno) if error.errno else error}")
    except ValueError:
        return Call(address, f"{address} is answered by something else")
    finally:
        if writer is not None:
            writer.close()


def main() -> int:
    parser = Parser(prog="launcher.preflight.node_report", description="What this node is and has.")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    parser.add_argument("--storage", type=Path, help="a file on the run's storage that the checking side wrote")
    parser.add_argument("--call", action="append", default=[], metavar="HOST:PORT", help="where the checking side listens")
    arguments = parser.parse_args()
    try:
        found = asdict(look(arguments.storage, tuple(arguments.call)))
    except Exception as error:
        write_error(f"preflight failed: {type(error).__name__}: {error}")
        return 1
    if arguments.json:
        write_out(json.dumps(found), flush=True)
    else:
        write_out("\n".join(f"{key}: {value}" for key, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
