"""`midwatch export`: a checkpoint as a Hugging Face directory, written by the trainer."""

from __future__ import annotations

import argparse
import subprocess
import sys

from launcher.cli.runs import find_run, read_ledger
from midwatch.recipe import load_recipe
from midwatch.run_directory import RunPaths
from shards.common.terminal import write_error


def export(arguments: argparse.Namespace) -> int:
    """The exit status of the trainer's exporter, in an interpreter that has torch."""
    paths = RunPaths(find_run(arguments.run))
    name = arguments.checkpoint
    ledger = read_ledger(paths.root)
    if ledger.checkpoints:  # else the run has no controller, and what it knows is in its directory
        found = ledger.find(name)
        if isinstance(found, str):
            write_error(f"midwatch: {found}")
            return 1
        name = found.id
    python = load_recipe(paths.recipe).cluster.python or sys.executable
    command = [python, "-P", "-m", "trainer.huggingface.export", str(paths.root), "--checkpoint", name, "--to", arguments.to]
    command += ["--dtype", arguments.dtype, *(["--untied"] if arguments.untied else [])]
    return subprocess.run(command).returncode
