"""`midwatch export`: a checkpoint as a Hugging Face directory, written by the trainer."""

from __future__ import annotations

import argparse
import subprocess
import sys

from launcher.cli.runs import find_run
from launcher.paths import RunPaths
from launcher.recipe import load_recipe


def export(arguments: argparse.Namespace) -> int:
    """The exit status of the trainer's exporter, in an interpreter that has torch."""
    paths = RunPaths(find_run(arguments.run))
    python = load_recipe(paths.recipe).cluster.python or sys.executable
    command = [python, "-P", "-m", "trainer.export", str(paths.root), "--checkpoint", arguments.checkpoint, "--to", arguments.to]
    return subprocess.run([*command, "--dtype", arguments.dtype]).returncode
