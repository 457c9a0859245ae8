"""Commands: each does in each state what the table says, takes effect once, and survives the controller that took it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import pytest
from launcher_desk import NODE, Desk, InstantData, desk_at, make_recipe, write_checkpoint

from launcher.controller.core.snapshot import SnapshotBuilder
from launcher.controller.supervision import node_pool as pool_module
from midwatch import protocol as p
from midwatch.checkpoint_format import verify
from midwatch.commands import BY_VERB, SPECS, STATES, VERBS, Doing, check_arguments, describe
from midwatch.commands.orders import OPS
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError
from midwatch.recipe import Watch

At = Callable[..., Any]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "golden": {"checkpoint": "a"},
    "ungolden": {"checkpoint": "a"},
    "rollback": {"checkpoint": "a", "skip": 3, "lr_scale": 0.5},
    "set": {"key": "lr", "value": 0.01},
    "cancel": {"id": "nobody"},
    "acknowledge": {"alarm": "spike"},
}
ENDS: dict[str, Literal["stopped", "stopped-now", "released"]] = {
    "stop": "stopped",
    "stop-now": "stopped-now",
    "release": "released",
}
NODE_VERBS = [verb for verb in VERBS if verb.startswith("node-")]
CELLS = [(verb, state) for verb in VERBS for state in STATES if verb not in NODE_VERBS]
NODE_CELLS = [(verb, state) for verb in NODE_VERBS for state in STATES]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> At:
    return lambda state=None, **more: desk_at(tmp_path / "run", monkeypatch, state, **more)


@pytest.mark.parametrize(("verb", "state"), CELLS, ids=[f"{v}-{s}" for v, s in CELLS])
async def test_each_command_does_in_each_state_what_the_table_says(verb: p.Verb, state: p.State, at: At) -> None:
    doing, why = BY_VERB[verb].states[state]
    async with at(state) as desk:
        desk.rank.clear()
        starts = len(desk.starts)
        command = desk.give(verb, **ARGUMENTS.get(verb, {}))
        if doing is Doing.REFUSE:
            assert (desk.view(command).state, desk.view(command).reason) == ("refused", why)
            assert not desk.orders
        elif doing is Doing.QUEUE or (verb == "set" and state == "recovering"):
            await asyncio.sleep(0.02)
            assert desk.view(command).state == "queued"
            assert not desk.orders
            if state == "building":
                await desk.to("starting")
            else:
                desk.rank_comes()
                if verb == "rollback":
                    desk.saves("a", 10)
                desk.phase("training", 10)
                await desk.until(lambda: desk.orders)
                assert desk.orders[-1].op == OPS[verb]
        elif doing is Doing.SHAPE:
            await shaped(desk, verb, command, starts)
        elif verb in ("golden", "ungolden"):
            known = "a" in desk.ledger.checkpoints
            assert desk.view(command).state == ("done" if known else "refused")
            assert not known or desk.ledger.checkpoints["a"].golden == (verb == "golden")
        elif verb == "cancel":
            assert desk.view(command).state == "refused"
            assert "nobody" in desk.view(command).reason
        elif verb == "acknowledge":
            assert desk.view(command).state == "refused"
            assert "no unacknowledged alarm 'spike'" in desk.view(command).reason
        elif state in ("training", "paused"):
            await desk.until(lambda: desk.orders)
            assert (desk.orders[-1].number, desk.orders[-1].op) == (command.number, OPS[verb])
            assert desk.view(command).state == "sent"
            desk.answers(desk.orders[-1], step=25)
            if verb in ENDS:
                assert desk.view(command).state == "sent", "the ranks are still there"
                desk.says(p.Ended(cause=ENDS[verb], step=25))
                await desk.until(lambda: desk.view(command).state == "done")
            assert desk.view(command).state == "done"
            assert desk.view(command).step == 25
        else:
            await closed(desk, command)


@pytest.mark.parametrize(("verb", "state"), NODE_CELLS, ids=[f"{v}-{s}" for v, s in NODE_CELLS])
async def test_each_command_on_a_node_does_in_each_state_what_the_table_says(verb: p.Verb, state: p.State, at: At) -> None:
    doing, why = BY_VERB[verb].states[state]
    mark = {"node-add": "in use", "node-drain": "drained", "node-quarantine": "quarantined"}[verb]
    async with at(state) as desk:
        desk.agent_comes(0, node="spare")
        desk.rank.clear()
        command = desk.give(verb, node=NODE)
        if doing is Doing.REFUSE:
            assert (desk.view(command).state, desk.view(command).reason) == ("refused", why)
            return
        if doing is Doing.QUEUE:
            await asyncio.sleep(0.02)
            assert desk.view(command).state == "queued"
            desk.rank_comes()
            desk.phase("training", 10)
        if verb == "node-drain" and doing is not Doing.SHAPE:
            await desk.until(lambda: desk.orders)
            assert desk.orders[-1].op == p.Op.REGROUP
            desk.answers(desk.orders[-1], step=25, checkpoint="r")
        await desk.until(lambda: desk.view(command).state == "done")
        assert desk.ledger.node(NODE).mark == mark
        if verb == "node-quarantine" and state in ("starting", "training", "paused", "recovering"):
            assert isinstance(desk.agent[-1], p.EndRanks), "what a bad node has a share in is not saved"


async def test_a_node_drained_leaves_a_checkpoint_and_another_one_takes_its_place(at: At) -> None:
    async with at("training") as desk:
        desk.agent_comes(0, node="spare")
        command = desk.give("node-drain", node=NODE)
        await desk.until(lambda: desk.orders)
        desk.saves("r", 25)
        desk.answers(desk.orders[-1], step=25, checkpoint="r")
        desk.says(p.Ended(cause="regrouped", step=25, checkpoint="r"))
        await desk.until(lambda: len(desk.starts) == 2)
        assert desk.view(command).state == "done"
        assert desk.ledger.generation_nodes == ("spare",)
        assert (desk.starts[-1].checkpoint, desk.starts[-1].lineage.id) == ("r", 1), "no step is taken twice"


async def test_the_last_node_and_one_that_nobody_knows_cannot_be_drained(at: At) -> None:
    async with at("training") as desk:
        for node, words in ((NODE, "is needed"), ("elsewhere", "there is no node")):
            command = desk.give("node-drain", node=node)
            await desk.until(lambda command=command: desk.view(command).state == "refused")  # type: ignore[misc]
            assert words in desk.view(command).reason


async def shaped(desk: Desk, verb: str, command: p.CommandView, starts: int) -> None:
    """Without ranks: done at once, or, a resume, when there are ranks; and the next start goes by it."""
    await desk.until(lambda: desk.view(command).state == ("sent" if verb == "resume" else "done"))
    if desk.ledger.generation_live:
        desk.ranks_die("ended")
    if desk.ledger.state == "released" and verb != "resume":
        desk.give("resume")
    if verb == "set" and desk.ledger.state == "failed":
        desk.give("resume")
    await desk.until(lambda: len(desk.starts) > starts)
    start = desk.starts[-1]
    if verb == "rollback":
        assert (start.checkpoint, start.skip, start.lr_scale) == ("a", 3, 0.5)
        assert start.lineage.cause == "rollback"
    elif verb == "set":
        assert [(r.key, r.value) for r in start.replays] == [("lr", 0.01)]
    assert start.applied >= command.number or verb == "resume"
    await desk.trains()
    assert desk.view(command).state == "done"
    assert not desk.orders, "nothing is left to order"


async def closed(desk: Desk, command: p.CommandView) -> None:
    """stop and stop-now without ranks that could obey."""
    await desk.until(lambda: desk.view(command).state == "done" or any(isinstance(m, p.EndRanks) for m in desk.agent))
    if desk.ledger.generation_live:
        desk.ranks_die("ended by the controller")
    await desk.until(lambda: desk.view(command).state == "done")
    assert desk.ledger.state == "released"
    assert any(isinstance(m, p.Leave) for m in desk.agent) or not desk.starts


@pytest.mark.parametrize("number", [0, 1])
async def test_a_command_sent_twice_takes_effect_once(number: int, at: At) -> None:
    async with at("training") as desk:
        first = desk.give("checkpoint", command_id="same")
        if number:
            await desk.until(lambda: desk.orders)
        again = desk.give("checkpoint", command_id="same")
        assert again.number == first.number
        await desk.until(lambda: desk.orders)
        await asyncio.sleep(0.02)
        assert len(desk.orders) == 1
        desk.saves("c", 25, numbers=(first.number,))
        assert desk.give("checkpoint", command_id="same").state == "done"


async def test_orders_are_numbered_upwards_and_sent_one_after_the_other(at: At) -> None:
    async with at("training") as desk:
        given = [desk.give("set", key="lr", value=v) for v in (0.1, 0.2, 0.3)]
        for count, view in enumerate(given, 1):
            await desk.until(lambda: len(desk.orders) == count)  # noqa: B023
            await asyncio.sleep(0.01)
            assert [o.number for o in desk.orders] == [v.number for v in given[:count]]
            desk.answers(desk.orders[-1], step=25, key="lr", old=0.0, new=view.arguments["value"])
        assert [o.number for o in desk.orders] == sorted({o.number for o in desk.orders})


async def test_a_queued_command_can_be_taken_back_and_a_sent_one_cannot(at: At) -> None:
    async with at("training") as desk:
        sent = desk.give("pause")
        await desk.until(lambda: desk.orders)
        waiting = desk.give("advance")
        assert desk.view(desk.give("cancel", id=sent.id)).state == "refused"
        done = desk.give("cancel", id=str(waiting.number), author="bob")
        assert desk.view(done).detail == {"cancelled": waiting.id}
        assert (desk.view(waiting).state, desk.view(waiting).reason) == ("cancelled", "by bob")
        desk.answers(desk.orders[-1], step=25)
        await asyncio.sleep(0.02)
        assert len(desk.orders) == 1


async def test_pause_and_resume_given_together_while_it_starts_are_both_carried_out(at: At) -> None:
    async with at("starting") as desk:
        pause, resume = desk.give("pause"), desk.give("resume")
        await desk.trains()
        await desk.until(lambda: len(desk.orders) == 1)
        desk.answers(desk.orders[-1], step=1)
        await desk.until(lambda: len(desk.orders) == 2)
        desk.answers(desk.orders[-1], step=1)
        assert [desk.view(v).state for v in (pause, resume)] == ["done", "done"]
        assert desk.ledger.state == "training"


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("rollback", {}, "missing"),
        ("rollback", {"checkpoint": "a", "skip": -1}, "must be at least 0"),
        ("rollback", {"checkpoint": "a", "skip": True}, "not a whole number"),
        ("rollback", {"checkpoint": "a", "lr_scale": 0}, "above 0"),
        ("rollback", {"checkpoint": "a", "lr_scale": float("nan")}, "not a finite number"),
        ("rollback", {"checkpoint": "nope"}, "there is no checkpoint"),
        ("rollback", {"checkpoint": "golden"}, "no checkpoint on this line is golden"),
        ("set", {"key": "lr", "value": "much"}, "not a number"),
        ("set", {"key": "lr", "value": -1.0}, "between"),
        ("set", {"key": "lr", "value": float("nan")}, "not a finite number"),
        ("set", {"key": "colour", "value": 1.0}, "no setting"),
        ("advance", {"to": "first"}, "no later stage"),
        ("advance", {"to": 3}, "not a text"),
        ("golden", {"checkpoint": "nope"}, "there is no checkpoint"),
        ("pause", {"hard": True}, "unknown argument"),
    ],
)
async def test_arguments_that_cannot_be_met_are_refused_with_the_reason(
    verb: str, arguments: dict[str, Any], says: str, at: At
) -> None:
    async with at("training") as desk:
        view = desk.give(verb, **arguments)
        await desk.until(lambda: desk.view(view).state == "refused")
        assert says in desk.view(view).reason
        assert not desk.orders
        assert desk.ledger.state == "training"


async def test_a_rollback_to_a_corrupted_checkpoint_is_refused_naming_the_file_and_the_run_trains_on(at: At) -> None:
    async with at("training") as desk:
        file = desk.paths.checkpoints / "a" / "data.bin"
        content = bytearray(file.read_bytes())
        content[7] ^= 1
        file.write_bytes(content)
        view = desk.give("rollback", checkpoint="a")
        await desk.until(lambda: desk.view(view).state == "refused")
        assert str(file) in desk.view(view).reason
        assert (desk.ledger.state, desk.ledger.lineage, desk.orders) == ("training", 1, [])
        assert any(isinstance(e, j.Noted) and e.level == "alarm" for _, e in desk.journal.entries)


async def test_a_rollback_that_fails_on_the_ranks_leaves_the_line_as_it_was(at: At) -> None:
    async with at("training") as desk:
        view = desk.give("rollback", checkpoint="a")
        await desk.until(lambda: desk.orders)
        assert desk.ledger.lineage == 2
        desk.answers(desk.orders[-1], ok=False, step=25, reason="the disk is gone")
        assert (desk.view(view).state, desk.view(view).reason) == ("failed", "the disk is gone")
        assert desk.ledger.lineage == 1
        again = desk.give("rollback", checkpoint="a")
        await desk.until(lambda: len(desk.orders) == 2)
        assert desk.orders[-1].arguments["lineage"]["id"] == 3
        desk.answers(desk.orders[-1], step=10)
        assert desk.view(again).state == "done"
        assert desk.context.live.step == 10


@pytest.mark.parametrize("name", ["a", "10"])
async def test_a_checkpoint_that_a_waiting_rollback_names_is_not_pruned(name: str, at: At) -> None:
    async with at("training") as desk:
        first = desk.give("pause")
        await desk.until(lambda: desk.orders)
        desk.give("rollback", checkpoint=name)
        for step in (26, 27, 28):
            desk.saves(f"c{step}", step)
        assert "a" in desk.ledger.checkpoints
        assert (desk.paths.checkpoints / "a").is_dir()
        assert "b" not in desk.ledger.checkpoints, "it is pruned as usual"
        desk.answers(desk.orders[-1], step=28)
        assert desk.view(first).state == "done"
        await desk.until(lambda: len(desk.orders) == 2)
        assert desk.orders[-1].arguments["checkpoint"] == "a"


async def test_a_checkpoint_that_is_being_verified_is_not_pruned(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at("training") as desk:
        reading, go, real = threading.Event(), threading.Event(), verify.verify

        def slowly(*words: Any) -> Any:
            reading.set()
            assert go.wait(5)
            return real(*words)

        monkeypatch.setattr(verify, "verify", slowly)
        check = asyncio.create_task(desk.term._commits.verify(desk.ledger.checkpoints["a"]))
        await desk.until(reading.is_set)
        for step in (26, 27, 28):
            desk.saves(f"c{step}", step)
        go.set()
        assert await check == ""
        desk.saves("c29", 29)
        assert "a" not in desk.ledger.checkpoints


async def test_a_rollback_to_a_checkpoint_that_was_pruned_is_refused(at: At) -> None:
    async with at("training") as desk:
        for step in (26, 27, 28):
            desk.saves(f"c{step}", step)
        view = desk.give("rollback", checkpoint="a")
        await desk.until(lambda: desk.view(view).state == "refused")
        assert "there is no checkpoint 'a'" in desk.view(view).reason
        assert "c28" in desk.view(view).reason


async def test_kept_are_goldens_stage_ends_forks_and_the_newest(at: At) -> None:
    async with at("training") as desk:
        desk.give("golden", checkpoint="a")
        desk.saves("end", 26, ended=True)
        for step in range(30, 35):
            desk.saves(f"c{step}", step)
        desk.saves("bad1", 35, suspect=True)
        desk.saves("bad2", 36, suspect=True)
        desk.saves("bad3", 37, suspect=True)
        assert set(desk.ledger.checkpoints) == {"a", "end", "c34", "bad1", "bad2", "bad3"}
        assert sorted(d.name for d in desk.paths.checkpoints.iterdir() if d.is_dir()) == ["a", "bad1", "bad2", "bad3", "c34", "end"]
        assert (desk.paths.checkpoints / "a" / "GOLDEN").exists()


# What commits a checkpoint


async def test_a_checkpoint_of_another_generation_or_with_another_manifest_is_refused(at: At) -> None:
    async with at("training") as desk:
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"generation": 7}, "generation 7"),
            ({"directory": "good1"}, "its manifest says good1"),
            ({"directory": "good2", "digest": "0" * 32}, "is not what was committed"),
            ({"directory": "../../elsewhere"}, "not a checkpoint's name"),
        ]
        for number, (changes, says) in enumerate(wrong):
            reply = desk.saves(f"good{number}", 30 + number)
            assert reply == p.Committed(id=f"good{number}")
            changed = desk.ready(f"bad{number}", 30, desk.ledger.digests[f"good{number}"])
            desk.says(msgspec.structs.replace(changed, **changes))
            answer = desk.rank[-1]
            assert isinstance(answer, p.CommitRefused)
            assert says in answer.reason


async def test_a_ready_told_twice_is_committed_once_and_answered_each_time(at: At) -> None:
    async with at("training") as desk:
        command = desk.give("checkpoint")
        await desk.until(lambda: desk.orders)
        desk.saves("c", 26, numbers=(command.number,))
        assert desk.view(command).detail == {"checkpoint": "c"}
        digest = desk.ledger.digests["c"]
        desk.says(desk.ready("c", 26, digest))
        assert desk.rank[-1] == p.Committed(id="c")
        commits = [e for _, e in desk.journal.entries if isinstance(e, j.CheckpointCommitted) and e.id == "c"]
        assert len(commits) == 1


async def test_a_checkpoint_that_could_not_be_written_fails_its_command_and_raises_an_alarm(at: At) -> None:
    async with at("training") as desk:
        command = desk.give("checkpoint")
        await desk.until(lambda: desk.orders)
        desk.says(p.CheckpointFailed(id="c", step=26, reason="No space left on device", numbers=(command.number,)))
        assert (desk.view(command).state, desk.view(command).reason) == ("failed", "No space left on device")
        assert any(isinstance(e, j.Noted) and "No space left" in e.text and e.level == "alarm" for _, e in desk.journal.entries)


# Restarts


async def test_after_a_crash_steps_are_repeated_on_a_lineage_of_their_own(at: At) -> None:
    async with at("recovering") as desk:
        start = desk.starts[-1]
        assert (start.lineage.cause, start.lineage.parent, start.lineage.fork_step) == ("crash", 1, 20)
        assert (start.checkpoint, start.generation) == ("b", 2)


@pytest.mark.parametrize("way", ["stop-now", "failed"])
async def test_no_step_is_taken_twice_on_a_lineage_however_the_run_ended(way: str, at: At) -> None:
    recipe = make_recipe(restarts=0)
    async with at("training", recipe=recipe) as desk:
        if way == "stop-now":
            desk.give("stop-now")
            desk.answers(desk.orders[-1], step=25)
            desk.says(p.Ended(cause="stopped-now", step=25))
            desk.backend.living = False
        else:
            desk.ranks_die()
        assert desk.ledger.state in ("released", "failed")
        desk.give("resume")
        await desk.until(lambda: len(desk.starts) == 2)
        start = desk.starts[-1]
        assert start.checkpoint == "b"
        assert (start.lineage.id, start.lineage.fork_step) == (2, 20)


async def test_going_on_after_a_stop_with_a_checkpoint_stays_on_the_lineage(at: At) -> None:
    async with at("released") as desk:
        desk.give("resume")
        await desk.until(lambda: len(desk.starts) == 2)
        assert (desk.starts[-1].lineage.id, desk.starts[-1].checkpoint) == (1, "r")


async def test_a_controller_that_a_stopped_run_is_resumed_on_stays_for_it(at: At) -> None:
    async with at("training") as desk:
        desk.give("stop")
        await desk.until(lambda: desk.orders)
        desk.saves("s", 25)
        desk.says(p.Ended(cause="stopped", step=25, checkpoint="s"))
        assert desk.ledger.state == "released"
        await desk.until(desk.context.over.is_set)
        desk.give("resume")
        await desk.until(lambda: len(desk.starts) == 2)
        assert not desk.context.over.is_set()


@pytest.mark.parametrize("verb", ["stop", "stop-now"])
async def test_a_stop_is_done_when_the_agents_have_ended_and_a_resume_when_there_are_ranks(verb: p.Verb, at: At) -> None:
    async with at("training") as desk:
        desk.agents_leave = False
        stop = desk.give(verb)
        await desk.until(lambda: desk.orders)
        desk.saves("s", 25)
        desk.says(p.Ended(cause="stopped" if verb == "stop" else "stopped-now", step=25, checkpoint="s"))
        await desk.until(lambda: desk.agent[-1] == p.Leave())
        resume = desk.give("resume")
        await asyncio.sleep(0.05)
        assert [desk.view(c).state for c in (stop, resume)] == ["sent", "queued"], "the agent has been sent away, and lives"
        assert len(desk.starts) == 1
        desk.agents_leave = True
        desk._agent_leaves()
        await desk.until(lambda: len(desk.starts) == 2)
        assert (desk.view(stop).state, desk.view(stop).detail) == ("done", {"checkpoint": "s"})
        assert desk.view(resume).state == "sent" and desk.backend.started == 2
        desk.rank_comes()
        assert (desk.view(resume).state, desk.view(resume).detail) == ("done", {"generation": 2})
        assert not desk.orders[1:], "the new ranks do not hold, so there is nothing to resume"


async def test_a_stop_whose_agent_does_not_end_is_done_in_time_and_says_so(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PART_SECONDS", 0.2)
    async with at("training") as desk:
        desk.agents_leave = False
        stop = desk.give("stop-now")
        desk.says(p.Ended(cause="stopped-now", step=25))
        await desk.until(lambda: desk.view(stop).state == "done")
        notes = [e.text for _, e in desk.journal.entries if isinstance(e, j.Noted)]
        assert any(f"the agent of {NODE}" in text for text in notes)


async def test_a_resume_that_waits_for_ranks_lets_a_stop_pass_and_ends_with_it(at: At) -> None:
    async with at("released") as desk:
        InstantData.done.clear()
        resume = desk.give("resume")
        await desk.until(lambda: desk.view(resume).state == "sent")
        stop = desk.give("stop")
        await desk.until(lambda: desk.view(stop).state == "done")
        assert desk.view(resume).state == "cancelled"


async def test_a_resume_whose_start_fails_has_failed_with_its_reason(at: At) -> None:
    async with at("failed") as desk:
        resume = desk.give("resume")
        for start in (3, 4):
            await desk.until(lambda start=start: len(desk.starts) == start)
            desk.ranks_die("no memory")
        await desk.until(lambda: desk.view(resume).state == "failed")
        assert "no memory" in desk.view(resume).reason


@pytest.mark.parametrize("state", ["released", "failed"])
async def test_a_resume_outlives_the_controller_that_took_it(state: p.State, at: At) -> None:
    async with at(state) as desk:
        desk.generations.restart = lambda: None  # type: ignore[method-assign]  # it dies before it has done more
        resume = desk.give("resume")
        await desk.until(lambda: desk.view(resume).state == "sent")
        number = desk.ledger.generation
    async with at() as later:
        later.agent_comes(0)
        await later.until(lambda: later.ledger.generation == number + 1 and later.starts)
        later.rank_comes()
        assert later.view(resume).state == "done"


async def test_a_fork_that_is_gone_is_said_and_not_trained_without(at: At) -> None:
    async with at("training") as desk:
        desk.give("rollback", checkpoint="a")
        await desk.until(lambda: desk.orders)
        desk.answers(desk.orders[-1], step=10)
        for file in (desk.paths.checkpoints / "a").iterdir():
            file.unlink()
        (desk.paths.checkpoints / "a").rmdir()
        desk.ranks_die()
        await desk.until(lambda: desk.ledger.state == "failed")
        assert "a" in desk.ledger.reason and "roll back to another" in desk.ledger.reason


async def test_what_ranks_of_an_ended_generation_still_say_changes_nothing(at: At) -> None:
    async with at("failed") as desk:
        entries = len(desk.journal.entries)
        desk.phase("training", 30)
        desk.says(p.Note(level="alarm", text="late", step=1))
        assert (desk.ledger.state, len(desk.journal.entries)) == ("failed", entries)


async def test_an_agent_with_ranks_that_the_run_has_given_up_is_told_to_end_them(at: At) -> None:
    async with at("released") as desk:
        desk.agent.clear()
        desk.agent_comes(generation=1)
        assert desk.agent == [p.EndRanks(generation=1, reason="this generation is over")]


async def test_too_many_starts_without_a_step_fail_the_run_and_a_rollback_brings_it_back(at: At) -> None:
    async with at("failed") as desk:
        assert "2 starts in a row" in desk.ledger.reason
        view = desk.give("rollback", checkpoint="a")
        await desk.until(lambda: len(desk.starts) == 3)
        assert desk.view(view).state == "done"
        assert desk.starts[-1].checkpoint == "a"


# A new controller


async def test_what_was_queued_is_still_sent_by_the_next_controller(at: At) -> None:
    async with at("starting") as desk:
        view = desk.give("pause", command_id="mine")
    async with at() as desk:
        desk.agent_comes()
        desk.rank_comes()
        desk.phase("training", 1)
        await desk.until(lambda: desk.orders)
        assert desk.orders[0] == p.Order(number=view.number, op=p.Op.PAUSE)
        assert desk.give("pause", command_id="mine").number == view.number


async def test_what_was_sent_is_sent_again_under_the_same_number(at: At) -> None:
    async with at("training") as desk:
        view = desk.give("set", key="lr", value=0.5)
        await desk.until(lambda: desk.orders)
    async with at() as desk:
        desk.agent_comes()
        desk.rank_comes()
        assert [o.number for o in desk.orders] == [view.number]
        desk.answers(desk.orders[0], step=25, key="lr", old=0.1, new=0.5)
        assert desk.view(view).state == "done"
        assert desk.give("pause").number > view.number


async def test_a_checkpoint_committed_by_the_controller_before_is_answered_again(at: At) -> None:
    """Its answer may have been lost with it, and the ranks would wait for it."""
    async with at("training"):
        pass
    async with at() as desk:
        desk.agent_comes()
        desk.rank_comes()
        assert {m.id for m in desk.rank if isinstance(m, p.Committed)} == {"a", "b"}


async def test_a_rollback_sent_to_ranks_that_died_is_completed_by_the_restart_and_not_ordered_again(at: At) -> None:
    async with at("training") as desk:
        view = desk.give("rollback", checkpoint="a", skip=4)
        await desk.until(lambda: desk.orders)
    async with at() as desk:
        desk.backend.living = False
        await desk.until(lambda: desk.starts, 10)
        assert (desk.starts[-1].checkpoint, desk.starts[-1].skip) == ("a", 4)
        await desk.trains()
        assert (desk.view(view).state, desk.orders) == ("done", [])


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_rank_killed_in_the_middle_of_a_rollback_ends_up_behind_it(restarted: bool, at: At) -> None:
    async with at("training") as desk:
        view = desk.give("rollback", checkpoint="a", skip=4)
        await desk.until(lambda: desk.orders)
        desk.rank.clear()
        desk.ranks_die()
        await desk.until(lambda: len(desk.starts) == 2)
        assert (desk.starts[-1].checkpoint, desk.starts[-1].skip) == ("a", 4)
        await desk.trains()
        assert (desk.view(view).state, desk.orders) == ("done", [])


async def test_a_rollback_that_was_never_journaled_as_a_lineage_is_done_by_the_next_controller(at: At) -> None:
    async with at("training") as desk:
        first = desk.give("pause")
        view = desk.give("rollback", checkpoint="a")
        await desk.until(lambda: desk.orders)
    async with at() as desk:
        desk.agent_comes()
        desk.rank_comes()
        desk.answers(desk.orders[0], step=25)
        assert desk.view(first).state == "done"
        await desk.until(lambda: len(desk.orders) == 2)
        assert desk.orders[-1].number == view.number


@pytest.mark.parametrize("step", [0.0, -3600.0], ids=["", "the clock is set back"])
async def test_an_advance_whose_stage_was_ended_before_a_crash_does_not_end_the_next_one_too(step: float, at: At) -> None:
    async with at("training") as desk:
        view = desk.give("advance")
        await desk.until(lambda: desk.orders)
        desk.now += step
        desk.saves("end", 26, ended=True)
        desk.rank.clear()
        desk.ranks_die()
        await desk.until(lambda: len(desk.starts) == 2)
        assert desk.starts[-1].checkpoint == "end"
        await desk.trains()
        assert (desk.view(view).state, desk.orders) == ("done", [])


async def test_a_run_that_is_paused_is_still_so_for_the_next_controller_and_for_restarted_ranks(at: At) -> None:
    async with at("paused"):
        pass
    async with at() as desk:
        desk.agent_comes()
        desk.rank_comes()
        assert desk.ledger.state == "paused"
        desk.ranks_die()
        await desk.until(lambda: desk.starts)
        assert desk.starts[-1].paused


async def test_an_agent_that_tells_of_its_ranks_end_as_it_comes_back_gets_new_ones(at: At) -> None:
    async with at("training"):
        pass
    async with at() as desk:
        desk.agent_comes(generation=1)
        desk.ranks_die("killed while nobody was in office")
        await desk.until(lambda: desk.starts)
        assert (desk.starts[-1].checkpoint, desk.starts[-1].lineage.cause) == ("b", "crash")


async def test_a_crash_that_a_controller_did_not_live_to_answer_is_answered_by_the_next(at: At) -> None:
    """It died after the ranks' end was journaled and before they were gathered anew."""
    async with at("training") as desk:
        desk.context.record(j.GenerationEnded(time=1.0, generation=1, cause="killed", step=25))
    async with at() as desk:
        desk.agent_comes()
        await desk.until(lambda: desk.starts)
        start = desk.starts[-1]
        assert (start.generation, start.checkpoint) == (2, "b")
        assert (start.lineage.id, start.lineage.cause) == (2, "crash")


