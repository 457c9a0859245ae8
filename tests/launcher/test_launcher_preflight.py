"""Nodes are looked at before a run starts on them: real hosts, real faults, and what is said of each."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from launcher.cli.check import render
from launcher.preflight.checks import NodeReport, PreflightWarning, Visit, check_nodes, compare, judge, ready, understand
from launcher.preflight.node_report import Call, Findings, Storage, look
from midwatch.recipe import Cluster, parse_recipe
from midwatch.transport.ssh import Result
from tests.system.harness import MIDWATCH, recipe_text
from tests.system.hosts import Hosts, require

ROOT = Path(__file__).parents[2]
PACKAGES = ("launcher", "midwatch", "shards", "trainer")
GIB = 1 << 30


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require()
    with Hosts(("a", "b"), tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def other_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Midwatch with one comment more."""
    copy = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "trainer" / "__init__.py").open("a") as file:
        file.write("# more\n")
    return copy


def cluster(these: Hosts, **more: Any) -> Cluster:
    return Cluster(**{"backend": "ssh", "hosts": these.names, "device": "cpu", "ssh_options": these.options, **more})


def check(these: Hosts, parent: Path, **more: Any) -> list[NodeReport]:
    recipe = msgspec.structs.replace(parse_recipe(recipe_text(parent / "data")), cluster=cluster(these, **more))
    return asyncio.run(check_nodes(recipe, parent))


def said(report: NodeReport) -> list[tuple[str, str]]:
    """What was noted, but for a disk that happens to be rather full."""
    return [(n.level, n.what) for n in report.notes if n.what != "storage" or n.level == "problem"]


def test_nodes_that_are_fine_are_found_so_and_nothing_is_left_behind(hosts: Hosts, tmp_path: Path) -> None:
    reports = check(hosts, tmp_path)
    assert [said(r) for r in reports] == [[], []]
    for report, name in zip(reports, hosts.names, strict=True):
        found = report.findings
        assert found is not None and report.skew is not None
        assert (found.host, found.python) == (name, ".".join(map(str, sys.version_info[:3])))
        assert found.call.address.startswith(f"{hosts.gateway}:")
        assert abs(report.skew) < 0.5
        assert found.storage.free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert ready(reports, 2)
    assert list(tmp_path.glob(".midwatch*")) == []


def test_each_fault_is_found_where_it_is_and_says_the_way_out(hosts: Hosts, tmp_path: Path, other_code: Path) -> None:
    only_a = 'if [ "$(hostname)" = a ]; then {}; fi'
    hosts.hide("b", tmp_path)
    try:
        with socket.create_server((hosts.gateway, 0)) as busy:
            port = busy.getsockname()[1]
            change = only_a.format(f"export PYTHONPATH={other_code}")
            a, b = check(hosts, tmp_path, setup=(change,), interface="eth9", port=port)
    finally:
        hosts.show("b", tmp_path)
    assert sorted(said(a)) == [("problem", "midwatch"), ("problem", "node"), ("warning", "way back")]
    assert sorted(said(b)) == [("problem", "node"), ("problem", "storage"), ("warning", "way back")]
    texts = [note.text for note in (*a.notes, *b.notes)]
    assert "the same version of Midwatch, but other code" in texts
    assert f"{tmp_path} is there, but it is another directory than the checking machine's" in texts
    assert "there is no interface eth9 (there are: lo, eth0)" in texts
    assert f"port {port} of this machine is in use, so the nodes were asked to try another" in texts


def test_a_wrong_python_and_a_failing_setup_line_are_told(hosts: Hosts, tmp_path: Path) -> None:
    setup = ('if [ "$(hostname)" = b ]; then echo module: not known >&2; exit 7; fi',)
    a, b = check(hosts, tmp_path, python="/opt/none/bin/python", setup=setup)
    assert ([n.what for n in a.notes], [n.what for n in b.notes]) == (["python"], ["node"])
    assert "/opt/none/bin/python" in a.notes[0].text and "[cluster] python" in a.notes[0].way_out
    assert "status 7 (module: not known)" in b.notes[0].text
    assert not a.out_of_reach and not ready([a, b], 2)


def test_a_node_that_is_down_is_a_warning_only_where_enough_are_left(hosts: Hosts, tmp_path: Path) -> None:
    hosts.kill("b")
    try:
        a, b = check(hosts, tmp_path, ssh_options=("-o", "ConnectTimeout=1", *hosts.options))
    finally:
        hosts.restart("b")
    assert (said(a), b.out_of_reach, b.findings) == ([], True, None)
    assert ready([a, b], 1)
    assert not ready([a, b], 2)


