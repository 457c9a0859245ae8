"""Who is to blame for the end of a generation, by what its nodes tell."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from launcher.controller.supervision.failure_attribution import Failure, first_failure, only_victims
from midwatch import protocol as p
from midwatch.transport.addresses import interface_problem

GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:40022"
NCCL = "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error"


def ended(*exits: p.RankExit, **more: Any) -> p.RanksEnded:
    return p.RanksEnded(generation=1, ok=False, exits=exits, **more)


def test_the_first_rank_to_fail_is_named_with_its_signal_or_status() -> None:
    def first(**told: p.RanksEnded) -> tuple[str, str, bool]:
        failure = first_failure(told)
        return failure.node, failure.reason, failure.hard

    killed, error = p.RankExit(1, -9), p.RankExit(0, 3, "out of memory")
    assert first(a=ended(killed, p.RankExit(0, 1, "victim"))) == ("a", "rank 1 was killed by signal 9", True)
    assert first(a=ended(error)) == ("a", "rank 0 ended with status 3: out of memory", False)
    assert first(a=ended())[1] == ""
    assert first(a=ended(p.RankExit(0, 1, "victim")), b=ended(p.RankExit(2, -11))) == (
        "b",
        "rank 2 was killed by signal 11 (on b)",
        True,
    )


@pytest.mark.parametrize("message", [GLOO, NCCL, "torch.distributed.DistNetworkError: failed to recv, got 0 bytes"])
def test_a_node_that_is_gone_comes_before_the_broken_connections_of_the_others(message: str) -> None:
    told = {"n1": ended(p.RankExit(0, 1, message))}
    assert only_victims(told)
    assert first_failure(told, {"n2": "the agent of n2 died"}) == Failure("n2", "the agent of n2 died", hard=True)
    aborted = {"n1": ended(p.RankExit(0, -6))}  # by the watchdog of NCCL
    assert only_victims(aborted) and first_failure(aborted, {"n2": "the agent of n2 died"}).node == "n2"
    other = {"n1": ended(p.RankExit(0, 1, message)), "n3": ended(p.RankExit(4, 1, "ValueError: no such column"))}
    assert not only_victims(other)
    assert first_failure(other).reason == "rank 4 ended with status 1: ValueError: no such column (on n3)"


def test_an_error_of_its_own_comes_before_a_node_that_went_at_the_same_time() -> None:
    told = {"n1": ended(p.RankExit(0, 1, "ValueError: no such column"))}
    assert first_failure(told, {"n2": "the connection to the agent of n2 broke"}).node == "n1"


def test_what_hits_all_nodes_at_once_is_nobodys_failure() -> None:
    told = {"n1": ended(p.RankExit(0, -10)), "n2": ended(p.RankExit(1, -10))}
    failure = first_failure(told)
    assert not failure.hard and failure.reason.startswith("rank 0 was killed by signal 10") and "every node" in failure.reason
    assert first_failure({"n1": ended(p.RankExit(0, -9)), "n2": ended(p.RankExit(1, -10))}).hard
    assert not first_failure({}, {"n1": "the agent of n1 died", "n2": "the agent of n2 died"}).hard
    assert first_failure({"n1": ended(p.RankExit(0, -10)), "n2": ended(p.RankExit(1, 1, GLOO))}).hard


def test_what_every_start_would_end_in_is_certain() -> None:
    wrong = p.RankExit(1, p.CERTAIN_STATUS, "tensor 'x' is float32 [4], the model's is float32 [8]")
    failure = first_failure({"n1": ended(p.RankExit(0, 1, GLOO), wrong)})
    assert failure.certain and "tensor 'x'" in failure.reason
    assert first_failure({"n1": ended(reason="GLOO_SOCKET_IFNAME=eth9 names no interface", certain=True)}).certain
    assert not first_failure({"n1": ended(p.RankExit(0, 1, "ValueError"))}).certain


def test_an_interface_that_is_not_there_is_named() -> None:
    known = next(iter(psutil.net_if_addrs()))
    problem = interface_problem({"GLOO_SOCKET_IFNAME": f"{known},eth99"}, nccl=False)
    assert "GLOO_SOCKET_IFNAME" in problem and "eth99" in problem and known in problem
    assert interface_problem({"GLOO_SOCKET_IFNAME": known, "NCCL_SOCKET_IFNAME": "eth99"}, nccl=False) == ""
    assert "NCCL_SOCKET_IFNAME" in interface_problem({"NCCL_SOCKET_IFNAME": "=eth"}, nccl=True)
    for value in (known[:1], f"={known}", "^eth99", "^docker"):
        assert interface_problem({"NCCL_SOCKET_IFNAME": value}, nccl=True) == "", value
