"""Libraries that are loaded before the C library and make the system fail as a test wants it, at the nearest real boundary."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "chaos"


def built(name: str, place: Path) -> str:
    """Compiles `chaos/NAME.c`; the library's path, for LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler is missing (tests/apt.txt)")
    library = place / f"{name}.so"
    source = SOURCES / f"{name}.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return str(library)
