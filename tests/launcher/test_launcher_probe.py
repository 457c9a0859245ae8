"""Prompts through the controller: to whom the answers go, what is kept for them, and what is left when a process dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from launcher_desk import Desk, desk_at
from launcher_model import talking_recipe, write_model, write_tokenizer

from midwatch import protocol as p
from midwatch.run_directory import Address, RunLock, host_name, write_address
from midwatch.transport.client import Client, ClientError

ASK = p.ProbeAsk(ask=0, checkpoints=("newest",), prompt="the watch", limit=4, temperature=0.0)
LONG: dict[str, Any] = {"limit": 4000, "temperature": 1.0}
replace = msgspec.structs.replace


def saves(desk: Desk, id: str, step: int) -> None:
    digest = write_model(desk.context.recipe, desk.paths.root, f".writing-{id}", id, step, seed=step)
    desk.says(desk.ready(id, step, digest))


@pytest.fixture
def talking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run that trains, its door open, with the checkpoint `a`; older ones are pruned as newer ones come."""

    @contextlib.asynccontextmanager
    async def begin(idle: float = 600.0) -> AsyncIterator[Desk]:
        monkeypatch.setattr(Desk, "saves", lambda *_, **__: None)
        async with desk_at(tmp_path / "run", monkeypatch, "training", talking_recipe(idle)) as desk:
            write_tokenizer(desk.paths.root)
            saves(desk, "a", 30)
            path = Path(os.environ["XDG_RUNTIME_DIR"]) / "s"
            server = await desk.term.door.listen(path)
            lock = RunLock(desk.paths)
            assert lock.take()
            write_address(desk.paths.address, Address(term=1, url=f"unix:{path}", host=host_name(), pid=os.getpid()))
            try:
                yield desk
            finally:
                await desk.term.probing.close()
                server.close()
                await server.wait_closed()
                lock.release()

    return begin


async def answers(client: Client, ask: p.ProbeAsk) -> list[p.ProbeAnswer]:
    return [each async for each in client.probe(ask)]


def text(told: list[p.ProbeAnswer]) -> str:
    return "".join(each.text for each in told if isinstance(each, p.ProbeToken | p.ProbeEnd))


def end(told: list[p.ProbeAnswer]) -> p.ProbeEnd:
    assert isinstance(told[-1], p.ProbeEnd), told[-1]
    return told[-1]


async def test_answers_stream_to_the_client_that_asked_and_to_no_other(talking: Callable[..., Any]) -> None:
    async with talking() as desk:
        root = desk.paths.root
        async with Client(root) as one, Client(root, read_only=True) as other:
            assert desk.term.probing.pid is None, "no process before something is asked"
            mine, theirs = await asyncio.gather(
                answers(one, ASK), answers(other, replace(ASK, prompt="all is", limit=6, checkpoints=("a", "30")))
            )
            assert [type(each).__name__ for each in mine] == ["ProbeBegan", *["ProbeToken"] * 4, "ProbeEnd"]
            assert {each.which for each in theirs} == {0, 1} and len([e for e in theirs if isinstance(e, p.ProbeToken)]) == 12
            assert mine[0].checkpoint == "a" and end(mine).finish == "length"  # type: ignore[union-attr]
            assert end(mine).tokens_per_second > 0
            again = await answers(other, ASK)
            assert text(again) == text(mine)
            problem = end(await answers(one, replace(ASK, checkpoints=("golden",)))).problem
            assert "no checkpoint on this line is golden" in problem
            assert "77" in end(await answers(one, replace(ASK, checkpoints=("77",)))).problem
            assert "one, or two" in end(await answers(one, replace(ASK, checkpoints=("a", "a", "a")))).problem
        assert desk.ledger.commands == {} and not desk.context.live.probed


async def test_a_process_that_is_killed_ends_its_answers_with_a_reason_and_the_next_ask_starts_another(
    talking: Callable[..., Any],
) -> None:
    async with talking() as desk, Client(desk.paths.root) as client:
        told: list[p.ProbeAnswer] = []
        first = 0
        async for each in client.probe(replace(ASK, **LONG)):
            told.append(each)
            if len(told) == 3:
                first = desk.term.probing.pid
                os.kill(first, signal.SIGKILL)
        assert "SIGKILL" in end(told).problem and "probe.log" in end(told).problem and "is loaded" in end(told).problem
        assert "ask again" in end(told).problem and not desk.context.live.probed
        assert desk.ledger.state == "training"
        assert end(await answers(client, ASK)).finish == "length"
        assert desk.term.probing.pid not in (None, first)


async def test_a_checkpoint_that_answers_is_not_pruned_and_may_be_afterwards(talking: Callable[..., Any]) -> None:
    async with talking() as desk, Client(desk.paths.root) as client:
        asked = client.probe(replace(ASK, **LONG, checkpoints=("a",)))
        assert isinstance(await anext(asked), p.ProbeBegan)
        for step in (31, 32, 33):
            saves(desk, f"b{step}", step)
        assert set(desk.ledger.checkpoints) == {"a", "b33"}
        await asked.aclose()  # who stops listening has it stopped
        await desk.until(lambda: not desk.context.live.probed)
        saves(desk, "b34", 34)
        assert set(desk.ledger.checkpoints) == {"b34"} and not (desk.paths.checkpoints / "a").exists()
        assert "there is no checkpoint 'a'" in end(await answers(client, replace(ASK, checkpoints=("a",)))).problem


async def test_it_ends_when_it_is_idle_and_when_its_asker_goes_it_stops(talking: Callable[..., Any]) -> None:
    async with talking(idle=0.3) as desk:
        async with Client(desk.paths.root) as client:
            asked = client.probe(replace(ASK, **LONG))
            await anext(asked)
            process = psutil.Process(desk.term.probing.pid)
        await desk.until(lambda: not desk.context.live.probed)
        await desk.until(lambda: desk.term.probing.pid is None)
        await asyncio.to_thread(process.wait, 5)
        with contextlib.suppress(ClientError):
            await asked.aclose()


async def test_an_interpreter_without_torch_says_so(talking: Callable[..., Any], tmp_path: Path) -> None:
    async with talking() as desk, Client(desk.paths.root) as client:
        desk.term.probing._prober._python = str(tmp_path / "no-python")
        assert "cannot be started" in end(await answers(client, ASK)).problem
        bare = tmp_path / "python"
        bare.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
        bare.chmod(0o755)
        desk.term.probing._prober._python = str(bare)
        problem = end(await answers(client, ASK)).problem
        assert "status 1" in problem and "No module named 'torch'" in problem


OWNER = """
import asyncio, sys
from pathlib import Path
from midwatch.run_directory import RunPaths
from launcher.controller.probe.process import Prober
from midwatch.protocol import ProbeAsk
from midwatch.recipe import load_recipe

async def main(root):
    prober = Prober(RunPaths(root), load_recipe(root / "recipe.toml"))
    ask = ProbeAsk(ask=1, checkpoints=("a",), prompt="the", limit=4000, temperature=1.0)
    await prober.ask(ask, lambda answer: print(prober.pid, type(answer).__name__, flush=True))
    await asyncio.sleep(60)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    from midwatch.recipe import dump_recipe

    root, recipe = tmp_path / "run", talking_recipe()
    write_tokenizer(root)
    write_model(recipe, root, "a", "a", 10)
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    owner = subprocess.Popen([sys.executable, "-P", "-c", OWNER, str(root)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline().split()[0])
    assert psutil.pid_exists(pid)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
