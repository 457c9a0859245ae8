"""A rank as a process: where its output goes, what its log says, how it ends, how it shows that it lives."""

from __future__ import annotations

import os
import queue
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from trainer_harness import fresh, write_recipe

from bench.boundary import Acknowledger
from launcher.agent.elastic import RankGroup
from launcher.agent.environment import rank_environment
from midwatch.protocol import PHASES, Gather
from midwatch.recipe import Recipe
from trainer.control.heartbeat import Heartbeat
from trainer.process.bootstrap import AGENT_DIED

GUARDED = """
import sys, time
from trainer.process.bootstrap import guard, redirect
redirect()
print("guarded", flush=True)
assert guard().name == "agent-guard"
assert "torch" not in sys.modules
time.sleep(60)
"""


def test_output_goes_to_the_log_and_the_rank_ends_with_its_agent(tmp_path: Path) -> None:
    fifo, log = tmp_path / "guard", tmp_path / "rank.log"
    os.mkfifo(fifo)
    log.write_text("before\n")
    held = os.open(fifo, os.O_RDWR)  # as an agent holds it
    environment = os.environ | {"MIDWATCH_GUARD": str(fifo), "MIDWATCH_LOG": str(log)}
    process = subprocess.Popen([sys.executable, "-c", GUARDED], env=environment, stdout=subprocess.PIPE)
    while "guarded" not in log.read_text():
        assert process.poll() is None
    assert process.poll() is None
    os.close(held)
    assert process.wait(timeout=10) == AGENT_DIED
    assert log.read_text() == "before\nguarded\n"


def test_a_heartbeat_says_step_and_time(tmp_path: Path) -> None:
    heartbeat = Heartbeat.from_environment({"MIDWATCH_HEARTBEAT": str(tmp_path / "beat"), "RANK": "3"})
    heartbeat._clock = lambda: 12.5
    heartbeat.beat(7)
    assert struct.unpack("<QdIf", (tmp_path / "beat.3").read_bytes()) == (7, 12.5, PHASES.index("loading"), 0.0)
    heartbeat.enter("evaluating", 8)
    assert struct.unpack("<QdIf", (tmp_path / "beat.3").read_bytes()) == (8, 12.5, PHASES.index("evaluating"), 0.0)
    heartbeat.close()


def test_without_an_agent_nothing_beats_and_nothing_guards(tmp_path: Path) -> None:
    from trainer.process.bootstrap import guard, redirect

    redirect({})
    assert guard({}) is None
    Heartbeat.from_environment({}).beat(1)


def test_under_an_agent_each_rank_writes_its_log_and_sigterm_ends_it_at_once(recipe: Recipe, tmp_path: Path) -> None:
    """Real ranks under the real elastic agent, connected to a controller's end that acknowledges everything."""
    root = write_recipe(tmp_path / "run", replace(recipe, stage=(replace(recipe.stage[0], steps=100_000),)))
    guard = tmp_path / "guard"
    os.mkfifo(guard)
    held = os.open(guard, os.O_RDWR)
    (root / "logs").mkdir()
    environment = {**rank_environment(1, None), "MIDWATCH_GENERATION": "1", "MIDWATCH_GUARD": str(guard)}
    gather = Gather(start=fresh(), node_rank=0, nodes=1, ranks_per_node=2, store_host="127.0.0.1", store_port=0)
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mw-") as short:
        server = Acknowledger(root, Path(short) / "socket")
        beat = tmp_path / "beat"
        group = RankGroup(gather, root, "key", root / "logs", environment, beat, lambda port: None, lambda *what: ended.put(what))
        try:
            group.start()
            end = time.monotonic() + 60
            while "checkpoint 8-1: committed" not in said(root, 0):
                assert time.monotonic() < end and ended.empty(), said(root, 0)
                time.sleep(0.05)
            first, second = group.pids().values()
            os.kill(second, signal.SIGSTOP)
            time.sleep(0.3)  # by now the first waits for the second
            began = time.monotonic()
            os.kill(first, signal.SIGTERM)
            while Path(f"/proc/{first}/stat").exists() and ") Z " not in Path(f"/proc/{first}/stat").read_text():
                assert time.monotonic() - began < 2
                time.sleep(0.005)
            os.kill(second, signal.SIGCONT)
            _, ok, exits, _ = ended.get(timeout=10)
            assert not ok and (exits[0].rank, exits[0].code) == (0, -signal.SIGTERM)
            assert time.monotonic() - began < 4, "no SIGKILL was needed"
        finally:
            group.end()
            group.join(15)
            server.close()
            os.close(held)
    lines = said(root, 0).splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) ", line) for line in lines), lines
    story = (
        r"generation 1: rank 0 of 2 on cpu \(1 threads\), torch 2.*, process \d+",
        r'from the beginning, seed 0, lineage 1 \(start\), step 0, step 0 of stage "pretrain"',
        r"step 0: evaluating",
        r"step 0: eval/topics/loss \d",
        r"step 1: train/loss [\d.]+, train/lr [\d.]+, train/grad_norm [\d.]+, perf/tokens_per_second \d",
        r"checkpoint 4-1: begun",
        r"checkpoint 4-1: written in [\d.]+ s, [\d.]+ MB, training stood still for [\d.]+ s",
        r"checkpoint 4-1: committed, [\d.]+ s after it began",
    )
    assert re.search("(?s)" + ".*".join(story), said(root, 0)), said(root, 0)
    assert re.search(r"^\S+ \S+ INFO +generation 1: rank 1 of 2 .*\n(?!.*step)", said(root, 1)), said(root, 1)


def said(root: Path, rank: int) -> str:
    file = root / "logs" / f"{rank}.log"
    return file.read_text() if file.exists() else ""
