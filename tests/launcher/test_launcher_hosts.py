"""Host lists and the bounds on the number of nodes."""

from __future__ import annotations

import pytest

from midwatch.recipe import Cluster
from midwatch.recipe.hosts import expand


@pytest.mark.parametrize(
    ("patterns", "hosts"),
    [
        (("a",), ("a",)),
        (("gpu-[01-03]",), ("gpu-01", "gpu-02", "gpu-03")),
        (("r[1-2]n[8-10,12]",), ("r1n8", "r1n9", "r1n10", "r1n12", "r2n8", "r2n9", "r2n10", "r2n12")),
        (("a,b[2,4]", "me@c.example.org"), ("a", "b2", "b4", "me@c.example.org")),
    ],
)
def test_a_pattern_names_its_hosts(patterns: tuple[str, ...], hosts: tuple[str, ...]) -> None:
    assert expand(patterns) == hosts


@pytest.mark.parametrize(
    "pattern", ["", "a b", "-oProxyCommand=x", "gpu-[1-", "gpu-[b-c]", "gpu-[3-1]", "gpu-[]", "a,a", "n[0-999999999]"]
)
def test_a_pattern_that_names_none_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        expand((pattern,))


@pytest.mark.parametrize(
    ("cluster", "key"),
    [
        (Cluster(backend="ssh"), "hosts"),
        (Cluster(backend="ssh", hosts=("a",), nodes=2), "nodes"),
        (Cluster(backend="ssh", hosts=("a", "b"), nodes="2:1"), "nodes"),
        (Cluster(backend="ssh", hosts=("a", "b"), nodes="two"), "nodes"),
        (Cluster(nodes=2), "nodes"),
        (Cluster(hosts=("a",)), "hosts"),
        (Cluster(port=-1), "port"),
    ],
)
def test_what_cannot_be_is_said_of_its_key(cluster: Cluster, key: str) -> None:
    assert [k for k, _ in cluster.problems()] == [key]


def test_the_bounds_default_to_all_hosts() -> None:
    cluster = Cluster(backend="ssh", hosts=("n[1-4]",))
    assert (cluster.fewest_nodes, cluster.most_nodes, cluster.problems()) == (4, 4, [])
    some = Cluster(backend="ssh", hosts=("n[1-4]",), nodes="2:3")
    assert (some.fewest_nodes, some.most_nodes) == (2, 3)
