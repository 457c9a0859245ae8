"""`midwatch check`, and the table that it and `midwatch run` show of nodes."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.cli.runs import check_recipe
from launcher.preflight.checks import RUNTIME_WAY, NodeReport, What, check_nodes, ready
from launcher.preflight.node_report import Findings, runtime_problem
from midwatch.recipe import Recipe, RecipeError, warnings
from midwatch.words import plural
from shards.common.terminal import make_console, write_error, write_json, write_out

MANY = 20
"""Nodes beyond this number are shown only where something is to be said of them."""
_STYLES = {None: "green", "warning": "yellow", "problem": "bold red"}
_WORDS = {None: "fine", "warning": "warning", "problem": "wrong"}


def check(arguments: argparse.Namespace) -> int:
    """The recipe, then the nodes that it names."""
    recipe = check_recipe(Path(arguments.recipe))
    told = warnings(recipe)
    reports = visit(recipe, Path(arguments.dir) if arguments.dir else None)
    here = runtime_problem()
    good = (ready(reports, recipe.fewest_nodes) if reports else True) and not here
    if arguments.json:
        write_json({"recipe": arguments.recipe, "good": good, "warnings": told, "here": here, "nodes": reports})
        return 0 if good else 2
    for warning in told:
        write_error(f"warning: {warning}")
    write_out(f"{arguments.recipe}: good ({plural(len(recipe.stage), 'stage')}, {plural(recipe.total_steps, 'step')})")
    if reports:
        render(reports, make_console())
    if here:
        write_error(f"midwatch: this machine's directory for sockets: {here}\n    {RUNTIME_WAY}")
    elif not good:
        write_error(f"midwatch: {refusal(reports, recipe)}")
    return 0 if good else 2


def nodes_are_ready(recipe: Recipe, directory: Path | None) -> bool:
    """Before a run: checks its nodes and shows them, on stderr, where something is to be said."""
    reports = visit(recipe, directory)
    if any(report.level for report in reports):
        render(reports, make_console(stderr=True))
    if ready(reports, recipe.fewest_nodes):
        return True
    write_error(f"midwatch: {refusal(reports, recipe)}; to start anyway: --no-check")
    return False


def visit(recipe: Recipe, directory: Path | None) -> list[NodeReport]:
    """What is found on the nodes of a run in this directory; nothing for a backend that names none. Raises RecipeError."""
    if recipe.cluster.backend != "ssh":
        return []
    parent = (directory or Path("runs") / recipe.run.name).absolute().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    try:
        return asyncio.run(check_nodes(recipe, parent))
    except OSError as error:
        raise RecipeError(f"{parent}: the nodes cannot be checked: {error.strerror or error}") from None


def refusal(reports: Sequence[NodeReport], recipe: Recipe) -> str:
    wrong = [r.host for r in reports if r.level == "problem"]
    needed = recipe.fewest_nodes
    if len(reports) - len(wrong) >= needed:
        present = [r.host for r in reports if r.level == "problem" and not r.out_of_reach]
        return f"fix these, or remove them from [cluster] hosts: {_some(present)}"
    return f"{len(wrong)} of {len(reports)} nodes cannot take part ({_some(wrong)}), and the run needs {needed}"


def render(reports: Sequence[NodeReport], console: Console) -> None:
    """One table of what was found, and under it what to do; many nodes that are fine become one line."""
    shown = [r for r in reports if r.level is not None] if len(reports) > MANY else list(reports)
    if shown:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("NODE", "", "PYTHON", "MIDWATCH", "TORCH", "GPUS", "FREE", "CLOCK"):
            table.add_column(column, overflow="fold")
        for report in shown:
            table.add_row(report.host, Text(_word(report), style=_STYLES[report.level]), *_cells(report))
        console.print(table)
    for line in advice(reports):
        console.print(line, soft_wrap=not console.is_terminal)
    if len(reports) > MANY:
        fine = sum(r.level is None for r in reports)
        console.print(f"{fine} of {len(reports)} nodes are fine")


def advice(reports: Sequence[NodeReport]) -> list[str]:
    """What is wrong and the way out, once however many nodes it holds for; problems first."""
    hosts: dict[tuple[str, str, str], list[str]] = {}
    for report in reports:
        for note in report.notes:
            word = _word(report) if report.out_of_reach else _WORDS[note.level]
            hosts.setdefault((word, note.text, note.way_out), []).append(report.host)
    lines = []
    for (word, text, way_out), names in sorted(hosts.items(), key=lambda item: item[0][0] == _WORDS["warning"]):
        lines.append(f"{word}: {_some(names)}: {text}")
        if way_out:
            lines.append(f"    {way_out}")
    return lines


def _word(report: NodeReport) -> str:
    return "out of reach" if report.out_of_reach else _WORDS[report.level]


def _cells(report: NodeReport) -> list[Text]:
    found = report.findings
    worst: dict[What, str] = {}
    for note in report.notes:
        if worst.get(note.what) != "problem":
            worst[note.what] = note.level
    if found is None:
        return [Text("!" if what in worst else "", style=_STYLES["problem"]) for what in ("python", "midwatch", "torch", "gpus")]
    free = found.storage.free
    values: dict[What, str] = {
        "python": found.python,
        "midwatch": found.midwatch or "-",
        "torch": found.torch or "none",
        "gpus": _gpus(found),
        "storage": "-" if free is None else _size(free),
        "clock": "-" if report.skew is None else f"{round(report.skew, 2) + 0.0:+.2f} s",
    }
    return [
        Text(f"{value} !" if what in worst else value, style=_STYLES[worst[what]] if what in worst else "")
        for what, value in values.items()
    ]


def _gpus(found: Findings) -> str:
    if not found.gpus:
        return "none"
    names = {name.removeprefix("NVIDIA ") for name in found.gpus}
    return f"{len(found.gpus)} {names.pop() if len(names) == 1 else 'of several kinds'}"


def _size(size: int) -> str:
    gib = size / (1 << 30)
    return f"{gib / 1024:.1f} TiB" if gib >= 1024 else f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
