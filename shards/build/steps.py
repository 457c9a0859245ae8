"""The steps of a build that cleans, in order, and how one of their tasks is done in whichever process it is."""

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
    """Tasks that do not depend on each other, each with one file to show for it."""

    @property
    def name(self) -> str:
        """Of its directory in OUT/work."""

    @property
    def about(self) -> str:
        """For people."""

    def tasks(self, work: Work) -> list[Any]:
        """All of them; known once the steps before it are done."""

    def weight(self, work: Work, task: Any) -> int:
        """Bytes, or 1 where tasks are equally long."""

    def output(self, work: Work, task: Any) -> Path:
        """The file that is there when the task is done."""

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
    return Work(msgspec.json.decode(build, type=Build), key)  # one a step: what it remembers was known when the step began


def forget() -> None:
    """Makes the next task look anew at what is there."""
    _work.cache_clear()


def do(build: bytes, key: str, step: str, task: Any) -> None:
    """One task, in any process: `build` as JSON."""
    STEPS[step].do(_work(build, key, step), tuple(task))
