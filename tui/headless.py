"""The headless reporter: a line a report interval, commands by script, and an exit status, for CI and for batch jobs.

It owns its run unless told otherwise: SIGTERM or SIGINT stops the run with a checkpoint, a second one at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from launcher import protocol as p
from launcher.client import Client, ClientError
from launcher.commands import describe
from launcher.recipe import load_recipe, parse_recipe
from launcher.remote import RemoteRun
from launcher.terminal import make_console, write_error, write_json
from tui.script import Entry

FINISHED, FAILED, RULE_STOPPED, STOPPED = 0, 1, 3, 4
HOLD_SECONDS = 1.0


def report(directory: Path | RemoteRun, *, as_json: bool, script: tuple[Entry, ...] | None, owns: bool) -> int:
    """Follows a run to its end; the value is the exit status."""
    try:
        return asyncio.run(Reporter(directory, as_json, script or (), owns).follow())
    except ClientError as error:
        write_error(f"midwatch: {error}")
        return FAILED


class Reporter:
    """One headless run."""

    def __init__(self, directory: Path | RemoteRun, as_json: bool, script: tuple[Entry, ...], owns: bool) -> None:
        self._directory, self._json, self._script, self._owns = directory, as_json, script, owns
        file = directory / "recipe.toml" if isinstance(directory, Path) else None
        self._asks = file is None or not os.access(file, os.R_OK)
        """The recipe is on another machine, or another user's: the controller tells it."""
        self._interval = load_recipe(file).report.seconds if file is not None and not self._asks else 1.0
        self._console = make_console(soft_wrap=True)
        self._snapshot: p.Snapshot | None = None
        self._news = asyncio.Event()
        self._told_step = (-1, "")
        self._told_at = 0.0
        self._told_event = -1
        self._signals = 0
        self._failed_command = False
        self._held_at = float("-inf")

    async def follow(self) -> int:
        async with Client(self._directory, subscribe=True, start=True, on_snapshot=self._take) as client:
            if self._asks:
                recipe = await client.ask(p.TextQuery(id=0, what="recipe"), p.TextReply)
                self._interval = parse_recipe(recipe.text).report.seconds
            if self._owns:
                loop = asyncio.get_running_loop()
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self._signalled, client)
            worker = asyncio.create_task(self._work_off(client))
            try:
                while (status := self._status()) is None:
                    if worker.done() and worker.exception() is not None:
                        raise worker.exception() or AssertionError
                    self._tell()
                    await self._next(0.25)
                self._tell(last=True)
            finally:
                worker.cancel()
        if status == FINISHED and self._failed_command:
            return FAILED
        return status

    def _take(self, snapshot: p.Snapshot) -> None:
        self._snapshot = snapshot
        self._news.set()

    async def _next(self, timeout: float) -> None:
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except TimeoutError:
            return

    def _status(self) -> int | None:
        snapshot = self._snapshot
        if snapshot is None or (snapshot.state == "released" and not self._stopped(snapshot)):
            return None
        if snapshot.state == "finished":
            return FINISHED
        if snapshot.state == "failed":
            return FAILED
        if snapshot.state == "released":
            stopper = next((c for c in reversed(snapshot.commands) if c.verb in ("stop", "stop-now") and c.state == "done"), None)
            return RULE_STOPPED if stopper is not None and stopper.author.startswith("watch rule") else STOPPED
        return None

    def _stopped(self, snapshot: p.Snapshot) -> bool:
        """Released for good: not merely waiting for a resume that the script will give."""
        ended = [c for c in snapshot.commands if c.verb in ("stop", "stop-now", "release") and c.state == "done"]
        return not ended or ended[-1].verb != "release"

    def _signalled(self, client: Client) -> None:
        self._signals += 1
        verb: p.Verb = "stop" if self._signals == 1 else "stop-now"
        self._say(f"signal: {describe(verb, {})}")
        self._stopping = asyncio.create_task(client.command(verb, wait=False))

    # The script

    async def _work_off(self, client: Client) -> None:
        for entry in self._script:
            while not self._due(entry):
                await self._next_step()
            if entry.commands[0][0] == "resume":
                await asyncio.sleep(max(0.0, self._held_at + HOLD_SECONDS - time.monotonic()))
            for verb, arguments in entry.commands:
                view = await client.command(verb, arguments)
                await self._seen(view)
                if view.state == "done" and verb in ("pause", "release"):
                    self._held_at = time.monotonic()
                if view.state not in ("done", "cancelled"):
                    self._failed_command = True
                    self._say(f"script: {describe(verb, arguments)}: {view.state}: {view.reason}")

    async def _seen(self, view: p.CommandView) -> None:
        """Waits for a snapshot that knows of the command's end: the step before a rollback must not be taken for the one after."""
        while self._snapshot is None or not any(c.id == view.id and c.state == view.state for c in self._snapshot.commands):
            await self._next_step()

    def _due(self, entry: Entry) -> bool:
        snapshot = self._snapshot
        if snapshot is None or snapshot.state not in ("training", "paused", "released"):
            return False
        waits = snapshot.state in ("paused", "released") and entry.commands[0][0] in (
            "resume",
            "stop",
            "stop-now",
            "rollback",
            "advance",
        )
        return waits or (snapshot.state == "training" and snapshot.step >= entry.step)

    async def _next_step(self) -> None:
        await asyncio.sleep(0.05)

    # Telling

    def _tell(self, last: bool = False) -> None:
        snapshot = self._snapshot
        if snapshot is None:
            return
        for event in snapshot.events:
            if event.index > self._told_event:
                self._told_event = event.index
                self._tell_event(event)
        mark = (snapshot.step, f"{snapshot.state} {p.PHASE_WORDS.get(snapshot.phase, '')}")
        note = snapshot.stages[0].note if snapshot.state == "building" and snapshot.stages else ""
        if (mark == self._told_step and not note) or (not last and time.monotonic() - self._told_at < self._interval):
            return
        self._told_step, self._told_at = mark, time.monotonic()
        if self._json:
            write_json(_row(snapshot), flush=True)
        else:
            self._console.print(_line(snapshot))

    def _tell_event(self, event: p.JournalLine) -> None:
        if self._json:
            write_json({"event": event}, flush=True)
        elif event.kind in ("sample", "outcome", "note", "lineage", "stage", "golden", "state") or event.level != "info":
            style = {"info": "dim", "warning": "yellow", "alarm": "bold red"}[event.level]
            self._console.print(f"  {event.kind}: {event.text}", style=style)

    def _say(self, text: str) -> None:
        if not self._json:
            self._console.print(f"  {text}", style="yellow")