async def test_a_command_that_cannot_be_journaled_is_not_carried_out(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at("training") as desk:

        def full(*_: j.Entry) -> None:
            raise JournalError("no space left")

        monkeypatch.setattr(desk.journal, "append", full)
        with pytest.raises(JournalError):
            desk.give("pause")
        await asyncio.sleep(0.02)
        assert not desk.orders
        desk.row(26)
        desk.phase("evaluating", 26)
        monkeypatch.undo()
        desk.context.retry_backlog()
        desk.give("pause")
        await desk.until(lambda: desk.orders)


# Watch rules

RULES: list[tuple[dict[str, Any], list[float], list[int]]] = [
    # a rule, the values of steps 1, 2, ..., and the steps at which it fires
    ({"above": 5.0}, [1, 5, 6, 7], [3]),
    ({"below": 0.0}, [1, 0, -1], [3]),
    ({"not_finite": True}, [1, float("nan")], [2]),
    ({"not_finite": True, "cooldown": 2}, [float("inf")] * 4, [1, 3]),
    ({"above": 5.0, "steps": 3}, [6, 6, 1, 6, 6, 6], [6]),
    ({"sigma": 3.0, "window": 4}, [1, 2, 1, 2, 2.5, 9], [6]),
    ({"sigma": 3.0, "window": 4}, [9, 1, 9], []),
]


@pytest.mark.parametrize(("condition", "values", "steps"), RULES, ids=[str(r[0]) for r in RULES])
async def test_watch_rules_fire_on_their_condition(
    condition: dict[str, Any], values: list[float], steps: list[int], at: At
) -> None:
    rule = Watch(name="spike", metric="x", action="alert", **condition)
    async with at("training", recipe=make_recipe(watch=(rule,))) as desk:
        for step, value in enumerate(values, 1):
            desk.row(100 + step, x=value)
        fired = [e.step - 100 for _, e in desk.journal.entries if isinstance(e, j.Noted) and "spike" in e.text and e.step]
        assert fired == steps
        assert not desk.ledger.commands


@pytest.mark.parametrize(("action", "op"), [("pause", p.Op.PAUSE), ("stop", p.Op.STOP), ("rollback", p.Op.ROLLBACK)])
async def test_a_rules_command_names_the_rule_as_its_author(action: Any, op: p.Op, at: At) -> None:
    rule = Watch(name="spike", metric="x", above=5.0, action=action, skip=7, lr_scale=0.5)
    async with at("training", recipe=make_recipe(watch=(rule,))) as desk:
        desk.give("golden", checkpoint="a")
        desk.row(26, x=9.0)
        await desk.until(lambda: desk.orders)
        assert desk.orders[-1].op == op
        view = desk.ledger.commands[desk.orders[-1].number]
        assert view.author == "watch rule spike"
        if action == "rollback":
            assert (view.arguments["skip"], desk.orders[-1].arguments["checkpoint"]) == (7, "a")


# Words


def test_every_verb_has_a_row_and_every_refusal_a_reason() -> None:
    assert set(STATES) == set(get_args(p.State))
    for spec in SPECS:
        assert set(spec.states) == set(STATES)
        assert all(why for doing, why in spec.states.values() if doing is Doing.REFUSE)


def test_a_command_is_described_as_it_is_typed() -> None:
    assert describe("stop-now", {}) == "stop --now"
    assert describe("rollback", {"checkpoint": "a", "skip": 3, "lr_scale": 0.5}) == "rollback a --skip 3 --lr-scale 0.5"
    assert describe("advance", {"to": "sft"}) == "advance --to sft"
    assert check_arguments("set", {"key": "lr", "value": 1}) == ""


async def test_a_rollback_promises_the_settings_of_the_checkpoint_and_tells_what_it_undid(at: At) -> None:
    async with at("training") as desk:
        digest = write_checkpoint(desk.paths.checkpoints, ".writing-mine", "mine", desk.ledger.generation)
        desk.says(desk.ready("mine", 30, digest, settings={"lr": 0.02, "max_grad_norm": 1.0, "lr_scale": 0.5}))
        desk.row(40)
        desk.context.record(
            j.SettingsInForce(time=1.0, lineage=1, step=40, settings={"lr": 0.01, "max_grad_norm": 1.0, "lr_scale": 0.5})
        )
        reply = await desk.term.door._clients._queries.answer(p.UndoQuery(id=1, checkpoint="mine", lr_scale=0.5))
        assert isinstance(reply, p.UndoReply)
        assert reply.settings == ("lr 0.01 -> 0.02", "lr_scale 0.5 -> 0.25"), "not the recipe's"
        assert reply.steps == 10
        command = desk.give("rollback", checkpoint="mine", shown=10)
        await desk.until(lambda: desk.orders)
        desk.answers(desk.orders[-1], step=30, undone=13)
        assert desk.view(command).detail["undone"] == 13 and desk.view(command).detail["shown"] == 10
        lines = [line.text for line in SnapshotBuilder(desk.context).journal()]
        assert not any("10 steps undone" in line for line in lines), "the journal names one number, the true one"
        assert any("undone 13" in line and "shown 10" in line for line in lines)
