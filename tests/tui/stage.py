"""A stage for the screen: what stands where the controller does, on a real unix socket, speaking the real protocol.

It plays a demo run in its DPO stage, after a rollback: every figure is made from a fixed seed and a fixed clock, so that the screen
drawn from it is the same each time. Tests change its snapshot, cut its link, and read which commands came.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
from websockets.asyncio.server import Server, ServerConnection, unix_serve
from websockets.exceptions import ConnectionClosed

from launcher.controller.annotation.desk import Preferring, Question
from launcher.controller.core.rollout_samples import Samples
from midwatch import protocol as p
from midwatch.metrics.m4_columns import LineageSegment, columns_of
from midwatch.metrics.m4_nodes import ROW
from midwatch.recipe import parse_recipe
from midwatch.run_directory import Address, RunPaths, write_address

NOW = 1_760_000_000.0
"""08:53:20 UTC on 9 October 2025."""
STEP = 1_180
replace = msgspec.structs.replace


def series() -> dict[str, dict[int, np.ndarray]]:
    """Rows of each metric by lineage; lineage 1 was rolled back at step 460 to 400."""
    random = np.random.default_rng(7)
    steps = np.arange(STEP + 1)
    loss = np.where(
        steps < 600,
        3.0 + 6.2 * np.exp(-steps / 70),
        np.where(
            steps < 800,
            2.9 + 0.3 * np.exp(-(steps - 600) / 40),
            np.where(steps < 1000, 2.2 + 0.7 * np.exp(-(steps - 800) / 50), 0.0),
        ),
    )
    dpo = 0.693 - 0.25 * (1 - np.exp(-np.maximum(0, steps - 1000) / 80))
    loss = np.where(steps < 1000, loss, dpo) + random.normal(0, 0.05, len(steps)) * np.where(steps < 1000, 1, 0.4)
    found = {
        "train/loss": (steps, loss),
        "train/grad_norm": (steps, 0.6 + np.abs(random.normal(0, 0.15, len(steps))) + 2 * np.exp(-steps / 30)),
        "train/lr": (steps, 1e-3 * np.minimum(1, steps / 60) * (0.1 + 0.9 * np.cos(steps / STEP * 1.4))),
        "perf/tokens_per_second": (steps, 12_400 + random.normal(0, 160, len(steps))),
        "perf/step_seconds": (steps, 0.165 + np.abs(random.normal(0, 0.004, len(steps)))),
    }
    every = steps[::50]
    for name, level in (("stdlib", 3.1), ("prose", 3.6), ("pairs", 2.5)):
        falling = level + 5 * np.exp(-every / 120) + random.normal(0, 0.02, len(every))
        found[f"eval/{name}/loss"] = (every, falling)
    late = steps[steps >= 1000]
    found["preference/margin"] = (late, 0.012 * (late - 1000) + random.normal(0, 0.12, len(late)))
    found["preference/accuracy"] = (late, np.clip(0.5 + 0.0022 * (late - 1000) + random.normal(0, 0.03, len(late)), 0, 1))
    found["policy/kl"] = (late[::10], 0.0006 * (late[::10] - 1000) + 0.004 * np.abs(random.normal(0, 1, len(late[::10]))))
    table: dict[str, dict[int, np.ndarray]] = {}
    for name, (at, values) in found.items():
        table[name] = {2: _rows(at, values)}
        undone = (at >= 400) & (at <= 460)
        if name == "train/loss":
            table[name][1] = _rows(at[at <= 460], np.where(undone, values + 0.02 * (at - 400), values)[at <= 460])
    return table


def _rows(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(steps), ROW)
    rows["step"], rows["value"] = steps, values
    rows["tokens"] = steps * 16_384
    rows["time"] = NOW - (STEP - steps) * 0.165
    return rows


def snapshot(**changes: Any) -> p.Snapshot:
    """The run as it stands at NOW."""
    stages = (
        p.StageView(name="data", objective="data", state="done", step=100, steps=100, seconds=14.0, note="built"),
        _stage("pretrain", "pretrain", "done", 600, 600, 128, {"stdlib": 0.7, "prose": 0.3}, 1e-3, 101.0, "step-600", None,
               {"stdlib": (8.12, 3.14), "prose": (8.31, 3.63)}),
        _stage("extend", "pretrain", "done", 200, 200, 256, {"stdlib": 0.7, "prose": 0.3}, 3e-4, 36.0, "step-800", "step-600",
               {"stdlib": (3.22, 3.08), "prose": (3.71, 3.55)}),
        _stage("sft", "sft", "cut short", 200, 240, 256, {"pairs": 1.0}, 1e-4, 34.0, "step-1000", "step-800",
               {"pairs": (3.04, 2.47)}),
        _stage("dpo", "dpo", "running", 181, 300, 256, {"preferences": 1.0}, 5e-5, 29.9, None, "step-1000",
               {"preferences": (0.693, 0.455)}),
    )  # fmt: skip
    checkpoints = tuple(
        p.CheckpointView(
            id=name,
            step=step,
            lineage=lineage,
            stage=stage,
            stage_step=within,
            ended=ended,
            time=NOW - (STEP - step) * 0.165,
            bytes=41_300_000,
            golden=golden,
            suspect=suspect,
            on_line=on_line,
            loss=loss,
        )
        for name, step, lineage, stage, within, ended, golden, suspect, on_line, loss in (
            ("step-200", 200, 1, "pretrain", 200, False, False, False, True, 3.36),
            ("step-400", 400, 1, "pretrain", 400, False, True, False, True, 3.02),
            ("step-450", 450, 1, "pretrain", 450, False, False, True, False, 4.11),
            ("step-600", 600, 2, "pretrain", 600, True, False, False, True, 3.01),
            ("step-800", 800, 2, "extend", 200, True, False, False, True, 2.91),
            ("step-1000", 1000, 2, "sft", 200, True, True, False, True, 2.21),
            ("step-1100", 1100, 2, "dpo", 100, False, False, False, True, 0.512),
        )
    )
    table = series()
    base = p.Snapshot(
        run="demo",
        directory="/runs/demo",
        state="training",
        phase="training",
        time=NOW,
        started=NOW - 240,
        term=1,
        generation=2,
        lineage=2,
        world=2,
        step=STEP,
        total_steps=1300,
        tokens=STEP * 16_384,
        stage="dpo",
        seconds_left=19.6,
        stages=stages,
        lineages=(
            p.Lineage(id=1, time=NOW - 220),
            p.Lineage(id=2, parent=1, fork="step-400", fork_step=400, cause="rollback",
                      skip=5, lr_scale=0.5, author="anna", time=NOW - 128),
        ),
        checkpoints=checkpoints,
        commands=(
            p.CommandView(id="a", number=3, verb="rollback", arguments={"checkpoint": "step-400", "skip": 5, "lr_scale": 0.5},
                          author="anna", time=NOW - 130, state="done", step=400, detail={"lineage": 2}),
        ),
        nodes=(
            p.NodeView(
                name="laptop",
                state="up",
                ranks=2,
                stats=p.NodeStats(
                    node="laptop",
                    time=NOW,
                    cpus=(0.97, 0.93, 0.22, 0.15),
                    memory_used=5_300_000_000,
                    memory_total=16_600_000_000,
                    gpu_note="no GPU: NVML is not installed",
                    rank_rss=(612_000_000, 598_000_000),
                    disk_free=81_000_000_000,
                ),
            ),
        ),
        latest={name: float(rows[2]["value"][-1]) for name, rows in table.items()},
        settings={"lr": 5e-5, "lr_scale": 0.5, "max_grad_norm": 1.0,
                  "beta1": 0.9, "beta2": 0.95, "beta": 0.1, "checkpoint_every": 100},
        events=tuple(journal()[-12:]),
    )  # fmt: skip
    return replace(base, **changes)


def _stage(
    name: str, objective: str, state: Any, step: int, steps: int, context: int, mixture: dict[str, float], lr: float,
    seconds: float, product: str | None, origin: str | None, losses: dict[str, tuple[float, float]],
) -> p.StageView:  # fmt: skip
    return p.StageView(
        name=name,
        objective=objective,
        state=state,
        step=step,
        steps=steps,
        context=context,
        global_batch=64,
        mixture=mixture,
        lr=lr,
        seconds=seconds,
        seconds_left=19.6 if state == "running" else None,
        tokens=step * 64 * context,
        product=product,
        origin=origin,
        losses=losses,
    )


def journal() -> list[p.JournalLine]:
    told: tuple[tuple[float, str, str, str, Any], ...] = (
        (240, "controller", "", "term 1 began on laptop", "info"),
        (240, "run", "", "demo began", "info"),
        (226, "data", "", "built in 14 s", "info"),
        (222, "ranks", "", "generation 1: 2 ranks, from the beginning", "info"),
        (221, "stage", "", "pretrain began at step 0", "info"),
        (160, "checkpoint", "", "step-200: 41.3 MB in 0.21 s", "info"),
        (140, "checkpoint", "", "step-400: 41.3 MB in 0.19 s", "info"),
        (139, "golden", "anna", "step-400 is golden", "info"),
        (133, "note", "", "watch rule loss-spike: train/loss 4.11 is above 1.3 x its mean of 50 steps", "warning"),
        (132, "checkpoint", "", "step-450: 41.3 MB in 0.20 s, SUSPECT", "warning"),
        (130, "command", "anna", "#3 rollback step-400 --skip 5 --lr-scale 0.5", "info"),
        (
            128,
            "lineage",
            "anna",
            "2 (rollback) from step-400, 60 steps undone, 5 steps of data skipped, learning rate x0.5",
            "warning",
        ),
        (128, "outcome", "anna", "#3 rollback step-400 --skip 5 --lr-scale 0.5: done at step 400 (lineage 2)", "info"),
        (96, "stage", "", "pretrain ended after 600 steps: step-600", "info"),
        (60, "stage", "", "extend ended after 200 steps: step-800", "info"),
        (31, "command", "anna", "#4 advance --to dpo", "info"),
        (30, "stage", "", "sft ended after 200 steps: step-1000", "info"),
        (30, "stage", "", "dpo began at step 1000", "info"),
        (29, "sample", "", "sft: 'What does os.path.join do?' -> 'Join two or more pathname components, inserting /'", "info"),
        (13, "checkpoint", "", "step-1100: 41.3 MB in 0.18 s", "info"),
    )
    return [
        p.JournalLine(index=index, time=NOW - ago, term=1, kind=kind, author=author, text=words, level=level)
        for index, (ago, kind, author, words, level) in enumerate(told)
    ]


def log_lines(count: int) -> list[str]:
    return [
        f"2025-10-09 08:{50 + n // 3000 % 10:02}:{n // 50 % 60:02} rank0 INFO step {n}: loss {3.5 - n / count:.4f}"
        for n in range(count)
    ]


LOGS = {
    "controller.log": ["INFO term 1 began", "INFO generation 1: 2 ranks", "WARNING a peer is rejected: not understood"],
    "laptop/0.log": log_lines(600),
    "laptop/1.log": log_lines(40),
}
ANSWERS = (
    "Join one or more path components, and return the concatenation of path and any members of paths with exactly one "
    "separator following each non-empty part except the last.\n\nIf a component is an absolute path, all previous components "
    "are thrown away and joining continues from the absolute path component.",
    "Join path components.\n\n    os.path.join('a', 'b')\n\nreturns 'a/b' on POSIX: naïve, 日本.",
)
SAMPLES = (
    p.Sampled(stage="pretrain", step=600, lineage=2, prompt="def read(self, size=-1):",
              text='\n    """Read up to size bytes from the object and return them.\n\n    If it is negative, all is read."""'),
    p.Sampled(stage="sft", step=1000, lineage=2, prompt="What does os.path.join do?",
              text="Join two or more pathname components, inserting / as needed."),
)  # fmt: skip


RECIPE = """
[run]
name = "demo"
[model]
num_layers = 1
hidden_size = 8
num_heads = 2
[data]
held_out = 0.0
[[data.source]]
name = "asked"
kind = "sft"
origin = "jsonl"
path = "{path}"
[[stage]]
name = "sft"
objective = "sft"
steps = 1
global_batch = 1
context = 8
mixture = {{ asked = 1.0 }}
"""


class _Office:
    """What the real keeper of preferences wants of a controller."""

    def __init__(self, stage: Stage) -> None:
        self.paths = RunPaths(stage.directory)
        asked = stage.directory / "asked.jsonl"
        asked.write_text(
            "".join(f'{{"prompt": "What does os.path.join do with {n} arguments?", "response": "It joins."}}\n' for n in range(30))
        )
        self.recipe = parse_recipe(RECIPE.format(path=asked))
        checkpoints = {each.id: each for each in stage.snapshot.checkpoints}
        self.ledger = SimpleNamespace(borders=(), checkpoints=checkpoints, find=lambda name: checkpoints.get(name, f"no {name!r}"))

    def clock(self) -> float:
        return NOW


class _Model:
    """Answers as the stage does, the seed deciding with what; the second answer of a pair is the other one."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def ask(self, client: object, ask: p.ProbeAsk, send: Callable[[p.ProbeAnswer], bool]) -> None:
        text, id = self._stage.answers[ask.seed % 2], ask.checkpoints[0]
        score = {0: 1.25, 1: -0.5}[ask.seed % 2]
        send(p.ProbeBegan(ask=ask.ask, which=0, checkpoint=id, stage="dpo", form="chat", prompt_tokens=9))
        send(p.ProbeEnd(ask=ask.ask, which=0, checkpoint=id, finish="stop", text=text, tokens=len(text.split()), score=score))

    def stop(self, client: object, ask: int) -> None: ...