def _row(snapshot: p.Snapshot) -> dict[str, object]:
    return {
        "time": snapshot.time,
        "state": snapshot.state,
        "phase": snapshot.phase,
        "reason": snapshot.reason,
        "stage": snapshot.stage,
        "step": snapshot.step,
        "total_steps": snapshot.total_steps,
        "tokens": snapshot.tokens,
        "lineage": snapshot.lineage,
        "metrics": snapshot.latest,
    }


_SHOWN = (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "norm"), ("perf/tokens_per_second", "tok/s"))
_DRAWN = (
    ("train/loss", "loss"),
    ("policy/reward", "reward"),
    ("policy/kl_sequence", "KL"),
    ("policy/entropy", "entropy"),
    ("policy/response_length", "length"),
)
"""Of a stage that learns from its own responses."""


def _line(snapshot: p.Snapshot) -> str:
    if snapshot.state == "building":
        data = snapshot.stages[0]
        return f"building {data.step:3d} %  {data.note}"
    shown = _DRAWN if any(stage.name == snapshot.stage and stage.updates for stage in snapshot.stages) else _SHOWN
    figures = "  ".join(f"{short} {snapshot.latest[name]:.4g}" for name, short in shown if name in snapshot.latest)
    left = f"  {snapshot.seconds_left:.0f} s left" if snapshot.seconds_left is not None and snapshot.state == "training" else ""
    stage = snapshot.stage or "-"
    phase = f"  {p.PHASE_WORDS[snapshot.phase]}" if snapshot.phase in p.PHASE_WORDS and snapshot.state == "training" else ""
    return f"{snapshot.state} {stage} step {snapshot.step}/{snapshot.total_steps}{phase}  {figures}{left}"
