"""Saves in the background: copies at the boundary, writes in a thread over a process group of its own, reports when all is there.

One save is in flight at a time. The trainer writes into a hidden directory that carries its generation; renaming it to the
checkpoint's id is the commit, and that is the link's to do, not ours. A checkpoint is reported only once its own step's
metrics are known.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from midwatch.checkpoint_format.manifest import FORMAT, CheckpointError, Manifest
from midwatch.protocol import CheckpointFailed, CheckpointReady, CommitRefused, Committed, Note
from trainer.checkpoint import storage
from trainer.checkpoint.direct_io import block_tensor
from trainer.control.reporting import ControllerLink
from trainer.distributed.mesh import World, local, reduce
from trainer.progress import TrainProgress, checkpoint_id, plain

log = logging.getLogger("trainer")

COMMIT_SECONDS = 30.0
"""How long a stage's end waits for the commit; without a controller in reach it then goes on, and the commit follows."""

NICENESS = 10
"""Added to the priority of the thread that writes."""


class Tell(Protocol):
    """Tells the outcome of a command, and of which step it is."""

    def __call__(self, number: int, ok: bool, detail: dict[str, Any], reason: str, step: int, /) -> None: ...


@dataclass
class Save:
    """One checkpoint on its way to disk."""

    id: str
    directory: Path
    progress: TrainProgress
    started: float
    numbers: list[int] = field(default_factory=list)
    """Commands that it answers."""
    stall: float = 0.0
    seconds: float = 0.0
    digest: str = ""
    bytes: int = 0
    suspect: bool = False
    loss: float | None = None
    error: CheckpointError | None = None
    crash: Exception | None = None
    """What no rank can go on after, such as a rank that is gone."""
    thread: threading.Thread | None = None


