"""One fuzz engine for all loaders: what may come of a damaged or hostile input, and in how much time and memory.

A `Subject` is a loader with valid inputs, made by the real writers. `attack` gives it inputs that differ from these by a few
mutations, each a function of (subject, seed, number) alone, in a child process with an address space limit and an alarm. A fault is
any exception that is not the loader's own, a message that is empty, too long or does not name what it must, and a limit exceeded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import pickle
import random
import resource
import select
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutations import CODECS

COUNT = int(os.environ.get("MIDWATCH_FUZZ", "2000"))
"""Inputs for each loader where there is time for it."""
SECONDS = 4.0
"""Processor seconds that a loader may take for one input."""
STUCK = 30.0
"""Processor seconds without progress after which the child is killed: code that does not return to Python sees no alarm."""
MEBIBYTES = 768
"""Address space that a loader may take for one input."""
LONGEST = 2000
"""Characters of a message."""


class OvertimeError(BaseException):
    """Not an Exception, so that no loader takes it for its own."""


@dataclass(frozen=True)
class Subject:
    """A loader and what it may be given.

    load: takes the bytes of one input, writes them where the loader looks, loads and uses what was loaded. errors: the loader's
    own. codec: of CODECS, how structure is mutated; "bytes": there is none. seal: recomputes digests, so that what they protect is
    reached. names: what each message has to name. lines: of a message, at the most. quick: inputs of the default run.
    """

    name: str
    seeds: Sequence[bytes]
    load: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = ()
    codec: str = "bytes"
    seal: Callable[[bytes], bytes] = lambda raw: raw
    names: str = ""
    lines: int = 3
    quick: int = 2000


@dataclass(frozen=True)
class Fault:
    number: int
    kind: str
    text: str


def input_of(subject: Subject, number: int, seed: int = 0) -> bytes:
    """The input of that number."""
    rng = random.Random(f"{subject.name}/{seed}/{number}")
    raw = rng.choice(subject.seeds)
    structured = subject.codec != "bytes" and rng.random() < 0.75
    raw = CODECS[subject.codec if structured else "bytes"](raw, rng)
    # A digest that is not recomputed must be refused too.
    return subject.seal(raw) if rng.random() < 0.9 else raw


def verdict(subject: Subject, raw: bytes) -> tuple[str, str] | None:
    """(kind, text) of the fault that an input shows; None where there is none."""
    try:
        subject.load(raw)
    except subject.errors as error:
        said = str(error)
        try:
            said.encode()
        except UnicodeEncodeError:
            return "message", f"cannot be printed: {said!r}"
        lines = said.splitlines()
        wrong = not said.strip() or len(lines) > subject.lines or any(len(line) > LONGEST for line in lines)
        if wrong or subject.names not in said:
            return "message", f"{type(error).__name__} of {len(lines)} lines, {len(said)} characters: {said[:300]!r}"
        return None
    except MemoryError:
        return "MemoryError", traceback.format_exc(limit=-8)
    except (Exception, OvertimeError) as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
        ours = [frame for frame in own if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
        at = (ours or own or [None])[-1]
        place = "" if at is None else f" at {Path(at.filename).name}:{at.lineno}"
        return f"{type(error).__name__}{place}", traceback.format_exc(limit=-8)[-3000:]
    return None


def attack(subject: Subject, count: int = COUNT, seed: int = 0) -> list[Fault]:
    """The faults that so many inputs show, one of each kind. Every seed must load as it is."""
    progress = mmap.mmap(-1, 8)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(subject, count, seed, progress, writing)
    os.close(writing)
    said = _heard(child, progress, reading)
    _, status = os.waitpid(child, 0)
    if said:
        found: list[Fault] = pickle.loads(said)
        return found
    number = struct.unpack("<q", progress[:8])[0]
    how = "was killed: it made no progress" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else "died"
    return [Fault(number, f"process {how} (status {status})", "see what input_of gives")]


def _heard(child: int, progress: mmap.mmap, reading: int) -> bytes:
    """What the child writes before it ends; a child that makes no progress is killed."""
    said, before, since = b"", b"", 0.0
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], 0.5)[0]:
                part = pipe.read(1 << 20)
                if not part:
                    return said
                said += part
            now, spent = progress[:8], _processor_seconds(child)
            if now != before:
                before, since = now, spent
            elif spent - since > STUCK:
                os.kill(child, signal.SIGKILL)
                return b""


def _processor_seconds(child: int) -> float:
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(subject: Subject, count: int, seed: int, progress: mmap.mmap, writing: int) -> None:
    """In the child."""

    def overtime(*_: object) -> None:
        raise OvertimeError(f"took more than {SECONDS:g} s")

    faults: dict[str, Fault] = {}
    logging.disable()
    try:
        # Processor time: what another process takes does not count.
        signal.signal(signal.SIGVTALRM, overtime)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS * 5)
        for raw in subject.seeds:
            subject.load(subject.seal(raw))
        for number in range(count):
            raw = input_of(subject, number, seed)
            progress[:8] = struct.pack("<q", number)
            _limit_memory()
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
                shown = verdict(subject, raw)
            except OvertimeError:
                shown = None
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if shown is not None and shown[0] not in faults:
                faults[shown[0]] = Fault(number, *shown)
        answer = list(faults.values())
    except BaseException:
        answer = [Fault(-1, "the engine itself", traceback.format_exc())]
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
    os._exit(0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (MEBIBYTES << 20)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def holds(subject: Subject, count: int | None = None, seed: int = 0) -> None:
    """Asserts that an attack shows no fault; without a count, that of the default run."""
    count = subject.quick if count is None else count
    faults = attack(subject, count, seed)
    told = [f"{subject.name}, input {fault.number} of seed {seed}: {fault.kind}\n{fault.text}" for fault in faults]
    assert not faults, "\n\n".join(told)


@contextlib.contextmanager
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of small files would wait for a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as place:
        yield Path(place)


def resealed_json(raw: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A JSON object with what `change` sets; as it is where it is none."""
    try:
        found = json.loads(raw)
        change(found)
        return json.dumps(found).encode()
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return raw
