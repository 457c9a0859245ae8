"""A run over several hosts: gathered over ssh, shrunk when one is lost, grown when one comes, steered node by node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from midwatch import protocol as p
from midwatch.journal import entries as j
from tests.system.harness import Run, recipe_text
from tests.system.hosts import Hosts, require

NAMES = ("gpu-1", "gpu-2", "gpu-3")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require()
    with Hosts(NAMES, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def spread(hosts: Hosts, text: str, nodes: str, quarantine_after: int = 3) -> str:
    """The recipe, over the hosts, with a rank on each."""
    options = ", ".join(f'"{o}"' for o in hosts.options)
    cluster = f'backend = "ssh"\nhosts = ["gpu-[1-3]"]\nnodes = "{nodes}"\nquarantine_after = {quarantine_after}\n'
    return text.replace(
        "ranks_per_node = 2", f"{cluster}ssh_options = [{options}]\nranks_per_node = 1\nenv = {{ API_TOKEN = 'x' }}"
    )


def used(s: p.Snapshot) -> set[str]:
    """The nodes whose ranks train."""
    names = {n.name for n in s.nodes if n.state == "up" and n.ranks}
    return names if s.state == "training" and s.step > 0 and s.world == len(names) else set()


@pytest.mark.soak  # what it does shorter tests do in parts
def test_a_run_over_hosts_shrinks_and_grows_and_takes_each_sample_once(run: Run, data: Path, hosts: Hosts) -> None:
    run.start(spread(hosts, recipe_text(data, steps=20_000, every=20), "1:2"))
    first = run.wait(lambda s: len(used(s)) == 2 and any(n.state == "spare" for n in s.nodes), 90)
    spare = next(n.name for n in first.nodes if n.state == "spare")
    one, two = used(first)
    environment = next(e for _, e in run.entries() if isinstance(e, j.RanksEnvironment)).environment
    assert environment["API_TOKEN"] == "***" and environment["GLOO_SOCKET_IFNAME"]
    run.wait_step(first.step + 25)

    hosts.kill(two)
    began = time.monotonic()
    after = run.wait(lambda s: used(s) == {one, spare}, 60)
    print(f"node killed: the others step again after {time.monotonic() - began:.1f} s")
    assert after.generation == first.generation + 1

    hosts.kill(spare)
    run.wait(lambda s: used(s) == {one}, 60)
    hosts.restart(two)
    began = time.monotonic()
    grown = run.wait(lambda s: used(s) == {one, two}, 60)
    print(f"node back: in the run after {time.monotonic() - began:.1f} s")
    assert any(isinstance(e, j.GenerationEnded) and e.cause == "regrouped" for _, e in run.entries())
    run.wait_step(grown.step + 10)
    steps = [row.step for row in run.rows("train/loss")]
    assert steps == list(range(1, len(steps) + 1)), "along the line in force no step is missing and none is twice"
    hosts.restart(spare)
    run.done("stop")


@pytest.mark.soak
def test_a_model_laid_over_ranks_shrinks_and_grows_by_whole_copies_of_itself(
    make_run: Callable[[str], Run], data: Path, hosts: Hosts
) -> None:
    """Two halves of the layers, and two ranks share each row: four ranks hold a copy, and of three nodes of two ranks two train."""
    run, plain = make_run("mesh"), recipe_text(data, steps=20_000, every=20).replace("num_layers = 1", "num_layers = 2")
    text = spread(hosts, plain, "1:3").replace("ranks_per_node = 1", "ranks_per_node = 2")
    text = text.replace("[checkpoint]", "[parallel]\npipeline = 2\n[checkpoint]").replace(
        "context = ", "context_parallel = 2\ncontext = "
    )
    run.start(text)

    def two(s: p.Snapshot) -> set[str]:
        return {n.name for n in s.nodes if n.state == "up" and n.ranks} if s.state == "training" and s.world == 4 else set()

    first = run.wait(lambda s: len(two(s)) == 2 and s.step > 0 and any(n.state == "spare" for n in s.nodes), 120)
    spare = next(n.name for n in first.nodes if n.state == "spare")
    lost = sorted(two(first))[1]
    run.wait_step(first.step + 25)
    hosts.kill(lost)
    after = run.wait(lambda s: spare in two(s) and lost not in two(s), 90)
    assert after.generation == first.generation + 1
    run.wait_step(max(60, after.step + 10))
    rows = {row.step: row.value for row in run.rows("train/loss")}
    hosts.restart(lost)
    run.done("stop")

    quiet = make_run("whole")
    quiet.start(plain)
    quiet.wait_step(60)
    assert {row.step: row.value for row in quiet.rows("train/loss") if row.step <= 60} == pytest.approx(
        {at: value for at, value in rows.items() if at <= 60}, abs=2e-3
    )


@pytest.mark.soak
def test_nodes_are_drained_added_and_quarantined_by_command(run: Run, data: Path, hosts: Hosts) -> None:
    run.start(spread(hosts, recipe_text(data, steps=20_000, every=20), "2"))
    first = run.wait(lambda s: len(used(s)) == 2 and any(n.state == "spare" for n in s.nodes), 90)
    spare = next(n.name for n in first.nodes if n.state == "spare")
    one, two = used(first)
    view = run.done("node-drain", node=two)
    after = run.wait(lambda s: used(s) == {one, spare}, 60)
    assert after.step >= (view.step or 0) and after.lineage == first.lineage, "a drain repeats no step"
    assert next(n.state for n in after.nodes if n.name == two) == "drained"
    assert run.command("node-drain", node=one).state == "refused", "two are needed"
    run.done("node-add", node=two)
    run.wait(lambda s: next(n.state for n in s.nodes if n.name == two) == "spare", 30)
    run.done("node-quarantine", node=one)
    last = run.wait(lambda s: used(s) == {two, spare}, 60)
    assert last.lineages[-1].cause == "crash", "what a bad node has a share in is not saved"
    listed = run.midwatch("node", "list", str(run.root)).stdout
    assert "quarantined" in listed and one in listed
    run.done("stop")
