"""Each accepted command ends, whatever the run turns into while the command waits or is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher_desk import Desk, InstantData, desk_at

from launcher.controller.core.data_build import BuildError
from midwatch import protocol as p
from midwatch.commands import BY_VERB, VERBS, Doing

At = Callable[..., Any]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "golden": {"checkpoint": "a"},
    "ungolden": {"checkpoint": "a"},
    "rollback": {"checkpoint": "a"},
    "set": {"key": "lr", "value": 0.01},
    "cancel": {"id": "nobody"},
    "node-drain": {"node": "node"},
    "node-add": {"node": "node"},
    "node-quarantine": {"node": "node"},
}
ENDS: dict[p.State, tuple[str, ...]] = {
    "building": ("failed",),
    "starting": ("failed",),
    "training": ("failed", "finished", "released", "stopped"),
    "paused": ("failed", "finished", "released", "stopped"),
    "recovering": ("failed",),
}
CASES = [(verb, state, end) for verb in VERBS for state, ends in ENDS.items() for end in ends]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> At:
    return lambda state=None, **more: desk_at(tmp_path / "run", monkeypatch, state, **more)


async def turn(desk: Desk, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends so, with nobody answering an order."""
    if end != "failed":
        desk.says(p.Ended(cause=end, step=25))  # type: ignore[arg-type]
        return
    if desk.ledger.state == "building":

        async def fails(self: InstantData) -> None:
            await self.done.wait()
            raise BuildError("no room")

        monkeypatch.setattr(InstantData, "ensure", fails)
        work = desk.generations._work
        assert work is not None
        work.cancel()
        desk.generations._work = None
        desk.generations.begin("start")
        InstantData.done.set()
    for _ in range(5):
        before = len(desk.starts)
        if desk.ledger.generation_live:
            desk.ranks_die()
        await desk.until(lambda before=before: desk.ledger.state in ("failed", "released") or len(desk.starts) > before)  # type: ignore[misc]
        if desk.ledger.state in ("failed", "released"):
            return


@pytest.mark.parametrize(("verb", "state", "end"), CASES, ids=["-".join(case) for case in CASES])
async def test_each_command_ends_whatever_the_run_turns_into(
    verb: p.Verb, state: p.State, end: str, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at(state) as desk:
        command = desk.give(verb, **ARGUMENTS.get(verb, {}))
        if BY_VERB[verb].states[state][0] is Doing.NOW and state in ("training", "paused"):
            await desk.until(lambda: desk.view(command).state != "queued")
        with contextlib.suppress(AssertionError):  # a rollback that shapes the next start has had it begun
            await turn(desk, end, monkeypatch)
        await desk.until(lambda: desk.view(command).state not in ("queued", "sent"), 3)
        view = desk.view(command)
        assert view.state in ("done", "cancelled") or view.reason, "it says why"


async def test_a_stop_that_waits_while_the_start_fails_is_done_and_the_failure_is_still_told(at: At) -> None:
    async with at("starting") as desk:
        stop = desk.give("stop")
        assert desk.view(stop).state == "queued"
        for starts in (2, 3):
            desk.ranks_die("no such interface")
            await desk.until(lambda starts=starts: len(desk.starts) == starts or desk.ledger.state in ("failed", "released"))  # type: ignore[misc]
            if desk.ledger.state != "recovering":
                break
        await desk.until(lambda: desk.view(stop).state == "done")
        assert desk.ledger.state == "released"


async def test_a_stop_of_a_run_whose_nodes_do_not_come_does_not_wait_for_them(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at("building") as desk:
        monkeypatch.setattr(desk.backend, "came", lambda: None)
        monkeypatch.setattr("launcher.controller.supervision.node_pool.PART_SECONDS", 0.2)
        InstantData.done.set()
        await desk.until(lambda: desk.ledger.state == "starting")
        stop = desk.give("stop")
        await desk.until(lambda: desk.view(stop).state == "done")
        assert desk.ledger.state == "released"
