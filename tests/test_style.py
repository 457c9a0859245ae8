"""The code reads as agreed: formatted, linted and typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [("ruff", "check", "."), ("ruff", "format", "--check", "--extend-exclude", "*.md", "."), ("mypy",)]


@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_the_code_reads_as_agreed(words: tuple[str, ...]) -> None:
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run([program, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