class Stage:
    """Serves on a thread of its own; use as `with Stage() as stage`."""

    def __init__(self, first: p.Snapshot | None = None, directory: Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mw-")
        self.directory = directory or Path(self._temporary.name) / "demo"
        self.snapshot = first or snapshot()
        self.commands: list[p.Command] = []
        self.questions: list[p.Message] = []
        self.logs = dict(LOGS)
        self.series = series()
        self.samples = Samples(self.directory / "samples", 1)
        """What rollouts wrote; asked for as of a controller."""
        self.journal = journal()
        self.asks: list[p.ProbeAsk] = []
        self.stopped: list[int] = []
        self.answers = ANSWERS
        """Text that each checkpoint of an ask answers with."""
        self.answered = 10_000
        """Tokens of an answer after which nothing more comes."""
        self.preferring: Preferring | None = None
        """Of the door that is open."""
        self.hold: set[str] = set()
        """Verbs whose outcome does not come."""
        self.outcome: Callable[[p.Command], dict[str, Any]] = lambda command: {"state": "done", "step": self.snapshot.step}
        self.undo = p.UndoReply(id=0, checkpoint="step-1000", step=1000, stage="sft", steps=180, tokens=2_949_120, seconds=29.7,
                                settings=("lr 5e-05 -> 0.0001", "beta 0.1 -> 0.2"))  # fmt: skip
        self._screens: set[asyncio.Event] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._server: Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage", daemon=True)

    def __enter__(self) -> Stage:
        paths = RunPaths(self.directory)
        paths.create()
        paths.recipe.write_text('[run]\nname = "demo"\n')
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        assert not self._thread.is_alive()
        self._loop.close()
        self._temporary.cleanup()

    def listen(self) -> None:
        """Opens the door (again)."""
        socket = Path(self._temporary.name) / "s"

        async def open_door() -> Server:
            socket.unlink(missing_ok=True)
            self.preferring = Preferring(cast(Any, _Office(self)), cast(Any, _Model(self)))
            return await unix_serve(self._serve, str(socket), compression=None, max_size=p.MAX_FRAME, close_timeout=0.2)

        self._server = self._run(open_door())
        write_address(
            RunPaths(self.directory).address, Address(term=self.snapshot.term, pid=0, host="laptop", url=f"unix:{socket}")
        )

    def cut(self) -> None:
        """Closes the door and every connection, as a controller that dies does."""
        server, self._server = self._server, None
        if server is not None:

            async def close() -> None:
                assert self.preferring is not None
                await self.preferring.close()
                server.close(close_connections=False)
                for task in list(self._serving):
                    task.cancel()
                await asyncio.gather(*self._serving, return_exceptions=True)
                await asyncio.wait_for(server.wait_closed(), 5)

            self._run(close())

    def send(self, **changes: Any) -> None:
        """Changes the snapshot and sends it to the screens."""
        self.snapshot = replace(self.snapshot, **changes)

        async def wake() -> None:
            for event in self._screens:
                event.set()

        self._run(wake())

    def verbs(self) -> list[str]:
        return [command.verb for command in self.commands]

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self, connection: ServerConnection) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        with contextlib.suppress(ConnectionClosed):
            hello = p.decode(await connection.recv())
            assert isinstance(hello, p.ClientHello), hello
            await connection.send(p.encode(p.ClientWelcome(term=1, run="demo", directory=str(self.directory), author="anna")))
            if hello.subscribe:
                pusher = asyncio.create_task(self._push(connection))
                task.add_done_callback(lambda _: pusher.cancel())
            async for frame in connection:
                message = p.decode(frame)
                if isinstance(message, p.Command):
                    assert not hello.read_only, "a read-only screen has sent a command"
                    self.commands.append(message)
                    if message.verb not in self.hold:
                        await connection.send(p.encode(self._carry_out(message)))
                elif isinstance(message, p.ProbeAsk):
                    self.asks.append(message)
                    answering = asyncio.create_task(self._probe(connection, message))
                    task.add_done_callback(lambda _, answering=answering: answering.cancel())  # type: ignore[misc]
                elif isinstance(message, Question):
                    left = functools.partial(self._left, connection)
                    task.add_done_callback(left)
                    answering = asyncio.create_task(self._prefer(connection, message, hello.read_only))
                elif isinstance(message, p.ProbeStop):
                    self.stopped.append(message.ask)
                else:
                    self.questions.append(message)
                    await connection.send(p.encode(self._answer(message)))

    def _left(self, connection: ServerConnection, _: object) -> None:
        if self.preferring is not None:
            self.preferring.left(connection)

    async def _prefer(self, connection: ServerConnection, question: Question, read_only: bool) -> None:
        assert self.preferring is not None
        reply = await self.preferring.answer(connection, question, "anna", read_only=read_only)
        with contextlib.suppress(ConnectionClosed):
            await connection.send(p.encode(reply))

    async def _push(self, connection: ServerConnection) -> None:
        """The newest snapshot whenever there is one: a screen that does not read holds up nobody."""
        event = asyncio.Event()
        event.set()
        self._screens.add(event)
        try:
            while await event.wait():
                event.clear()
                await connection.send(p.encode(self.snapshot))
        except ConnectionClosed:
            pass
        finally:
            self._screens.discard(event)

    def _carry_out(self, command: p.Command) -> p.CommandReply:
        ended = {"state": "done", **self.outcome(command)}
        view = p.CommandView(
            id=command.id,
            number=4 + len(self.commands),
            verb=command.verb,
            arguments=command.arguments,
            author="anna",
            time=NOW,
            **ended,
        )
        return p.CommandReply(command=view)

    def _answer(self, question: p.Message) -> p.Message:
        match question:
            case p.ChartQuery():
                rows = self.series.get(question.metric, {})
                found = rows.get(2 if question.lineage is None else question.lineage, np.zeros(0, ROW))
                columns = columns_of(question.metric, found, question.start, question.stop, question.width)
                return p.ChartReply(id=question.id, columns=columns.encode())
            case p.MetricsQuery():
                return p.MetricsReply(id=question.id, names=tuple(sorted(self.series)))
            case p.JournalQuery():
                after = [line for line in self.journal if line.index > question.after]
                return p.JournalReply(
                    id=question.id, lines=tuple(after[-question.limit :] if question.after < 0 else after[: question.limit])
                )
            case p.LogQuery():
                return self._log(question)
            case p.UndoQuery():
                if self.undo.problem:
                    return p.Refused(id=question.id, reason=self.undo.problem)
                return replace(self.undo, id=question.id, checkpoint=question.checkpoint)
            case p.SampleQuery():
                return self.samples.find(question, [LineageSegment(1, -1, 400), LineageSegment(2, 400, None)], SAMPLES)
            case p.TextQuery():
                return p.TextReply(id=question.id, samples=SAMPLES)
        return p.Refused(id=getattr(question, "id", 0), reason="not understood")

    async def _probe(self, connection: ServerConnection, ask: p.ProbeAsk) -> None:
        """Answers word by word; what else each could have been is made of the other words."""
        for which, name in enumerate(ask.checkpoints):
            id = "step-1100" if name == "newest" else name
            if id == "step-450":
                problem = "checkpoints/step-450/rank-00000.bin: its content is not what was written (use another checkpoint)"
                end = p.ProbeEnd(ask=ask.ask, which=which, checkpoint=id, finish="failed", problem=problem)
                await connection.send(p.encode(end))
                continue
            stage = next(c.stage for c in self.snapshot.checkpoints if c.id == id)
            form: Any = ask.form if ask.form != "auto" else "text" if stage in ("pretrain", "extend") else "chat"
            began = p.ProbeBegan(ask=ask.ask, which=which, checkpoint=id, stage=stage, form=form, prompt_tokens=12)
            await connection.send(p.encode(began))
            words = re.findall(r"\n|\s*[^\s]+", self.answers[which])[: ask.limit]
            for at, word in enumerate(words[: self.answered]):
                others = [words[(at + 7 * n) % len(words)] for n in range(1, 10)]
                chances = [0.42, 0.21, 0.11, 0.07, 0.04, 0.02, 0.01, 0.005, 0.002, 0.001]
                drawn = at % 3 if ask.temperature else 0
                pieces = [*others[:drawn], word, *others[drawn:]]
                told = tuple(zip(pieces, chances, strict=True))[: ask.alternatives]
                token = p.ProbeToken(
                    ask=ask.ask, which=which, text=word, piece=word, log_prob=math.log(chances[drawn]), alternatives=told
                )
                await connection.send(p.encode(token))
            if self.answered >= len(words):
                last = p.ProbeToken(ask=ask.ask, which=which, text="", piece="[EOS]", log_prob=-0.1, alternatives=(("[EOS]", 0.9),))
                await connection.send(p.encode(last))
                end = p.ProbeEnd(
                    ask=ask.ask, which=which, checkpoint=id, finish="stop", tokens=len(words) + 1, seconds=len(words) / 31.25
                )
                await connection.send(p.encode(end))

    def _log(self, question: p.LogQuery) -> p.LogReply:
        files = tuple(sorted(self.logs))
        if not question.file:
            return p.LogReply(id=question.id, files=files)
        lines = self.logs[question.file]
        if question.pattern:
            lines = [line for line in lines if re.search(question.pattern, line)]
        start = max(0, len(lines) - question.lines) if question.offset < 0 else question.offset
        part = lines[start : start + question.lines]
        return p.LogReply(id=question.id, files=files, lines=tuple(part), offset=start + len(part))
