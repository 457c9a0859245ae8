"""An environment of the bench's own for what the project is held against, and a process in it that measures by request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent


def environment(requirements: Path) -> Path:
    """Its Python, installed on first use below .bench/, again when the requirements change."""
    place = HERE.parent / ".bench" / requirements.stem
    stamp, python = place / "installed.txt", place / "bin" / "python"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        print(f"installing {requirements.name} into {place} (once; minutes)", file=sys.stderr)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements)], check=True)
        stamp.write_text(requirements.read_text())
    return python


class Peers:
    """`_peer_readers.py` at work: `sizes` in bytes, `read(way)` gives CPU seconds and tokens. A context: it ends the process."""

    def __init__(self, tokens: Path, place: Path) -> None:
        python = environment(HERE / "requirements-shards.txt")
        command = [str(python), str(HERE / "_peer_readers.py"), str(tokens), str(place)]
        self._log = (place.parent / "peers.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=place.parent
        )
        self.sizes: dict[str, int] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"the peers' process ended:\n{Path(self._log.name).read_text()[-3000:]}")
        return json.loads(line)

    def read(self, way: str) -> tuple[float, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way}\n")
        self._process.stdin.flush()
        seconds, count = self._answer()
        return float(seconds), int(count)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
