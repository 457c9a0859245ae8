"""The headless reporter: a line a report interval, commands by script, and an exit status, for CI and for batch jobs.

It owns its run unless told otherwise: a signal that would end it stops the run with a checkpoint, a second one at once. So does
the end of the process that reads its lines. Where they cannot be written for another reason (a full disk) it goes on without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from pathlib import Path

from midwatch import protocol as p
from midwatch.commands import BY_VERB, describe
from midwatch.recipe import load_recipe, parse_recipe
from midwatch.signals import EndingSignals
from midwatch.terminal import OutputError, discard_out, flush_out, indented, make_console, reader_is_gone, write_error, write_json
from midwatch.transport.client import Client, ClientError
from midwatch.transport.ssh_url import RemoteRun
from tui.script import ScriptStep

FINISHED, FAILED, RULE_STOPPED, STOPPED = 0, 1, 3, 4
HOLD_SECONDS = 1.0
LINK_SECONDS = 3.0
"""That a connection may be broken before it is said."""


def report(
    directory: Path | RemoteRun, *, as_json: bool, script: tuple[ScriptStep, ...] | None, signals: EndingSignals | None = None
) -> int:
    """Follows a run to its end; the value is the exit status. signals: given where the reporter owns the run.

    Raises OutputError where the run is another's and nobody reads the lines any more.
    """
    try:
        return asyncio.run(HeadlessReporter(directory, as_json, script or (), signals).follow())
    except ClientError as error:
        write_error(f"midwatch: {error}")
        return FAILED


class HeadlessReporter:
    """One headless run."""

    def __init__(
        self, directory: Path | RemoteRun, as_json: bool, script: tuple[ScriptStep, ...], signals: EndingSignals | None
    ) -> None:
        self._directory, self._json, self._script, self._signals = directory, as_json, script, signals
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
        self._told_faults: tuple[str, ...] = ()
        self._lost_at: float | None = None
        """Since when the connection is broken."""
        self._link_told = ""
        self._client: Client | None = None
        self._stops: list[p.Verb] = []
        """Given by this reporter, because of a signal or of its output."""
        self._stopping: set[asyncio.Task[None]] = set()
        self._muted = False
        self._failed_command = False
        self._held_at = float("-inf")

    async def follow(self) -> int:
        if self._signals is not None:
            self._signals.listen(self._signalled)
            if self._stops and not isinstance(self._directory, RemoteRun):  # a job may have begun by itself
                write_error(f"midwatch: the run was not started; midwatch resume {self._directory} starts it")
                return STOPPED
        async with Client(
            self._directory, subscribe=True, start=True, looks="when over", on_snapshot=self._take, on_link=self._link
        ) as client:
            self._client = client
            for verb in self._stops:  # of signals that came before there was a connection
                self._send(client, verb)
            if self._asks:
                recipe = await client.ask(p.TextQuery(id=0, what="recipe"), p.TextReply)
                self._interval = parse_recipe(recipe.text).report.seconds
            worker = asyncio.create_task(self._work_off(client))
            try:
                while (status := self._status()) is None:
                    if not self._muted and reader_is_gone():
                        self._output_fails(OutputError(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))))
                    if worker.done() and worker.exception() is not None:
                        raise worker.exception() or AssertionError
                    self._tell()
                    self._tell_link(client)
                    await self._next(0.25)
                self._tell(last=True)
            except Exception:
                if self._signals is not None:  # never a run without an owner
                    with contextlib.suppress(Exception):
                        await asyncio.wait_for(client.command("stop", wait=False), 10)
                raise
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
            if any(c.verb in ("stop", "stop-now") and c.state in ("queued", "sent") for c in snapshot.commands):
                return None  # its agents are still leaving
            stopper = next((c for c in reversed(snapshot.commands) if c.verb in ("stop", "stop-now") and c.state == "done"), None)
            return RULE_STOPPED if stopper is not None and stopper.author.startswith("watch rule") else STOPPED
        return None

    def _stopped(self, snapshot: p.Snapshot) -> bool:
        """Released for good: not merely waiting for a resume that the script will give."""
        ended = [c for c in snapshot.commands if c.verb in ("stop", "stop-now", "release") and c.state == "done"]
        return not ended or ended[-1].verb != "release"

    def _signalled(self, number: signal.Signals) -> None:
        self._stop(number.name)

    def _stop(self, why: str) -> None:
        """The first time with a checkpoint, then at once."""
        verb: p.Verb = "stop-now" if self._stops else "stop"
        self._stops.append(verb)
        write_error(f"midwatch: {why}: {describe(verb, {})}" + ("" if verb == "stop-now" else ", with a checkpoint"))
        if self._client is not None:
            self._send(self._client, verb)

    def _send(self, client: Client, verb: p.Verb) -> None:
        task = asyncio.create_task(self._command(client, verb))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _command(self, client: Client, verb: p.Verb) -> None:
        try:
            view = await client.command(verb, wait=False)
            problem = view.reason if view.state in ("refused", "failed") else ""
        except ClientError as error:
            problem = str(error)
        if problem:
            write_error(f"midwatch: {describe(verb, {})}: {problem}")

    # Output

    def _print(self, line: str | dict[str, object], style: str | None = None) -> None:
        if self._muted:
            return
        try:
            if isinstance(line, dict):
                write_json(line, flush=True)
            else:
                self._console.print(line, style=style)
                flush_out()
        except OutputError as error:
            self._output_fails(error)

    def _output_fails(self, error: OutputError) -> None:
        """Nobody reads: an owner stops the run, others leave. A full disk stops no training: it goes on without the lines."""
        if error.reader_is_gone and self._signals is None:
            raise error
        self._muted = True
        discard_out()
        if not error.reader_is_gone:
            write_error(f"midwatch: {error}; the run continues, and nothing more is printed (midwatch journal shows it)")
        elif not self._stops:
            self._stop("nobody reads standard output any more")

    # The script

    async def _work_off(self, client: Client) -> None:
        for entry in self._script:
            while not self._due(entry):
                await self._next_step()
            if entry.commands[0].verb == "resume":
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

    def _due(self, entry: ScriptStep) -> bool:
        snapshot = self._snapshot
        if snapshot is None or snapshot.state not in ("training", "paused", "released"):
            return False
        held = snapshot.state in ("paused", "released") and BY_VERB[entry.commands[0].verb].leaves_hold
        return held or (snapshot.state == "training" and snapshot.step >= entry.step)

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
        if snapshot.faults != self._told_faults:
            self._told_faults = snapshot.faults
            for fault in snapshot.faults:
                self._print({"fault": fault} if self._json else f"  fault: {indented(fault)}", "bold red")
        mark = (snapshot.step, f"{snapshot.state} {p.PHASE_WORDS.get(snapshot.phase, '')}")
        note = snapshot.stages[0].note if snapshot.state == "building" and snapshot.stages else ""
        if (mark == self._told_step and not note) or (not last and time.monotonic() - self._told_at < self._interval):
            return
        self._told_step, self._told_at = mark, time.monotonic()
        self._print(_row(snapshot) if self._json else _line(snapshot))

    def _tell_event(self, event: p.JournalLine) -> None:
        if self._json:
            self._print({"event": event})
        elif event.kind in ("sample", "outcome", "note", "lineage", "stage", "golden", "state") or event.level != "info":
            style = {"info": "dim", "warning": "yellow", "alarm": "bold red"}[event.level]
            self._print(f"  {event.kind}: {indented(event.text)}", style)

    def _link(self, up: bool) -> None:
        self._lost_at = None if up else time.monotonic()

    def _tell_link(self, client: Client) -> None:
        """Says that nothing comes because the connection is broken, for how long, and why, and that it is back."""
        if self._lost_at is None:
            if self._link_told:
                self._link_told = ""
                self._print_link("back", f"the connection to {self._directory} is back")
            return
        gone = time.monotonic() - self._lost_at
        if gone < LINK_SECONDS:
            return  # the next controller is on its way
        told = client.trouble or "it broke"
        if told != self._link_told:
            self._link_told = told
            self._print_link("lost", f"the connection to {self._directory} has been lost for {gone:.0f} s ({told}); trying again")

    def _print_link(self, link: str, text: str) -> None:
        if self._json:
            self._print({"link": link, "text": text})
        else:
            self._print(f"  {text}", "yellow")

    def _say(self, text: str) -> None:
        if not self._json:
            self._print(f"  {text}", "yellow")


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
