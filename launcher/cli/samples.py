"""`midwatch samples`: what the model writes, with reward and KL, from the controller of a run."""

from __future__ import annotations

import argparse
import asyncio

from launcher.cli.runs import find_anywhere
from midwatch import protocol as p
from midwatch.transport.client import Client
from midwatch.words import plural
from shards.common.terminal import make_console, write_error, write_json


def samples(arguments: argparse.Namespace) -> int:
    """Prints them in the order asked for."""
    if arguments.limit < 1:
        write_error("midwatch: --limit must be at least 1")
        return 2
    root = find_anywhere(arguments.run)

    async def ask() -> list[p.SampleView]:
        found: list[p.SampleView] = []
        async with Client(root, read_only=True, looks="always") as client:
            while len(found) < arguments.limit:
                query = p.SampleQuery(
                    id=0,
                    order=arguments.sort,
                    stage=arguments.stage,
                    pattern=arguments.grep,
                    offset=len(found),
                    limit=arguments.limit - len(found),
                )
                reply = await client.ask(query, p.SampleReply)
                if not reply.samples:
                    break
                found += reply.samples
        return found

    found = asyncio.run(ask())
    if arguments.json:
        for sample in found:
            write_json(sample)
        return 0
    console = make_console()
    for number, sample in enumerate(found):
        if number:
            console.print()
        console.print(_heading(sample), style="bold")
        console.print(sample.prompt, style="cyan")
        console.print(sample.text)
    if not found:
        write_error("midwatch: there are no such samples yet")
    return 0


def _heading(sample: p.SampleView) -> str:
    parts = [f"{sample.stage} step {sample.step}, lineage {sample.lineage}" + ("" if sample.on_line else " (rolled back)")]
    parts += [f"reward {sample.reward:.4g}"] if sample.reward is not None else []
    parts += [f"KL {sample.kl:.4g}"] if sample.kl is not None else []
    parts += [plural(sample.tokens, "token")] if sample.tokens is not None else []
    return ", ".join(parts)
