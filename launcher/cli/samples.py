"""`midwatch samples`: what the model writes, with reward and KL, from the controller of a run."""

from __future__ import annotations

import argparse
import asyncio
import sys

import msgspec
from rich.console import Console

from launcher import protocol as p
from launcher.cli.runs import find_anywhere
from launcher.client import Client
from launcher.words import plural


def samples(arguments: argparse.Namespace) -> int:
    """Prints them in the order asked for."""
    if arguments.limit < 1:
        print("midwatch: --limit must be at least 1", file=sys.stderr)
        return 2
    root = find_anywhere(arguments.run)

    async def ask() -> list[p.SampleView]:
        found: list[p.SampleView] = []
        async with Client(root, read_only=True, start=True) as client:
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
            print(msgspec.json.encode(sample).decode())
        return 0
    console = Console(highlight=False)
    for number, sample in enumerate(found):
        if number:
            console.print()
        console.print(_heading(sample), style="bold", markup=False)
        console.print(_safe(sample.prompt), style="cyan", markup=False)
        console.print(_safe(sample.text), markup=False)
    if not found:
        print("midwatch: there are no such samples yet", file=sys.stderr)
    return 0


def _heading(sample: p.SampleView) -> str:
    parts = [f"{sample.stage} step {sample.step}, lineage {sample.lineage}" + ("" if sample.on_line else " (rolled back)")]
    parts += [f"reward {sample.reward:.4g}"] if sample.reward is not None else []
    parts += [f"KL {sample.kl:.4g}"] if sample.kl is not None else []
    parts += [plural(sample.tokens, "token")] if sample.tokens is not None else []
    return ", ".join(parts)


def _safe(text: str) -> str:
    """A model may write what a terminal would take for an order."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