def test_two_names_of_one_machine_are_one_too_many(hosts: Hosts, tmp_path: Path) -> None:
    a, again = check(hosts, tmp_path, hosts=("a", "root@a"))
    assert said(a) == []
    assert [n.text for n in again.notes if n.level == "problem"] == ["it is the same machine as a (a)"]


def test_the_command_checks_the_nodes_and_run_does_not_start_on_bad_ones(hosts: Hosts, tmp_path: Path) -> None:
    def recipe(python: str) -> str:
        file, options = tmp_path / "recipe.toml", json.dumps(hosts.options)
        lines = f'[cluster]\nbackend = "ssh"\nhosts = ["a", "b"]\nssh_options = {options}\npython = "{python}"'
        file.write_text(recipe_text(tmp_path / "data").replace("[cluster]", lines))
        return str(file)

    def midwatch(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([MIDWATCH, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    good = midwatch("check", recipe(sys.executable), "--json")
    answer = json.loads(good.stdout)
    assert (good.returncode, answer["good"], [n["host"] for n in answer["nodes"]]) == (0, True, ["a", "b"]), good.stdout
    refused = midwatch("run", recipe("/opt/none/python"), "--dir", str(tmp_path / "new" / "run"), "--detach")
    assert refused.returncode == 2
    assert "2 of 2 nodes cannot take part (a, b), and the run needs 2; to start anyway: --no-check" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "new").exists()


def test_preflight_needs_nothing_but_its_own_files(other_code: Path, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(other_code)}
    words = [
        sys.executable,
        "-S",
        "-P",
        "-m",
        "launcher.preflight.node_report",
        "--json",
        "--storage",
        str(tmp_path / "no" / "such" / "file"),
    ]
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, timeout=30)
    found = understand(Result(done.returncode, f"motd {{of the day}}\n{done.stdout}", done.stderr))
    assert isinstance(found, Findings), done.stderr
    assert (found.midwatch, found.torch, found.gpu_note) == ("", "", "nvidia-ml-py is not installed")
    assert found.storage.problem == f"{tmp_path / 'no'} is not there"
    assert done.stderr == ""


# Judging, on reports that cannot be had here: clocks that differ, GPUs


SECRET = "word"


@pytest.fixture(scope="module")
def here() -> Findings:
    return look()


@pytest.fixture
def node(here: Findings, tmp_path: Path) -> Findings:
    (tmp_path / "seen").write_text(SECRET)
    storage = Storage(read=SECRET, wrote="seen", free=100 * GIB)
    return replace(here, torch="2.13.0", storage=storage, call=Call("here:1", "", SECRET, 100.0, 100.0, 100.0))


@pytest.mark.parametrize(
    ("before", "theirs", "after", "level"),
    [
        (100.0, 100.0, 100.1, None),
        (100.0, 98.5, 100.1, "warning"),
        (100.0, 103.0, 100.1, "warning"),
        (100.0, 94.0, 100.1, "problem"),
        (100.0, 110.0, 100.1, "problem"),
        (100.0, 106.0, 112.0, None),
    ],
)
def test_a_clock_is_judged_by_what_the_way_there_and_back_cannot_explain(
    here: Findings, node: Findings, tmp_path: Path, before: float, theirs: float, after: float, level: str | None
) -> None:
    visit = Visit("n", replace(node, call=Call("here:1", "", SECRET, before, theirs, after)))
    report = judge(visit, Cluster(), here, SECRET, tmp_path)
    assert report.skew == pytest.approx((before + after) / 2 - theirs)
    assert next((n.level for n in report.notes if n.what == "clock"), None) == level


def test_a_clock_is_judged_by_ssh_alone_where_there_is_no_way_back(here: Findings, node: Findings, tmp_path: Path) -> None:
    cut = replace(node, call=Call(problem="10.0.0.1:1 does not answer"), clock=1000.0)
    fine = judge(Visit("n", cut, left=999.0, back=1002.0), Cluster(), here, SECRET, tmp_path)
    assert [n.what for n in fine.notes] == ["way back"]
    late = judge(Visit("n", cut, left=1007.0, back=1009.0), Cluster(), here, SECRET, tmp_path)
    assert [(n.level, n.what) for n in late.notes] == [("problem", "way back"), ("problem", "clock")]
    assert "7.0 s behind" in late.notes[1].text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"python": "3.9.1"}, ("problem", "python")),
        ({"midwatch": "0.0.9"}, ("problem", "midwatch")),
        ({"lacking": ("msgspec",)}, ("problem", "midwatch")),
        ({"torch": ""}, ("problem", "torch")),
        ({"uid": 4711}, ("warning", "node")),
        ({"storage": Storage(read="else", free=100 * GIB)}, ("problem", "storage")),
        ({"storage": Storage(read=SECRET, wrote="unseen", free=100 * GIB)}, ("problem", "storage")),
        ({"storage": Storage(read=SECRET, wrote="seen", free=5 * GIB)}, ("warning", "storage")),
        ({"storage": Storage(read=SECRET, wrote="seen", free=GIB // 2)}, ("problem", "storage")),
        ({"call": Call("there:1", "", "else", 1.0, 1.0, 1.0)}, ("problem", "way back")),
    ],
)
def test_each_finding_is_judged(
    here: Findings, node: Findings, tmp_path: Path, changes: dict[str, Any], expected: tuple[str, str]
) -> None:
    report = judge(Visit("n", replace(node, **changes)), Cluster(), here, SECRET, tmp_path)
    assert [(n.level, n.what) for n in report.notes] == [expected]


def test_nodes_are_compared_in_their_gpus_and_torch(here: Findings, node: Findings) -> None:
    gpus = [("NVIDIA H200",) * n for n in (8, 8, 7, 0)]
    found = [replace(node, gpus=g, machine=str(i), gpu_note="" if g else "no driver") for i, g in enumerate(gpus)]
    found[1] = replace(found[1], torch="2.12.0")
    reports = [NodeReport(f"n{i}", each) for i, each in enumerate(found)]

    def notes(**more: Any) -> list[list[tuple[str, str]]]:
        judged = compare(reports, Cluster(**more), replace(here, torch=""))
        return [[(n.level, n.what) for n in r.notes] for r in judged]

    other = ("problem", "torch")
    assert notes(device="cpu", ranks_per_node=8) == [[], [other], [], []]
    assert notes(device="cuda", ranks_per_node=8) == [[], [other], [("problem", "gpus")], [("problem", "gpus")]]
    assert notes(device="auto", ranks_per_node=4) == [[], [other], [("warning", "gpus")], [("problem", "gpus")]]


def shown(reports: list[NodeReport], width: int = 80) -> str:
    out = io.StringIO()
    render(reports, Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


def test_the_table_fits_80_columns_and_marks_what_is_wrong_without_colour(node: Findings) -> None:
    node = replace(node, torch="2.13.0+cu128", gpus=("NVIDIA H200",) * 8)
    missing = PreflightWarning("problem", "gpus", "7 GPUs, and 8 ranks want one each", "see nvidia-smi there")
    down = PreflightWarning(
        "problem", "reach", "it does not answer; is it up? (ssh: connect to host gpu-03 port 22: Connection timed out)"
    )
    reports = [
        NodeReport("gpu-01", node, 0.0),
        NodeReport("gpu-02", replace(node, gpus=("NVIDIA H200",) * 7), 0.01, notes=(missing,)),
        NodeReport("gpu-03", out_of_reach=True, notes=(down,)),
    ]
    text = shown(reports)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[:2] == ["gpu-01", "fine"] and "!" not in lines[1]
    assert lines[2].split()[:2] == ["gpu-02", "wrong"] and "7 H200 !" in lines[2]
    assert lines[3].startswith("gpu-03  out of reach")
    assert "wrong: gpu-02: 7 GPUs, and 8 ranks want one each" in lines
    assert "    see nvidia-smi there" in lines
    assert any(line.startswith("out of reach: gpu-03: it does not answer") for line in lines)


def test_many_nodes_that_are_fine_are_one_line(node: Findings) -> None:
    note = PreflightWarning("warning", "gpus", "7 GPUs, and most nodes have 8", "see nvidia-smi there")
    reports = [NodeReport(f"gpu-{i:03d}", node, 0.0, notes=(note,) if i % 10 == 0 else ()) for i in range(100)]
    lines = shown(reports).splitlines()
    assert [line.split()[0] for line in lines[1:11]] == [f"gpu-{i:03d}" for i in range(0, 100, 10)]
    assert lines[-1].strip() == "90 of 100 nodes are fine"
    assert "gpu-000, gpu-010, gpu-020, gpu-030, gpu-040 and 5 more" in " ".join(" ".join(lines).split())
    fine = shown([NodeReport(f"gpu-{i:03d}", node, 0.0) for i in range(100)])
    assert fine.strip() == "100 of 100 nodes are fine"


def test_a_full_directory_for_sockets_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node, and on the machine that checks, whatever the backend."""
    place = Path(tempfile.mkdtemp(prefix="mw-"))  # a socket's path must be short
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
        found = look()
        assert "cannot be written (No space left on device)" in found.runtime
        report = judge(Visit("a", found), Cluster(), found, "", tmp_path / "seen" / "x")
        assert any(note.what == "node" and "No space left" in note.text for note in report.notes)
        recipe = tmp_path / "r.toml"
        recipe.write_text(recipe_text(tmp_path / "data"))
        done = subprocess.run([MIDWATCH, "check", str(recipe)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "No space left" in done.stderr and "XDG_RUNTIME_DIR" in done.stderr, done
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        assert look().runtime == ""
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()
