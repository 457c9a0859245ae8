"""Where a run's files lie, and how its controller is found."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import secrets
import socket
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from midwatch.directory_identity import DirectoryId
from shards.common.decoding import DecodeError, json_as


@dataclass(frozen=True)
class RunPaths:
    """The run directory, by name."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def preferences(self) -> Path:
        return self.root / "preferences"

    @property
    def address(self) -> Path:
        return self.root / "control" / "address"

    @property
    def record(self) -> Path:
        """The run's id, and the directory that has it."""
        return self.root / "control" / "run"

    @property
    def keys(self) -> Path:
        return self.root / "control" / "keys"

    @property
    def job(self) -> Path:
        """The Slurm job that the run lives in."""
        return self.root / "control" / "job"

    @property
    def batch_script(self) -> Path:
        return self.root / "control" / "sbatch.sh"

    @property
    def directories(self) -> tuple[Path, ...]:
        """Those that a run has from its beginning."""
        return self.journal, self.metrics, self.checkpoints, self.samples, self.logs, self.address.parent

    @property
    def private(self) -> tuple[Path, ...]:
        """Directories that only the run's owner and its operators enter: commands, prompts and environments may hold secrets."""
        return self.journal, self.logs, self.samples

    def create(self, operators: int | None = None) -> None:
        """Makes the directories; harmless when they are there. operators: the group that may read the private ones."""
        self.root.mkdir(parents=True, exist_ok=True)
        for directory in self.directories:
            made = not directory.exists()
            directory.mkdir(exist_ok=True)
            if made and directory in self.private:
                if operators is not None:
                    os.chown(directory, -1, operators)
                directory.chmod(0o700 if operators is None else 0o2750)  # files inside get the directory's group

    def is_run(self) -> bool:
        return self.recipe.is_file() and self.journal.is_dir()

    @property
    def key(self) -> str:
        """Short name for the path of this run, for files outside its directory."""
        return hashlib.blake2b(str(self.root.resolve()).encode(), digest_size=8).hexdigest()

    @property
    def lock_key(self) -> str:
        """Names the directory itself, for locks on this machine: wherever it is moved, and unlike any copy. Raises OSError."""
        return DirectoryId.of(self.root).key


class Address(msgspec.Struct, frozen=True):
    """Where a controller listens."""

    term: int
    url: str
    """`unix:PATH`."""
    host: str
    pid: int
    remote: str = ""
    """`wss://HOST:PORT`, where other machines reach it with the run's keys; empty: it listens on its own machine only."""
    also: tuple[str, ...] = ()
    """Other addresses of the same port: which of them a node reaches depends on where it is."""
    generation: int = 0
    """The newest there is: should the journal be lost, its number must not be given again."""
    run: str = ""
    """The run's id."""
    directory: DirectoryId | None = None
    """The directory whose run it is: an address file that was copied with its run is of another."""
    path: str = ""
    """Where that directory was, for messages."""

    @property
    def remotes(self) -> tuple[str, ...]:
        """All ways from other nodes, the likeliest first."""
        return (self.remote, *self.also) if self.remote else ()


def read_address(file: Path) -> Address | None:
    """The address in a file; None where there is none that can be read."""
    try:
        return json_as(file.read_bytes(), Address)
    except (OSError, DecodeError):
        return None


PRIVATE_FILE = 0o640
"""Mode of files that may hold secrets, in directories whose group is the operators'."""
PUBLIC_FILE = 0o666
"""Mode of files that may be read by whoever the user's umask lets."""


def read_own_address(paths: RunPaths) -> Address | None:
    """The address of this directory's own controller; one that was copied along with a run is not."""
    address = read_address(paths.address)
    return None if address is None or is_foreign(paths, address) else address


def is_foreign(paths: RunPaths, address: Address) -> bool:
    """Whether an address found in a run directory is that of another directory's controller: the run was copied."""
    try:
        here = DirectoryId.of(paths.root)
        if address.directory is None or address.directory.same(here):
            return False
        return not (address.path == str(paths.root.resolve()) and address.directory.inode == here.inode)
    except OSError:
        return False


def write_atomically(file: Path, content: bytes, mode: int = 0o600) -> None:
    """Replaces a file so that a reader sees the old or the new content, and nothing between. mode: less what the umask takes.

    Makes its directory and nothing above that: a run directory that was deleted or moved must not be made again.
    """
    file.parent.mkdir(exist_ok=True)
    name = file.parent / f".{file.name}.{secrets.token_hex(6)}"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_address(file: Path, address: Address) -> None:
    write_atomically(file, msgspec.json.encode(address), mode=PUBLIC_FILE)  # it holds nothing secret, and operators read it


def mount_of(path: Path) -> str:
    """Where the file system of a path is mounted and what it is on, in words: an operator is to find the disk by it."""
    place = path.absolute()
    while not os.path.ismount(place):
        place = place.parent
    with contextlib.suppress(OSError):
        for line in reversed(Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()):
            source, target = line.split(" ")[:2]
            if target == str(place):
                return f"{source} at {target}"
    return f"the file system at {place}"


