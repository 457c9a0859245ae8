"""`midwatch prefer`: what an annotator's screen asks for; without a screen, the pairs as a file, and how far annotators agree."""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import Counter
from pathlib import Path

from launcher.cli.runs import find_anywhere, find_run
from launcher.controller.annotation.agreement import measure
from launcher.controller.annotation.pairs import export
from launcher.controller.annotation.prompts import of_file
from launcher.controller.annotation.store import PreferenceError, all_decisions, check_name
from midwatch import protocol as p
from midwatch.annotator import own_name
from midwatch.run_directory import RunPaths
from midwatch.transport.client import Client, ClientError
from midwatch.transport.ssh_url import RemoteRun
from midwatch.words import plural
from shards.common.terminal import write_json, write_out

LEFT_OUT = {
    "tie": "ties",
    "both-bad": "both bad",
    "skip": "skipped",
    "empty": "with an empty answer",
    "alike": "with the same answer twice",
}


def tell(arguments: argparse.Namespace) -> int:
    """`--export` and `--agreement`. Raises NoSuchRun and ClientError."""
    if arguments.export is not None:
        directory = RunPaths(find_run(arguments.run)).preferences
        try:
            counts = export(directory, Path(arguments.export))
        except OSError as error:
            raise ClientError(f"{arguments.export}: {error.strerror}") from None
        write_out(f"{arguments.export}: {_counted(counts)}")
        return 0
    run = find_anywhere(arguments.run)
    found = measure(all_decisions(RunPaths(run).preferences)) if isinstance(run, Path) else asyncio.run(_ask(run))
    if arguments.json:
        write_json(found)
    else:
        write_out("\n".join(report(found)))
    return 0


def begin_of(arguments: argparse.Namespace) -> p.PreferenceBegin:
    """Raises ClientError for what could not begin anywhere."""
    name = arguments.annotator or own_name()
    try:
        check_name(name)
        prompts = of_file(Path(arguments.prompts)) if arguments.prompts is not None else []
    except PreferenceError as error:
        raise ClientError(str(error)) from None
    checkpoints = tuple(each for each in (arguments.checkpoint, arguments.against) if each is not None)
    if arguments.against is not None and arguments.checkpoint is None:
        checkpoints = ("newest", arguments.against)
    return p.PreferenceBegin(
        id=0,
        annotator=name,
        session=uuid.uuid4().hex,
        checkpoints=checkpoints,
        source=arguments.source or "",
        prompts=tuple(tuple(p.ProbeTurn(turn.role, turn.content) for turn in prompt) for prompt in prompts),
        shared=arguments.shared,
        limit=arguments.limit,
        temperature=arguments.temperature,
    )


def report(found: p.Agreement) -> list[str]:
    """In words."""
    made = ", ".join(f"{name} {count}" for name, count in found.decisions.items()) or "none yet"
    lines = [f"decisions     {made}"]
    if found.measure:
        value = f"{found.value:.3f}" if found.value is not None else "undefined (all labels are the same)"
        lines.append(f"annotators    {found.measure} {value} on {found.pairs} pairs that {found.annotators} annotators share")
        lines.append(f"              alike in {share(found.alike)}")
    else:
        lines.append("annotators    no pair was decided by two")
    lines.append(
        f"reward model  agrees in {share(found.reward)}" if found.reward.count else "reward model  has scored no decided pair"
    )
    lines.append(f"left side     chosen in {share(found.left)}" if found.left.count else "left side     no side was chosen yet")
    return lines


def share(found: p.Share) -> str:
    """With its interval."""
    if found.low is None or found.high is None:
        return "0 of 0"
    part = f"{100 * found.hits / found.count:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"{found.hits} of {found.count}: {part}"


def _counted(counts: Counter[str]) -> str:
    left_out = ", ".join(f"{counts[kind]} {words}" for kind, words in LEFT_OUT.items() if counts[kind])
    return plural(counts["pairs"], "pair") + (f"; left out: {left_out}" if left_out else "")


async def _ask(run: RemoteRun) -> p.Agreement:
    async with Client(run, read_only=True) as client:
        return (await client.ask(p.PreferenceQuery(id=0), p.PreferenceState)).agreement
