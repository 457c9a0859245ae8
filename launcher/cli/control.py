"""The commands that need no screen: looking at a run and steering it."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from launcher.cli.runs import NoSuchRun, RunLine, find_anywhere, find_run, known_runs, line_of
from midwatch import protocol as p
from midwatch.commands import CommandError, describe, read, usage
from midwatch.journal.journal import JournalError
from midwatch.recipe import RecipeError
from midwatch.run_directory import RunPaths
from midwatch.transport.client import Client, ClientError
from midwatch.transport.discovery import Looks, SilentError
from midwatch.transport.ssh_url import RemoteRun
from shards.common.terminal import indented, make_console, write_error, write_json, write_out

T = TypeVar("T")

SNAPSHOT_SECONDS = 15.0
"""That a controller has to draw up the run for one look."""


def steer(arguments: argparse.Namespace) -> int:
    """Gives one command and prints its outcome. Raises CommandError for arguments that cannot be right."""
    name = arguments.steering
    try:
        verb, values = read(name, arguments)
    except CommandError as error:
        raise CommandError(f"{error} (usage: midwatch {name} RUN{usage(name).removeprefix(name)})") from None
    root = find_anywhere(arguments.run)

    async def give() -> p.CommandView:
        async with Client(root, start=_wakes(root, verb), resumes=verb == "resume") as client:
            return await client.command(verb, values, wait=not arguments.no_wait)

    view = asyncio.run(give())
    if arguments.json:
        write_json(view)
    else:
        write_out(outcome_text(view))
    return 0 if view.state in ("done", "queued", "sent") else 1


def _wakes(root: Path | RemoteRun, verb: p.Verb) -> bool:
    """Whether a controller is started where none lives: a run that has not begun yet is begun by `resume` alone."""
    begun = isinstance(root, RemoteRun) or any(RunPaths(root).journal.glob("*.log"))
    return begun or verb == "resume"


def outcome_text(view: p.CommandView) -> str:
    """A command and what came of it, in a line."""
    at = f" at step {view.step}" if view.step is not None else ""
    detail = ", ".join(f"{k} {v}" for k, v in view.detail.items() if k != "step")
    why = f": {view.reason}" if view.reason else f" ({detail})" if detail else ""
    return f"{describe(view.verb, view.arguments)}: {view.state}{at}{why}"


def ps(arguments: argparse.Namespace) -> int:
    lines = [_line(root) for root in known_runs()]
    if arguments.json:
        write_json(lines)
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("RUN", "STATE", "STEP", "CONTROLLER", "DIRECTORY"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(line.name, line.state, f"{line.step}", "lives" if line.controller else "-", line.directory)
    make_console().print(table)
    return 0


def _line(root: Path) -> RunLine:
    try:
        return line_of(root)
    except NoSuchRun as error:
        return RunLine(root.name, str(root), f"cannot be read: {error}", "", 0, False, 0.0)


def status(arguments: argparse.Namespace) -> int:
    root = find_anywhere(arguments.run)
    silent = ""
    try:
        snapshot = asyncio.run(snapshot_of(root))
    except SilentError as error:
        if isinstance(root, RemoteRun):
            raise
        silent = str(error)
        snapshot = asyncio.run(archived_snapshot(root, silent))
    if arguments.json:
        write_json(snapshot)
    else:
        print_status(snapshot)
    return 1 if silent else 0


def print_status(snapshot: p.Snapshot) -> None:
    console = make_console()
    reason = f" ({snapshot.reason})" if snapshot.reason else ""
    doing = p.PHASE_WORDS.get(snapshot.phase, snapshot.phase) if snapshot.state == "training" else ""
    phase = f", {doing}" if doing not in ("", "training") else ""
    rest = f"{reason}{phase}, step {snapshot.step} of {snapshot.total_steps}"
    console.print(Text.assemble(f"{snapshot.run}: ", (snapshot.state, "bold"), rest))
    table = Table(box=None, pad_edge=False)
    for column in ("STAGE", "OBJECTIVE", "STATE", "STEP", "PRODUCT"):
        table.add_column(column)
    for stage in snapshot.stages:
        table.add_row(stage.name, stage.objective, stage.state, f"{stage.step}/{stage.steps}", stage.product or "")
    console.print(table)
    golden = [c.id for c in snapshot.checkpoints if c.golden]
    newest = snapshot.checkpoints[-1].id if snapshot.checkpoints else "none"
    console.print(f"checkpoints {len(snapshot.checkpoints)}, newest {newest}, golden {', '.join(golden) or 'none'}")
    for fault in snapshot.faults:
        console.print(f"fault: {fault}")
    for alarm in snapshot.alarms:
        times = f" ({alarm.count} times)" if alarm.count > 1 else ""
        console.print(f"alarm {alarm.key!r}{times}: {alarm.text}")
    for command in snapshot.commands:
        if command.state in ("queued", "sent"):
            console.print(f"waiting: #{command.number} {outcome_text(command)}")


async def snapshot_of(root: Path | RemoteRun) -> p.Snapshot:
    """What a screen would show now; where no controller runs, what the run's files say."""
    arrived = asyncio.Event()
    async with Client(root, subscribe=True, read_only=True, looks="always", on_snapshot=lambda _: arrived.set()) as client:
        try:
            await asyncio.wait_for(arrived.wait(), SNAPSHOT_SECONDS)
        except TimeoutError:
            raise SilentError("the controller received the question but does not answer") from None
        assert client.snapshot is not None
        return client.snapshot


