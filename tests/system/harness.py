"""Real runs for the system tests: a recipe small enough for seconds, a controller, an agent, two ranks, and ways to hurt them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.journal.journal import read_journal
from midwatch.journal.run_state import Ledger
from midwatch.run_directory import read_address
from midwatch.transport.client import Client, ClientError

MIDWATCH = str(Path(sys.executable).parent / "midwatch")

RECIPE = """
[run]
name = "tiny"
seed = 3
restarts = {restarts}

[model]
num_layers = 1
hidden_size = 32
num_heads = 2

[tokenizer]
vocab = 512
sample_bytes = 200_000

[data]
dir = "{data}"
held_out = 0.1

[[data.source]]
name = "code"
kind = "text"
origin = "stdlib-code"
max_documents = 12

[[data.source]]
name = "questions"
kind = "sft"
origin = "stdlib-sft"
max_documents = 120

[cluster]
ranks_per_node = 2
device = "cpu"

[checkpoint]
every = {every}
keep = 3

[report]
seconds = 0.2

[[stage]]
name = "pretrain"
objective = "pretrain"
steps = {steps}
context = 64
global_batch = {batch}
lr = 3e-3
mixture = {{ code = 1.0 }}
eval_every = 1000
eval_samples = 8

[[stage]]
name = "sft"
objective = "sft"
steps = {sft_steps}
context = 64
global_batch = 4
lr = 1e-4
mixture = {{ questions = 1.0 }}
eval_every = 1000
eval_samples = 8
{extra}
"""


def recipe_text(
    data: Path, *, steps: int = 300, sft_steps: int = 20, every: int = 25, batch: int = 16, restarts: int = 3, extra: str = ""
) -> str:
    return RECIPE.format(data=data, steps=steps, sft_steps=sft_steps, every=every, batch=batch, restarts=restarts, extra=extra)


PRELOADED = ("LD_PRELOAD", "CLOCK_FILE", "DISK_FILE")
"""Variables of `preload`, which a controller that this process starts is to have, too."""


class Run:
    """One run in a directory of its own; everything it started is killed by `clear`."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment

    # Doing

    def midwatch(self, *arguments: str, timeout: float = 60, check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [MIDWATCH, *arguments],
            env=self.environment,
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def start(self, recipe: str) -> None:
        """Starts the run detached."""
        file = self.root.parent / f"{self.root.name}.toml"
        file.write_text(recipe)
        done = self.midwatch("run", str(file), "--dir", str(self.root), "--detach")
        assert done.returncode == 0, done.stderr

    def command(self, verb: p.Verb, timeout: float = 60, **arguments: Any) -> p.CommandView:
        """Gives a command and waits for its outcome."""

        async def give() -> p.CommandView:
            async with self._client(start=True) as client:
                return await client.command(verb, arguments, timeout=timeout)

        return asyncio.run(give())

    def done(self, verb: p.Verb, timeout: float = 60, **arguments: Any) -> p.CommandView:
        """As `command`, which must succeed."""
        view = self.command(verb, timeout, **arguments)
        assert view.state == "done", f"{verb}: {view.state}: {view.reason}\n{self.story()}"
        return view

    def snapshot(self) -> p.Snapshot:
        return self.wait(lambda s: True, 20)

    def wait(self, wanted: Callable[[p.Snapshot], bool], timeout: float = 60) -> p.Snapshot:
        """Watches, as a screen would, until the snapshot is as wanted."""

        async def watch() -> p.Snapshot:
            arrived = asyncio.Event()
            async with self._client(subscribe=True, start=True, on_snapshot=lambda _: arrived.set()) as client:
                deadline = time.monotonic() + timeout
                while time.monotonic() < deadline:
                    arrived.clear()
                    if client.snapshot is not None and wanted(client.snapshot):
                        return client.snapshot
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(arrived.wait(), 0.3)
                seen = client.snapshot
                what = f"{seen.state} {seen.reason} step {seen.step}" if seen is not None else "nothing"
                raise AssertionError(f"waited {timeout} s in vain; last seen: {what}\n{self.story()}")

        return asyncio.run(watch())

    def wait_step(self, step: int, timeout: float = 60) -> p.Snapshot:
        return self.wait(lambda s: s.step >= step or s.state in ("finished", "failed"), timeout)

    def wait_state(self, *states: str, timeout: float = 60) -> p.Snapshot:
        return self.wait(lambda s: s.state in states, timeout)

    def _client(self, **options: Any) -> Client:
        os.environ.update({k: v for k, v in self.environment.items() if k.startswith(("XDG", "HOME", *PRELOADED))})
        return Client(self.root, **options)

    # Looking

    def ledger(self) -> Ledger:
        ledger = Ledger()
        for term, entry in self.entries():
            ledger.apply(term, entry)
        return ledger

    def entries(self) -> list[tuple[int, j.Entry]]:
        return read_journal(self.root / "journal").entries

    def weights(self, checkpoint: str) -> dict[str, list[str]]:
        """Hash of every tensor chunk of a checkpoint."""
        manifest = msgspec.msgpack.decode((self.root / "checkpoints" / checkpoint / "manifest.msgpack").read_bytes())
        return {name: [c["xxh3"] for c in tensor["chunks"]] for name, tensor in manifest["tensors"].items()}

    def state(self, checkpoint: str) -> dict[str, Any]:
        manifest = msgspec.msgpack.decode((self.root / "checkpoints" / checkpoint / "manifest.msgpack").read_bytes())
        return dict(manifest["state"])

    def rows(self, metric: str) -> tuple[p.MetricRow, ...]:
        """All rows of a metric on the line in force."""

        async def ask() -> p.MetricsReply:
            async with self._client(start=True) as client:
                return await client.ask(p.MetricsQuery(id=0, names=(metric,), last=100_000), p.MetricsReply)

        return asyncio.run(ask()).rows[metric]

    def controller(self) -> psutil.Process:
        address = read_address(self.root / "control" / "address")
        assert address is not None
        return psutil.Process(address.pid)

    def agents(self) -> list[psutil.Process]:
        return self._processes("launcher.agent")

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks, in their order."""
        return sorted((x for x in self._processes("trainer") if x.name()[5:].isdigit()), key=lambda x: int(x.name()[5:]))

    def forks(self) -> list[psutil.Process]:
        """The processes that fork ranks, one a node."""
        return [x for x in self._processes("trainer") if x.name() == "rank-forks"]

    def _processes(self, module: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if module in words and str(self.root) in words and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def story(self) -> str:
        """What happened, for a failed assertion."""
        with contextlib.suppress(ClientError, OSError):
            journal = self.midwatch("journal", str(self.root)).stdout
            logs = "\n".join(
                f"--- {f}\n{f.read_text(errors='replace')[-3000:]}" for f in sorted((self.root / "logs").rglob("*.log"))
            )
            return f"{journal}\n{logs}"
        return ""

    # Hurting

    def kill(self, *processes: psutil.Process) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def clear(self) -> None:
        for name in PRELOADED:
            os.environ.pop(name, None)
        with contextlib.suppress(AssertionError, psutil.Error):
            self.kill(self.controller())
        for module in ("launcher.controller", "launcher.agent", "trainer", "trainer.probe", "shards"):
            self.kill(*self._processes(module))


def gone(processes: list[psutil.Process], timeout: float) -> bool:
    """Whether all have ended in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if psutil.pid_exists(p.pid)):
            return True
        time.sleep(0.02)
    return False
