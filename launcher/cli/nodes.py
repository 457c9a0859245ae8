"""`midwatch node …` and `midwatch agent`: what a run's nodes are doing, what they may be used for, and how they join."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from rich.table import Table

from launcher.cli.runs import find_anywhere, find_run
from launcher.cli.snapshot import snapshot_of
from midwatch import protocol as p
from midwatch.run_directory import RunPaths, host_name
from midwatch.transport.node_join import check_url, make_key, read_key_file
from midwatch.transport.tls_identity import KeysError
from shards.common.terminal import make_console, write_error, write_json, write_out


def node(arguments: argparse.Namespace) -> int:
    if arguments.node_command == "list":
        return _list(arguments)
    return _key(arguments)


def agent(arguments: argparse.Namespace) -> int:
    """Becomes the agent of this machine; returns only where it cannot."""
    if problem := check_url(arguments.join):
        write_error(f"midwatch: {problem}")
        return 2
    try:
        key = read_key_file(Path(arguments.key_file))
    except KeysError as error:
        write_error(f"midwatch: {error}")
        return 2
    paths = RunPaths(Path(arguments.run or key.run).absolute())
    if not paths.is_run():
        way = "the run's directory must lie on storage that all nodes share; --run names it where that is mounted elsewhere"
        write_error(f"midwatch: {paths.root}: there is no run here ({way})")
        return 2
    words = ["-P", "-m", "launcher.agent", str(paths.root), "--node", arguments.node or host_name()]
    words += ["--join", arguments.join, "--key-file", os.path.abspath(arguments.key_file)]
    return os.execv(sys.executable, [sys.executable, *words])


def _key(arguments: argparse.Namespace) -> int:
    try:
        key = make_key(RunPaths(find_run(arguments.run)), arguments.node)
    except KeysError as error:
        write_error(f"midwatch: {error}")
        return 1
    if sys.stdout.isatty():
        write_error("midwatch: a key is secret and not for the screen; give it a file: (umask 077; midwatch node key ... > FILE)")
        return 2
    write_out(key.decode())
    return 0


def _list(arguments: argparse.Namespace) -> int:
    nodes = asyncio.run(snapshot_of(find_anywhere(arguments.run))).nodes
    if arguments.json:
        write_json(nodes)
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("NODE", "STATE", "RANKS", "CPU", "MEMORY", "GPUS", "FAILURES", "NOTE"):
        table.add_column(column, overflow="fold")
    for view in nodes:
        table.add_row(view.name, view.state, _ranks(view), *_figures(view.stats), str(view.failures or ""), view.note)
    make_console().print(table)
    return 0


def _ranks(view: p.NodeView) -> str:
    if not view.ranks:
        return "-"
    last = view.first_rank + view.ranks - 1
    return f"{view.first_rank}-{last}" if view.ranks > 1 else str(view.first_rank)


def _figures(stats: p.NodeStats | None) -> tuple[str, str, str]:
    if stats is None:
        return "-", "-", "-"
    busy = sum(stats.cpus) / len(stats.cpus) if stats.cpus else 0.0
    return f"{busy:.0%}", f"{stats.memory_used / 1e9:.1f}/{stats.memory_total / 1e9:.1f} GB", str(len(stats.gpus) or "none")
