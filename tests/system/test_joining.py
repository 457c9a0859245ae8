"""Nodes that join by themselves: with a key of the run they train, with another run's they are turned away."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from midwatch import protocol as p
from tests.system.harness import MIDWATCH, Run, recipe_text
from tests.system.hosts import Hosts, require

NAMES = ("pod-0", "pod-1", "pod-2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


PORT = free_port()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require()
    with Hosts(NAMES, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def joining(data: Path, nodes: str, **options: int) -> str:
    cluster = f'backend = "external"\nport = {PORT}\nnodes = "{nodes}"\nranks_per_node = 1'
    return recipe_text(data, **options).replace("ranks_per_node = 2", cluster)


def key(run: Run, *node: str) -> Path:
    """A key file of the run, for a node or for all."""
    file = run.root.parent / f"{run.root.name}-{'-'.join(node) or 'any'}.key"
    file.touch(mode=0o600)
    file.write_text(run.midwatch("node", "key", str(run.root), *node, check=True).stdout)
    return file


class Pods:
    """Starts agents on the hosts, as whatever runs them would."""

    def __init__(self, hosts: Hosts, run: Run) -> None:
        self._hosts, self._run = hosts, run

    def join(self, host: str, key_file: Path, *more: str) -> subprocess.Popen[str]:
        words = [MIDWATCH, "agent", "--join", f"wss://{self._hosts.gateway}:{PORT}", "--key-file", str(key_file), *more]
        home = self._hosts.home(host)
        environment = {**self._run.environment, "HOME": str(home), "XDG_RUNTIME_DIR": str(home.parent / "run")}
        inside = self._hosts.inside(host, *words)
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(inside, env=environment, text=True, stderr=pipe, stdout=pipe, stdin=null)


def used(s: p.Snapshot) -> set[str]:
    names = {n.name for n in s.nodes if n.state == "up" and n.ranks}
    return names if s.state == "training" and s.step > 0 and s.world == len(names) else set()


def test_nodes_join_by_themselves_and_strangers_do_not(make_run: Callable[[str], Run], data: Path, hosts: Hosts) -> None:
    run, other = make_run("run"), make_run("other")
    run.start(joining(data, "2", steps=20_000))
    (other.root / "journal").mkdir(parents=True)
    pods = Pods(hosts, run)
    one = pods.join("pod-0", key(run))
    waits = run.wait(lambda s: "of at least 2 nodes ready" in s.reason, 90)
    assert "midwatch agent --join" in waits.reason

    (other.root / "recipe.toml").write_text((run.root / "recipe.toml").read_text())
    stranger = pods.join("pod-2", key(other), "--run", str(run.root))
    assert stranger.wait(30) == 2 and "is of another run than the key" in stranger.communicate()[1]

    two = pods.join("pod-1", key(run, "pod-1"))
    run.wait(lambda s: used(s) == {"pod-0", "pod-1"}, 60)
    run.done("stop")
    assert one.wait(30) == two.wait(30) == 0, "they leave when the run is over"


@pytest.mark.soak
def test_nodes_come_and_go_and_none_takes_anothers_place(run: Run, data: Path, hosts: Hosts) -> None:
    run.start(joining(data, "2:3", steps=20_000))
    pods = Pods(hosts, run)
    for_all = key(run)
    first, second = pods.join("pod-0", for_all), pods.join("pod-1", key(run, "pod-1"))
    run.wait(lambda s: used(s) == {"pod-0", "pod-1"}, 90)

    namesake = pods.join("pod-2", for_all, "--node", "pod-0")
    assert namesake.wait(60) == 1 and "has an agent already" in namesake.communicate()[1]
    impostor = pods.join("pod-2", key(run, "pod-1"))
    assert impostor.wait(60) == 1 and "this key is of the node pod-1" in impostor.communicate()[1]
    assert used(run.snapshot()) == {"pod-0", "pod-1"}

    hosts.kill("pod-0")
    first.wait()
    run.wait(lambda s: "1 of at least 2 nodes ready" in s.reason and "pod-0" in s.reason, 60)
    third = pods.join("pod-2", for_all)
    went_on = run.wait(lambda s: used(s) == {"pod-1", "pod-2"}, 60)
    run.wait_step(went_on.step + 5)
    steps = [row.step for row in run.rows("train/loss")]
    assert steps == list(range(1, len(steps) + 1))
    run.done("stop")
    assert second.wait(30) == third.wait(30) == 0, "they leave when the run is over"
    hosts.restart("pod-0")


@pytest.mark.soak
def test_a_node_finds_the_next_controller_where_the_last_has_died(run: Run, data: Path, hosts: Hosts) -> None:
    run.start(joining(data, "1", steps=20_000))
    pods = Pods(hosts, run)
    pod = pods.join("pod-1", key(run))
    before = run.wait(lambda s: used(s) == {"pod-1"}, 90)
    run.kill(run.controller())
    time.sleep(1)
    after = run.wait(lambda s: s.term > before.term and s.step > before.step + 5, 60)
    assert after.generation == before.generation, "the ranks trained on"
    run.done("stop")
    assert pod.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--join", "http://x:1", "--key-file", "/nowhere"], "must be wss://HOST:PORT"),
        (["--join", "wss://x", "--key-file", "/nowhere"], "must be wss://HOST:PORT"),
        (["--join", "wss://x:1", "--key-file", "/nowhere"], "the key cannot be read"),
        (["--join", "wss://x:1", "--key-file", "/etc/hostname"], "key"),
    ],
)
def test_what_is_wrong_is_said_at_once(run: Run, words: list[str], says: str) -> None:
    done = run.midwatch("agent", *words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert re.fullmatch(r"midwatch: .*\n", done.stderr), "one line"
