"""The boundary by itself, on one rank: what it remembers of the commands of a long generation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from midwatch.commands.orders import OPS
from midwatch.protocol import Op, Order, Outcome, RankBody
from trainer.control import boundary as module
from trainer.control.boundary import Boundary
from trainer.control.reporting import NoLink
from trainer.distributed.mesh import World
from trainer.loop.apply_command import HANDLERS


class Orders(NoLink):
    """A link that gives what is put into it."""

    def __init__(self) -> None:
        self.waiting: list[Order] = []
        self.told: list[RankBody] = []

    def send(self, body: RankBody) -> None:
        self.told.append(body)

    def next_order(self) -> Order | None:
        return self.waiting.pop(0) if self.waiting else None


@pytest.fixture
def alone() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    yield World(0, 1, torch.device("cpu"), mesh, mesh, group, group)
    dist.destroy_process_group()


def test_a_long_generation_remembers_its_newest_commands_and_applies_none_twice(alone: World) -> None:
    link, asked = Orders(), []
    boundary = Boundary(alone, link, 0, lambda: 7, lambda what: None, lambda: None)
    boundary.ask = asked.append
    count = 3 * module.REMEMBERED
    for number in range(1, count + 1):
        link.waiting.append(Order(number=number, op=Op.SET, arguments={"key": "max_grad_norm", "value": float(number)}))
        order = boundary.next()
        assert order is not None and order.arguments["value"] == number
        if number % 2:
            boundary.settle(order, ok=True)
        else:
            boundary.acknowledge(order)
    link.told.clear()
    for number in (1, 2, count // 2, count - 1, count):
        link.waiting.append(Order(number=number, op=Op.SET))
        assert boundary.next() is None
    assert link.told == [Outcome(number=count - 1, ok=True, step=7)], "old ones the controller has long had answered"
    assert asked == [count], "its outcome is another's to tell"
    assert len(boundary._outcomes) == module.REMEMBERED


def test_a_held_run_waits_and_goes_on_by_itself_unless_an_operator_has_paused_it(alone: World) -> None:
    link = Orders()
    changes: list[str] = []

    def looked() -> None:
        """The controller says that it can journal again, or an operator resumes, while the run waits."""
        if boundary.paused and not link.waiting and answers:
            link.waiting.append(answers.pop(0))

    boundary = Boundary(alone, link, 0, lambda: 7, changes.append, looked)
    hold, unhold = Order(number=0, op=Op.HOLD), Order(number=0, op=Op.UNHOLD)
    answers = [hold, unhold]
    link.waiting.append(hold)
    assert boundary.next() is None
    assert (changes, answers, link.told) == (["paused", "resumed"], [], []), "it is no command and has no outcome"

    changes.clear()
    answers = [hold, unhold, Order(number=2, op=Op.RESUME)]
    link.waiting.append(Order(number=1, op=Op.PAUSE))
    assert boundary.next() is None
    assert (changes, answers) == (["paused", "resumed"], []), "the operator's pause outlasts the hold"

    changes.clear()
    link.waiting.append(unhold)
    assert boundary.next() is None
    assert changes == []


def test_the_ranks_carry_out_every_order_that_they_can_be_sent() -> None:
    by_boundary = set(module._AT_ONCE) - {Op.HOLD, Op.UNHOLD}  # those two are no commands
    assert not set(HANDLERS) & by_boundary
    assert set(OPS.values()) == set(HANDLERS) | by_boundary
