"""Annotators at a controller, with the probe that writes the answers: who gets which pair, what is on disk when they are told."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from launcher_desk import Desk, desk_at
from launcher_model import talking_recipe, write_model, write_tokenizer

from launcher.controller.annotation.store import all_decisions
from midwatch import protocol as p
from midwatch.run_directory import Address, RunLock, host_name, write_address
from midwatch.transport.client import Client, ClientError

PROMPTS = tuple((p.ProbeTurn("user", f"the watch {n} is"),) for n in range(40))
BEGIN = p.PreferenceBegin(id=0, annotator="anna", session="1", prompts=PROMPTS, limit=6, temperature=1.0)
replace = msgspec.structs.replace


@pytest.fixture
def annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A run with the checkpoint `a`, whose controller answers."""

    @contextlib.asynccontextmanager
    async def begin() -> AsyncIterator[Desk]:
        monkeypatch.setattr(Desk, "saves", lambda *_, **__: None)
        async with desk_at(tmp_path / "run", monkeypatch, "training", talking_recipe()) as desk:
            write_tokenizer(desk.paths.root)
            digest = write_model(desk.context.recipe, desk.paths.root, ".writing-a", "a", 30, seed=30)
            desk.says(desk.ready("a", 30, digest))
            path = Path(os.environ["XDG_RUNTIME_DIR"]) / "s"
            server = await desk.term.door.listen(path)
            lock = RunLock(desk.paths)
            assert lock.take()
            write_address(desk.paths.address, Address(term=1, url=f"unix:{path}", host=host_name(), pid=os.getpid()))
            try:
                yield desk
            finally:
                await desk.term.preferring.close()
                await desk.term.probing.close()
                server.close()
                await server.wait_closed()
                lock.release()

    return begin


async def ask(client: Client, question: p.Message) -> p.PreferenceState:
    return await client.ask(question, p.PreferenceState)


async def shown(client: Client, state: p.PreferenceState) -> p.PreferencePair:
    while state.pair is None:
        assert not state.over
        state = await ask(client, p.PreferenceNext(id=0))
    return state.pair


async def decide(client: Client, pair: p.PreferencePair, choice: p.Choice = "left", id: str = "") -> p.PreferenceState:
    made = p.PreferenceMade(id=0, decision=id or f"{pair.pair}-{choice}", pair=pair.pair, choice=choice, seconds=1.25)
    return await ask(client, made)


def lines(desk: Desk, annotator: str = "anna") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (desk.paths.preferences / f"{annotator}.jsonl").read_text().splitlines()]


async def test_a_decision_is_on_disk_when_it_is_acknowledged_and_the_next_pair_is_ready(annotated: Callable[[], Any]) -> None:
    async with annotated() as desk, Client(desk.paths.root) as client:
        pair = await shown(client, await ask(client, BEGIN))
        assert pair.left != pair.right and pair.prompt[0] in {prompt[0] for prompt in PROMPTS}
        (session,) = desk.term.preferring._sessions.values()
        await desk.until(lambda: len(session.ready) > 1)
        state = await decide(client, pair, "right")
        (told,) = lines(desk)
        assert (told["choice"], told["left"]["text"], told["right"]["text"]) == ("right", pair.left, pair.right)
        assert told["left"]["checkpoint"] == told["right"]["checkpoint"] == "a" and told["left"]["seed"] != told["right"]["seed"]
        assert told["author"] and told["annotator"] == "anna" and told["seconds"] == 1.25
        assert (state.total, state.today, state.seconds) == (1, 1, 1.25)
        assert state.pair is not None and state.pair.pair != pair.pair, "it was drawn while the first one was read"
        again = await decide(client, pair, "right")
        assert again.total == 1 and again.pair == state.pair, "sent again, it is made once"
        with pytest.raises(ClientError, match="that pair is decided"):
            await decide(client, pair, "left")
        back = await ask(client, p.PreferenceUndo(id=0, undo="u1"))
        assert (back.total, back.pair) == (0, pair)
        assert (await ask(client, p.PreferenceUndo(id=0, undo="u1"))).total == 0
        with pytest.raises(ClientError, match="nothing to undo"):
            await ask(client, p.PreferenceUndo(id=0, undo="u2"))
        await decide(client, pair, "left")
        exported = desk.paths.preferences / "pairs.jsonl"
        await desk.until(lambda: [json.loads(line)["chosen"] for line in exported.read_text().splitlines()] == [pair.left])
        assert desk.ledger.state == "training" and not desk.ledger.commands


