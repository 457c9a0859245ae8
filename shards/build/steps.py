"""The steps of a build with cleaning, in order, and how any process does one of their tasks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import msgspec

from shards.build.clean import Cleaning
from shards.build.duplicates import Exact, Near, Verify
from shards.build.encode import Encoding
from shards.build.minhash_signatures import Sign
from shards.build.models import FilterModel
from shards.build.read import Read
from shards.build.synthetic import Make
from shards.build.workspace import Work
from shards.spec import Build


class BuildStep(Protocol):
    """Independent tasks. Each writes one file last, which marks it as done."""

    @property
    def name(self) -> str:
        """The name of its directory in OUT/work."""

    @property
    def about(self) -> str:
        """A description for the progress report."""

    def tasks(self, work: Work) -> list[Any]:
        """All tasks. Available once the steps before are done."""

    def weight(self, work: Work, task: Any) -> int:
        """The share of a task in the step's work: bytes, or 1 where all tasks take about as long."""

    def output(self, work: Work, task: Any) -> Path:
        """The file that marks the task as done."""

    def do(self, work: Work, task: Any) -> None:
        """Do it."""


STEPS: dict[str, BuildStep] = {
    step.name: step for step in (Read(), Sign(), Exact(), Near(), Verify(), FilterModel(), Cleaning(), Make(), Encoding())
}


def left(step: BuildStep, work: Work) -> list[Any]:
    """The tasks of a step that are not done."""
    return [task for task in step.tasks(work) if not step.output(work, task).exists()]


@lru_cache(maxsize=2)
def _work(build: bytes, key: str, step: str) -> Work:
    # A new one for each step: it caches what was known when the step began.
    return Work(msgspec.json.decode(build, type=Build), key)


def forget() -> None:
    """Make the next task read the state of the working directory again."""
    _work.cache_clear()


def do(build: bytes, key: str, step: str, task: Any) -> None:
    """Do one task, in any process; `build` is JSON."""
    STEPS[step].do(_work(build, key, step), tuple(task))