class Checkpointer:
    """Owns the thread that writes. All methods are called on all ranks, at the same boundary."""

    def __init__(self, root: Path, world: World, link: ControllerLink, generation: int, asynchronous: bool) -> None:
        self._root, self._world, self._link = root, world, link
        self._generation, self._asynchronous = generation, asynchronous
        self._copies: dict[str, Tensor] = {}
        self._flight: Save | None = None
        self._abandoned = threading.Event()
        # What follows is rank 0's alone.
        self._unjudged: list[Save] = []
        self._judged: dict[int, tuple[bool, float | None]] = {}
        self._asked: dict[str, Save] = {}
        """Reported and not yet answered."""
        self._refused: dict[str, str] = {}
        """Why checkpoints reported since the newest save began are not committed, by id."""
        self._late: dict[str, list[int]] = {}
        """Commands that came after the checkpoint they ask for was reported."""
        self.tell: Tell = lambda number, ok, detail, reason, step: None
        """For commands that the controller does not know to be answered by a checkpoint."""
        self.learn: Tell = lambda number, ok, detail, reason, step: None
        """For those that it knows of by the checkpoint's report."""
        self.beat: Callable[[], None] = lambda: None
        """Called about once a second while waiting for the disk or for a commit."""

    def begin(
        self, progress: TrainProgress, tensors: dict[str, Tensor], numbers: tuple[int, ...] = (), revision: int = 0
    ) -> tuple[str, bool]:
        """Starts to save; the id, and whether such a checkpoint is committed already. Waits for an earlier save first.

        tensors: all state by name, sharded or the same on every rank. progress: as of this boundary; not to be changed.
        One that is on its way already is not written again.
        """
        id = checkpoint_id(progress, revision)
        self.join()
        self.poll()
        there, coming = reduce((self._is_there(id), self._is_coming(id, numbers)), self._world.control)
        if there or coming:
            return id, bool(there)
        save = Save(id, self._root / f".g{self._generation}-{id}", progress, time.monotonic(), list(numbers))
        self._flight = save
        self._refused.clear()
        self._abandoned.clear()
        parts = self._stage(tensors)
        if self._asynchronous:
            save.stall = time.monotonic() - save.started
            save.thread = threading.Thread(
                target=self._write_behind, args=(save, tensors, parts), name="checkpoint-writer", daemon=True
            )
            save.thread.start()
        else:
            self._write(save, tensors, parts)
            save.stall = save.seconds
        if self._world.is_rank_zero:
            log.info("checkpoint %s: begun", id)
        return id, False

    def _is_there(self, id: str) -> bool:
        return self._world.is_rank_zero and (self._root / id).is_dir() and id not in self._asked

    def _is_coming(self, id: str, numbers: tuple[int, ...]) -> bool:
        """Whether it is written and not yet committed; it then answers these commands too."""
        for save in self._unjudged:
            if save.id == id:
                save.numbers.extend(numbers)
                return True
        if id in self._asked:
            self._late.setdefault(id, []).extend(numbers)
            return True
        return False

    def poll(self) -> None:
        """Reports what has been written and judged, and takes the answers; costs nothing where there is nothing."""
        if self._flight is not None and self._flight.thread is not None and not self._flight.thread.is_alive():
            self.join()
        if not self._world.is_rank_zero:
            return
        self._report()
        while (answer := self._link.next_answer()) is not None:
            self._take(answer)

    def _take(self, answer: Committed | CommitRefused) -> None:
        """After each reconnect all commits are told again; only what was asked for counts."""
        save = self._asked.pop(answer.id, None)
        if save is None:
            return
        reason = "" if isinstance(answer, Committed) else answer.reason
        detail = {} if reason else {"checkpoint": answer.id}
        for number in save.numbers:
            self.learn(number, not reason, detail, reason, save.progress.step)
        for number in self._late.pop(answer.id, ()):
            self.tell(number, not reason, detail, reason, save.progress.step)
        if reason:
            self._refused[answer.id] = reason
            text = f"checkpoint {answer.id} was not committed: {reason}"
            self._link.send(Note(level="alarm", text=text, step=save.progress.step))
        else:
            log.info("checkpoint %s: committed, %.2f s after it began", answer.id, time.monotonic() - save.started)

    def ask(self, number: int) -> None:
        """Reports anew the checkpoint that answers a command, if it was reported before: the answer may have been lost."""
        for save in self._asked.values():
            if number in save.numbers:
                self._send_ready(save)

    def observe(self, step: int, finite: bool, loss: float | None) -> None:
        """What is known of a step's metrics; a checkpoint of that step may then be reported."""
        self._judged = {known: verdict for known, verdict in self._judged.items() if known >= step - 16}
        self._judged[step] = (finite, loss)

    def forget(self, step: int) -> None:
        """After loading: steps beyond are to be taken anew, and this one was good enough to load."""
        self._judged = {step: (True, None)}

    def join(self) -> CheckpointError | None:
        """Waits for the save in flight; why it failed, the same on every rank."""
        save, self._flight = self._flight, None
        if save is None:
            return None
        while save.thread is not None and save.thread.is_alive():
            save.thread.join(1.0)
            self.beat()
        if save.crash is not None:
            raise save.crash
        if not self._world.is_rank_zero:
            return save.error
        if save.error is None:
            self._unjudged.append(save)
        else:
            shutil.rmtree(save.directory, ignore_errors=True)
            if not isinstance(save.error, storage.Abandoned):
                numbers = tuple(save.numbers)
                for number in numbers:
                    self.learn(number, False, {}, str(save.error), save.progress.step)
                self._link.send(CheckpointFailed(id=save.id, step=save.progress.step, reason=str(save.error), numbers=numbers))
        return save.error

    def abandon(self) -> None:
        """Gives up the save in flight, if it is not written yet."""
        self._abandoned.set()
        self.join()

    def wait_commit(self, id: str, timeout: float = COMMIT_SECONDS) -> str | None:
        """Waits until the checkpoint is committed; on every rank why it is not, or None. Its metrics must be known.

        Where no answer comes in time it is not for lack of the checkpoint: that counts as None.
        """
        end = time.monotonic() + timeout
        while True:
            self.beat()
            self.poll()
            settled = id not in self._asked and all(save.id != id for save in self._unjudged)
            over = self._world.is_rank_zero and (settled or time.monotonic() > end)
            refused = self._world.is_rank_zero and id in self._refused
            word = reduce([int(over), int(refused)], self._world.control)
            if word[0]:
                return f"checkpoint {id} was refused: {self._refused.get(id, '')}" if word[1] else None
            if self._world.is_rank_zero:
                time.sleep(0.01)

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's parts, in buffers that are used again; the training may then go on."""
        pinned = self._world.device.type == "cuda"
        for name, tensor in tensors.items():
            part = local(tensor)
            copy = self._copies.get(name)
            if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
                copy = block_tensor(part.shape, part.dtype, pinned)
                self._copies[name] = copy
            copy.copy_(part, non_blocking=True)
        self._world.synchronize()
        return {name: self._copies[name] for name in tensors}

    def _write_behind(self, save: Save, tensors: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
        # Training is the nobler work: where there is no core to spare, this thread waits for gaps in it. (Linux; a thread's own.)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._write(save, tensors, parts)

    def _write(self, save: Save, tensors: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
        head = Manifest(
            format=FORMAT,
            id=save.id,
            generation=self._generation,
            files={},
            state=plain(save.progress),
            tensors={},
            world=self._world.size,
        )
        try:
            save.digest, save.bytes = storage.save(
                save.directory, tensors, parts, head, self._world.checkpoint, self._abandoned.is_set
            )
        except CheckpointError as error:
            save.error = error
        except Exception as error:  # raised again where the thread is joined
            save.crash = error
        save.seconds = time.monotonic() - save.started

    def _report(self) -> None:
        for save in list(self._unjudged):
            at = save.progress
            if at.step not in self._judged:
                continue
            save.suspect, save.loss = not self._judged[at.step][0], self._judged[at.step][1]
            self._unjudged.remove(save)
            self._asked[save.id] = save
            self._send_ready(save)

    def _send_ready(self, save: Save) -> None:
        at = save.progress
        self._link.send(
            CheckpointReady(
                id=save.id,
                directory=save.directory.name,
                digest=save.digest,
                step=at.step,
                lineage=at.lineage,
                stage=at.stage_name,
                stage_step=at.stage_step,
                ended=at.ended,
                generation=self._generation,
                bytes=save.bytes,
                suspect=save.suspect,
                seconds=save.seconds,
                stall_seconds=save.stall,
                numbers=tuple(save.numbers),
                loss=save.loss,
                settings=dict(at.settings),
            )
        )