async def archived_snapshot(root: Path, reason: str) -> p.Snapshot:
    """What the run's files say, and why its controller does not say it."""
    from launcher.controller.archive import Archive

    try:
        archive = Archive(RunPaths(root))
    except (RecipeError, JournalError, OSError) as error:
        raise ClientError(f"{reason}; nor can the run's files be read: {error}") from None
    try:
        return archive.snapshot(reason)
    finally:
        archive.close()


def journal(arguments: argparse.Namespace) -> int:
    root = find_anywhere(arguments.run)

    async def ask() -> p.JournalReply:
        async with Client(root, read_only=True, looks="always") as client:
            return await client.ask(p.JournalQuery(id=0, limit=5000), p.JournalReply)

    lines = asyncio.run(ask()).lines
    if arguments.json:
        for line in lines:
            write_json(line)
        return 0
    from datetime import datetime

    for line in lines:
        when = datetime.fromtimestamp(line.time).strftime("%Y-%m-%d %H:%M:%S")
        write_out(f"{when}  {line.author or '-':<10} {line.kind:<10} {indented(line.text)}")
    return 0


def metrics(arguments: argparse.Namespace) -> int:
    root = find_anywhere(arguments.run)

    async def ask() -> p.MetricsReply:
        async with Client(root, read_only=True, looks="always") as client:
            query = p.MetricsQuery(id=0, names=tuple(arguments.names), last=arguments.last)
            return await client.ask(query, p.MetricsReply)

    reply = asyncio.run(ask())
    if arguments.json:
        write_json({"names": reply.names, "rows": reply.rows})
    elif not arguments.names:
        write_out("\n".join(reply.names))
    else:
        for name, rows in reply.rows.items():
            for row in rows:
                write_out(f"{name}  lineage {row.lineage}  step {row.step}  {row.value:g}")
    return 0


def samples(arguments: argparse.Namespace) -> int:
    from launcher.cli.samples import samples as show_samples

    return show_samples(arguments)


def node(arguments: argparse.Namespace) -> int:
    from launcher.cli.nodes import node as on_nodes

    return on_nodes(arguments)


def agent(arguments: argparse.Namespace) -> int:
    from launcher.cli.nodes import agent as become_agent

    return become_agent(arguments)


def completion(arguments: argparse.Namespace) -> int:
    import shtab

    from launcher.cli.parser import make_parser

    write_out(shtab.complete(make_parser(), shell=arguments.shell))
    return 0


def check(arguments: argparse.Namespace) -> int:
    from launcher.cli.check import check as check_all

    return check_all(arguments)


def logs(arguments: argparse.Namespace) -> int:
    from launcher.cli.logs import show

    root = RunPaths(find_run(arguments.run)).logs
    return show(root, arguments.file, arguments.list, arguments.lines, arguments.follow, arguments.grep)


def relay(arguments: argparse.Namespace) -> int:
    import os

    from launcher.backends.slurm.jobs import SlurmError, SlurmRun, own_allocation, read_job, relay_step
    from launcher.cli.relay import relay as pass_on

    try:
        root = find_anywhere(arguments.run)
        if isinstance(root, SlurmRun):
            words = relay_step(root)
            os.execvp(words[0], words)
        root = find_run(arguments.run)
        job = read_job(RunPaths(root))
        looks: Looks = "always" if arguments.look else "when over" if arguments.look_when_over else "never"
        return pass_on(
            root, start=job is None or job.id != own_allocation(), looks=looks
        )  # a step's would end with this connection
    except OSError as error:
        write_error(f"midwatch: srun cannot be started: {error.strerror}")
        return 1
    except (NoSuchRun, SlurmError) as error:
        write_error(f"midwatch: {error}")
        return 1


COMMANDS = {
    "relay": relay,
    "agent": agent,
    "ps": ps,
    "status": status,
    "journal": journal,
    "metrics": metrics,
    "samples": samples,
    "completion": completion,
    "check": check,
    "logs": logs,
    "node": node,
}