async def test_a_name_is_held_until_its_screen_goes_and_a_screen_that_comes_back_has_it_again(annotated: Callable[[], Any]) -> None:
    async with annotated() as desk:
        root = desk.paths.root
        async with Client(root) as client, Client(root) as second, Client(root, read_only=True) as reader:
            first = await shown(client, await ask(client, BEGIN))
            with pytest.raises(ClientError, match=r"anna annotates already: on the screen of .*--as NAME"):
                await ask(second, replace(BEGIN, session="2"))
            with pytest.raises(ClientError, match="begin first"):
                await ask(second, p.PreferenceNext(id=0))
            with pytest.raises(ClientError, match="read-only"):
                await ask(reader, BEGIN)
            assert (await ask(reader, p.PreferenceQuery(id=0))).agreement.pairs == 0
            assert await shown(second, await ask(second, BEGIN)) == first, "the session of a lost connection, on a new one"
            with pytest.raises(ClientError, match="begin first"):
                await decide(client, first)
            await ask(second, p.PreferenceLeave(id=0))
            assert await shown(client, await ask(client, replace(BEGIN, session="3"))) == first
            with pytest.raises(ClientError, match="cannot name an annotator"):
                await ask(second, replace(BEGIN, annotator="../x"))
            with pytest.raises(ClientError, match="no checkpoint 'no'"):
                await ask(second, replace(BEGIN, annotator="bob", checkpoints=("no",)))
            with pytest.raises(ClientError, match="no source with prompts"):
                await ask(second, replace(BEGIN, annotator="bob", prompts=()))
        async with Client(root) as third:
            await desk.until(lambda: not desk.term.preferring._sessions)
            assert await shown(third, await ask(third, replace(BEGIN, session="4"))) == first


async def test_shared_pairs_come_to_all_with_the_same_answers_and_others_to_one(annotated: Callable[[], Any]) -> None:
    async with annotated() as desk:
        begin = replace(BEGIN, shared=0.4, prompts=PROMPTS[:20], limit=3)
        choices: dict[str, p.Choice] = {"anna": "left", "bob": "right", "cem": "tie"}
        for name, choice in choices.items():
            async with Client(desk.paths.root) as client:
                state = await ask(client, replace(begin, annotator=name))
                while not state.over:
                    if state.pair is not None:
                        state = await decide(client, state.pair, choice, f"{name}-{state.pair.pair}")
                    else:
                        state = await ask(client, p.PreferenceNext(id=0))
            await desk.until(lambda: not desk.term.preferring._sessions)
        made = all_decisions(desk.paths.preferences)
        shared = {each.pair for each in made["anna"] if each.shared}
        assert 3 < len(shared) < 15 and len(made["anna"]) == 20
        for name in ("bob", "cem"):
            assert {each.pair for each in made[name]} == shared, "the others are decided"
        texts = {each.pair: {each.left.text, each.right.text} for each in made["anna"]}
        assert all({each.left.text, each.right.text} == texts[each.pair] for each in made["bob"])
        assert len({each.swapped for each in made["anna"]}) == 2
        async with Client(desk.paths.root, read_only=True) as client:
            found = (await ask(client, p.PreferenceQuery(id=0))).agreement
            assert (found.measure, found.pairs, found.annotators) == ("Krippendorff's alpha", len(shared), 3)
            assert found.decisions == {"anna": 20, "bob": len(shared), "cem": len(shared)}


async def test_what_cannot_be_drawn_is_said_and_what_cannot_be_written_is_not_decided(
    annotated: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with annotated() as desk, Client(desk.paths.root) as client:
        long = (p.ProbeTurn("user", "the watch " * 4000),)
        state = await ask(client, replace(BEGIN, prompts=(long, PROMPTS[0])))
        pair = await shown(client, state)
        assert pair.prompt == PROMPTS[0], "the others are tried first"
        state = await ask(client, p.PreferenceNext(id=0))

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", full)
            with pytest.raises(ClientError, match=r"No space left .*nothing is decided"):
                await decide(client, pair)
        assert lines(desk) == []
        told = (await decide(client, pair)).total
        assert told == 1 and len(lines(desk)) == 1
        noted = ""
        while not noted:
            noted = (await ask(client, p.PreferenceNext(id=0))).note
        assert "no pair can be generated" in noted and "context" in noted