def runtime_directory() -> Path:
    """The user's directory for sockets (0700), short enough for a socket's path. Raises PermissionError if it is another's."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    usable = base and os.path.isabs(base) and len(base) < 60 and os.access(base, os.W_OK | os.X_OK)
    directory = Path(base) / "midwatch" if base and usable else Path("/tmp") / f"midwatch-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{directory}: must be a directory of yours that nobody else can enter (chmod 700 {directory})")
    return directory


def cache_directories() -> list[Path]:
    """Places for what can be made again (indexes, where runs lie), the preferred one first; none of them need be writable.

    The user's cache, and for users without a home, or with one that cannot be written, their directory for sockets.
    """
    places: list[Path] = []
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says the XDG specification
        places.append(Path(base) / "midwatch")
    else:
        with contextlib.suppress(KeyError):  # no HOME, and a uid that the system does not know
            home = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
            if home.is_absolute():
                places.append(home / ".cache" / "midwatch")
    with contextlib.suppress(OSError):
        places.append(runtime_directory() / "cache")
    return places


class RunLock:
    """Held by a run's controller on this machine for as long as its process lives; the system lets go of it."""

    def __init__(self, paths: RunPaths) -> None:
        """Raises OSError where there is no such directory."""
        self._file = runtime_directory() / f"{paths.lock_key}.lock"
        self._handle: int | None = None

    def take(self) -> bool:
        """Whether it is now ours."""
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._handle = handle
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


STALE_SECONDS = 20.0
"""Without a sign of life on the shared storage before a controller on another machine counts as dead."""
WATCH_SECONDS = 5.0
"""That is long enough to see a living controller's next sign of life."""
CONNECT_SECONDS = 2.0

Whereabouts = Literal["here", "elsewhere", "silent", "nowhere"]


def find_controller(paths: RunPaths, *, write: bool = True) -> Whereabouts:
    """Where the run's controller lives; `silent`: on another machine, whose port does not answer, but it was alive just now.

    Without `write` nothing is made in the run directory, and the age of the last sign of life is by this machine's clock.
    """
    lock = RunLock(paths)
    if not lock.take():
        return "here"
    lock.release()
    address = read_own_address(paths)
    if address is None or address.host == host_name():
        return "nowhere"
    age = _seconds_since_beat(paths.address, write=write)
    answers = any(_answers(remote) for remote in address.remotes) if address.remote else None
    if age is None or abs(age) <= STALE_SECONDS:  # a sign of life from the future was made before the clock was set back
        return "silent" if answers is False and age is not None else "elsewhere"
    return "elsewhere" if answers else "nowhere"


def controller_lives(paths: RunPaths, *, write: bool = True) -> bool:
    """Whether a controller of the run lives, on this machine or another; `write` as for `find_controller`."""
    return find_controller(paths, write=write) != "nowhere"


def beats(paths: RunPaths, seconds: float = WATCH_SECONDS) -> bool:
    """Whether the controller on another machine shows a sign of life in this time, whatever the clocks say."""
    with contextlib.suppress(OSError):
        before = paths.address.stat().st_mtime_ns
        deadline = time.monotonic() + seconds
        while before and time.monotonic() < deadline:
            time.sleep(0.2)
            with paths.address.open("rb") as opened:
                if os.fstat(opened.fileno()).st_mtime_ns != before:
                    return True
    return False


def shows_life(paths: RunPaths) -> bool:
    """Whether the controller of the address has shown a sign of life just now; where the clocks disagree, whether it shows one."""
    age = _seconds_since_beat(paths.address, write=False)
    return (age is not None and abs(age) <= STALE_SECONDS) or beats(paths)


def beat(file: Path, address: Address) -> None:
    """A controller's sign of life: the address file is as new as can be. One that was lost is written anew."""
    with contextlib.suppress(OSError):
        found = read_address(file)
        if found is None or found.term < address.term or found.run != address.run:
            write_address(file, address)
        elif found.term == address.term:
            os.utime(file)


def say_farewell(file: Path, term: int) -> None:
    """Leaves the address with the oldest of times: nobody need wait for it to grow stale. A later controller's beat undoes it."""
    found = read_address(file)
    if found is not None and found.term == term:
        with contextlib.suppress(OSError):
            os.utime(file, (0, 0))


def _seconds_since_beat(file: Path, *, write: bool) -> float | None:
    """By the storage's own clock: the time of a file made just now. None where none can be made."""
    if not write:
        try:
            return time.time() - file.stat().st_mtime
        except OSError:
            return None
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".now.")
        try:
            os.utime(handle)
            now = os.fstat(handle).st_mtime
        finally:
            os.close(handle)
            os.unlink(name)
        with file.open("rb") as opened:  # a network file system asks its server for the time of a file that is opened
            return now - os.fstat(opened.fileno()).st_mtime
    except OSError:
        return None


def _answers(remote: str) -> bool:
    place = urlsplit(remote)
    try:
        with socket.create_connection((place.hostname or "", place.port or 0), CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def host_name() -> str:
    return socket.gethostname()
