"""Signals that ask a process to end: all of them, from the first moment, and one request however often it is sent."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.backends.slurm.jobs import JobState, SlurmRun
from launcher.cli import queue
from midwatch.signals import ENDING, EndingSignals, handled


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", [n for n in ENDING if n != signal.SIGALRM], ids=lambda n: n.name)  # ALRM is the test timeout's
def test_a_signal_that_comes_early_waits_until_somebody_listens(number: signal.Signals) -> None:
    clock, came = Clock(), list[signal.Signals]()
    signals = EndingSignals(clock)
    os.kill(os.getpid(), number)
    assert signals.waiting

    async def listen() -> None:
        signals.listen(came.append)
        assert came == [number]
        clock.now += 2
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)

    asyncio.run(listen())
    assert came == [number, number]


def test_a_signal_to_the_process_and_then_to_its_group_is_one_request() -> None:
    clock, came = Clock(), list[signal.Signals]()
    signals = EndingSignals(clock)
    for pause, number in ((0.0, signal.SIGTERM), (0.1, signal.SIGTERM), (0.2, signal.SIGHUP), (2.0, signal.SIGINT)):
        clock.now += pause
        os.kill(os.getpid(), number)

    async def listen() -> None:
        signals.listen(came.append)

    asyncio.run(listen())
    assert came == [signal.SIGTERM, signal.SIGINT]


def test_what_the_caller_has_had_ignored_stays_ignored_but_for_term_and_int() -> None:
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    assert signal.SIGHUP not in handled() and signal.SIGINT in handled() and signal.SIGUSR1 in handled()


def test_a_wait_is_interrupted_by_a_signal_before_it_and_in_it() -> None:
    clock = Clock()
    signals = EndingSignals(clock)
    os.kill(os.getpid(), signal.SIGUSR2)
    with pytest.raises(KeyboardInterrupt), signals.interrupting():
        pytest.fail("it came before")
    clock.now += 2
    with pytest.raises(KeyboardInterrupt), signals.interrupting():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not signals.waiting


class Queue:
    """Slurm, as far as a waiting job needs it: the job stays queued until it is taken back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
        self.cancelled: list[str] = []
        self._happens = happens
        monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(queue, "standing", self._standing)
        monkeypatch.setattr(queue, "cancel", self.cancelled.append)

    def _standing(self, job: str) -> JobState:
        self._happens()
        return JobState("PENDING", "Resources")


def test_an_owner_that_a_signal_ends_takes_its_job_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Queue(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    run = SlurmRun("job 7", None, str(tmp_path), "7")
    assert queue.wait_in_queue(run, as_json=False, signals=EndingSignals(Clock())) == 4
    assert slurm.cancelled == ["7"]


def test_an_owner_whose_lines_nobody_reads_takes_its_job_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Queue(monkeypatch, lambda: None)
    monkeypatch.setattr(queue, "reader_is_gone", lambda: True)
    monkeypatch.setattr(queue, "discard_out", lambda: None)
    run = SlurmRun("job 7", None, str(tmp_path), "7")
    assert queue.wait_in_queue(run, as_json=False, signals=EndingSignals(Clock())) == 4
    assert slurm.cancelled == ["7"]


def test_a_watcher_that_a_signal_ends_leaves_the_job_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Queue(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert queue.wait_in_queue(SlurmRun("job 7", None, str(tmp_path), "7"), as_json=False) == 4
    assert slurm.cancelled == []
