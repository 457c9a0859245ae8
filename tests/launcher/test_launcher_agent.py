"""The agent: a generation of ranks under torch's elastic agent, and its reading of the node. The one test here that needs torch."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from launcher.agent.agent import Agent
from launcher.agent.environment import MASK, presentable, rank_environment
from launcher.agent.stats import NodeReader
from midwatch import protocol as p
from midwatch.recipe import load_recipe
from midwatch.run_directory import RunPaths


def gather(generation: int) -> p.Gather:
    start = p.Start(generation=generation, term=1, lineage=p.Lineage(id=1))
    return p.Gather(start=start, node_rank=0, nodes=1, ranks_per_node=1, store_host="127.0.0.1", store_port=0)


def test_each_generation_has_a_store_of_its_own_and_tells_how_its_ranks_ended(tmp_path: Path) -> None:
    elastic = pytest.importorskip("launcher.agent.elastic")
    told: dict[int, tuple[bool, tuple[p.RankExit, ...], str]] = {}
    both = threading.Event()

    def ended(generation: int, ok: bool, exits: tuple[p.RankExit, ...], reason: str) -> None:
        told[generation] = ok, exits, reason
        if len(told) == 2:
            both.set()

    ports: dict[int, int] = {}
    starts: dict[int, p.Start] = {}

    def group(generation: int) -> elastic.RankGroup:
        def opened(port: int) -> None:
            ports[generation] = port
            store = elastic._open_store(msgspec.structs.replace(gather(generation), node_rank=1, store_port=port))
            starts[generation] = msgspec.msgpack.decode(store.get(elastic.START_KEY), type=p.Start)

        environment = rank_environment(1, None)
        return elastic.RankGroup(
            gather(generation), tmp_path / "none", "r", tmp_path, environment, tmp_path / "beat", opened, ended
        )

    first, second = group(1), group(2)
    second.end()
    for each in (first, second):
        each.start()
    assert both.wait(60)
    assert ports[1] != ports[2]
    assert {starts[1].generation, starts[2].generation} == {1, 2}
    ok, exits, _ = told[1]
    assert not ok, "there is no such run"
    assert [e.rank for e in exits] == [0] and exits[0].code != 0
    assert told[2][0] is False
    for each in (first, second):
        each.join(10)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("generation-")]


def test_a_node_without_a_gpu_says_so_and_tells_cpus_memory_and_disk(tmp_path: Path) -> None:
    reader = NodeReader("n", tmp_path)
    stats = reader.read((p.RankBeat(0, os.getpid(), 5, 1.0), p.RankBeat(1, 2**22 + 1, 0, 0.0)), 3)
    assert stats.gpus or stats.gpu_note
    assert len(stats.cpus) >= 1
    assert 0 < stats.memory_used < stats.memory_total
    assert stats.rank_rss[0] > 1e6 and stats.rank_rss[1] == 0
    assert stats.disk_free
    assert p.decode(p.encode(stats)) == stats
    reader.close()


def test_secrets_do_not_reach_the_journal() -> None:
    shown = presentable(
        {"PATH": "/bin", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "DB_PASSWORD": "p", "PROXY": "http://me:pw@host:1", "SHLVL": "2"}
    )
    assert shown == {
        "PATH": "/bin",
        "WANDB_API_KEY": MASK,
        "HF_TOKEN": MASK,
        "DB_PASSWORD": MASK,
        "PROXY": f"http://me:{MASK}@host:1",
    }


def test_an_agent_that_nobody_needs_leaves_and_clears_its_files_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_launcher_recipe import GOOD

    from launcher.agent import agent as module

    monkeypatch.setattr(module, "FORSAKEN_SECONDS", 0.2)
    monkeypatch.setattr(module, "_import_torch", lambda: None)
    paths = RunPaths(tmp_path / "run")
    paths.create()
    paths.recipe.write_text(GOOD)
    began = time.monotonic()
    assert Agent(paths, "n", load_recipe(paths.recipe), None).run() == 0
    assert time.monotonic() - began < 15
    assert list((Path(os.environ["XDG_RUNTIME_DIR"]) / "midwatch").iterdir()) == []
    assert not [t.name for t in threading.enumerate() if t.name in ("agent-link", "stats")]


def test_told_to_leave_it_waits_a_little_for_the_next_controller_unless_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_launcher_recipe import GOOD

    from launcher.agent import agent as module

    monkeypatch.setattr(module, "PARTING_SECONDS", 0.5)
    monkeypatch.setattr(module, "_import_torch", lambda: None)
    paths = RunPaths(tmp_path / "run")
    paths.create()
    paths.recipe.write_text(GOOD)
    for times, soonest, latest in ((1, 0.9, 10.0), (2, 0.0, 0.9)):
        agent = Agent(paths, "n", load_recipe(paths.recipe), None)
        running = threading.Thread(target=agent.run, name="running")
        running.start()
        began = time.monotonic()
        for _ in range(times):
            agent.leave_when_told()
        assert agent._leaving.wait(latest), times
        assert time.monotonic() - began >= soonest, "a new controller may be on its way"
        running.join(15)
        assert not running.is_alive()


def test_a_ranks_exception_is_told_with_the_line_of_code_that_is_not_installed(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from launcher.agent.elastic import _with_place, last_words

    stack = (
        'Traceback (most recent call last):\n  File "/x/site-packages/trainer/loop/loop.py", line 7, in train\n    go()\n'
        '  File "/home/ann/reward.py", line 12, in score\n    raise ValueError("no")\n'
        '  File "/x/site-packages/torch/nn.py", line 9, in call\n    deep()\nValueError: no\n'
    )
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": {"message": "ValueError: no", "extraInfo": {"py_callstack": stack, "timestamp": "1"}}}))
    assert _with_place(ProcessFailure(0, 1, 1, str(file))) == "ValueError: no (/home/ann/reward.py:12)"
    assert (
        last_words("2026-01-02 03:04:05,678 ERROR   this rank ends on an error:\n" + stack)
        == "ValueError: no (/home/ann/reward.py:12)"
    )
    assert last_words(stack + "2026-01-02 03:04:05,678 ERROR   recipe.toml:3: no\n") == "recipe.toml:3: no"
    assert last_words("") == ""
    assert _with_place(ProcessFailure(0, 1, -9, str(tmp_path / "none"))) == ""
