"""`midwatch probe`: a checkpoint's answers at the shell, one or in conversation; through the controller, or without one.

An event loop in a thread of its own holds the way to the weights, so that the terminal's line editing and Ctrl-C stay the main
thread's: Ctrl-C ends the answer, and at the prompt the conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TextIO

import msgspec

from launcher.cli.chat_repl import Talk
from launcher.cli.runs import find_anywhere, read_ledger
from launcher.controller.probe.process import Prober
from midwatch import protocol as p
from midwatch.recipe import load_recipe
from midwatch.run_directory import RunPaths, controller_lives
from midwatch.transport.client import Client, ClientError
from midwatch.transport.ssh_url import RemoteRun
from midwatch.words import plural
from shards.common.terminal import write_error, write_json, write_out

Answers = Callable[[p.ProbeAsk], AsyncGenerator[p.ProbeAnswer]]
CONNECT_SECONDS = 90.0
"""ssh's login included."""


def probe(arguments: argparse.Namespace) -> int:
    """The exit status: 0 answered, 1 not, with the reason on standard error."""
    names = (arguments.checkpoint, arguments.against) if arguments.against else (arguments.checkpoint,)
    form = "text" if arguments.text else "chat" if arguments.chat else "auto"
    ask = p.ProbeAsk(
        ask=0,
        checkpoints=names,
        prompt="",
        form=form,  # type: ignore[arg-type]  # argparse's choices are the literal's
        limit=arguments.limit,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop_strings=tuple(arguments.stop),
        alternatives=arguments.alternatives if arguments.json else 0,
    )
    with Way(find_anywhere(arguments.run)) as way:
        if arguments.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
            return Talk(ask, lambda asked, out: show(way.answers(asked), asked, out)).run()
        try:
            prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
        except UnicodeDecodeError as error:
            write_error(f"midwatch: standard input is not UTF-8: byte 0x{error.object[error.start]:02x} (convert the prompt)")
            return 2
        ask = msgspec.structs.replace(ask, prompt=prompt)
        if arguments.json:
            return _show_json(way.answers(ask))
        try:
            problems, _ = show(way.answers(ask), ask)
        except KeyboardInterrupt:
            write_out()
            return 130
        return 1 if problems else 0


def show(answers: Iterator[p.ProbeAnswer], ask: p.ProbeAsk, out: TextIO | None = None) -> tuple[int, list[str]]:
    """Writes answers (to standard output by default) as they come, the second after the first; how many failed, and their texts."""
    texts, held = [""] * len(ask.checkpoints), [""] * len(ask.checkpoints)
    ended: dict[int, p.ProbeEnd] = {}
    now = 0

    def write(words: str) -> None:
        write_out(words, end="", to=out, flush=True)

    def finish() -> None:
        """The first that is not written yet has ended: those that follow, as far as they are."""
        nonlocal now
        while now in ended:
            if texts[now] and not texts[now].endswith("\n"):
                write("\n")
            if ended[now].problem:
                write_error(f"midwatch: {ended[now].problem}")
            elif len(texts) > 1:
                write(f"--- {_figures(ended[now])}\n")
            now += 1
            if now < len(texts):
                write(held[now])
                held[now] = ""

    for answer in answers:
        which = answer.which
        words = ""
        if isinstance(answer, p.ProbeBegan):
            words = f"--- {answer.checkpoint} ({answer.stage})\n" if len(texts) > 1 else ""
        else:
            texts[which] += answer.text
            words = answer.text
        if which == now:
            write(words)
        else:
            held[which] += words
        if isinstance(answer, p.ProbeEnd):
            ended[which] = answer
            finish()
    return sum(bool(end.problem) for end in ended.values()), texts


def _figures(end: p.ProbeEnd) -> str:
    score = f", score {end.score:.3f}" if end.score is not None else ""
    return f"{plural(end.tokens, 'token')}, {end.tokens_per_second:.1f} a second, {end.finish}{score}"


def _show_json(answers: Iterator[p.ProbeAnswer]) -> int:
    """One object a message."""
    status = 0
    for answer in answers:
        told = msgspec.to_builtins(answer)
        if isinstance(answer, p.ProbeEnd):
            told["tokens_per_second"] = answer.tokens_per_second
            status |= bool(answer.problem)
            if answer.problem:
                write_error(f"midwatch: {answer.problem}")
        write_json(told, flush=True)
    return status


class Way:
    """To the weights: the run's controller, or the process itself where none lives. Use as `with Way(run) as way`."""

    def __init__(self, run: Path | RemoteRun) -> None:
        self._run = run
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="probe-way", daemon=True)
        self._stack = contextlib.AsyncExitStack()
        self._ask: Answers

    def __enter__(self) -> Way:
        """Raises ClientError."""
        self._thread.start()
        try:
            self._ask = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(CONNECT_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def answers(self, ask: p.ProbeAsk) -> Iterator[p.ProbeAnswer]:
        """What is answered, until every answer has ended; left before that, they are stopped."""
        told: queue.SimpleQueue[p.ProbeAnswer | Exception | None] = queue.SimpleQueue()

        async def follow() -> None:
            try:
                async with contextlib.aclosing(self._ask(ask)) as answers:
                    async for answer in answers:
                        told.put(answer)
            except Exception as error:
                told.put(error)
            told.put(None)

        following = asyncio.run_coroutine_threadsafe(follow(), self._loop)
        try:
            while (answer := told.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            following.cancel()

    def _end(self) -> None:
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._stack.aclose(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _open(self) -> Answers:
        try:
            client = await self._stack.enter_async_context(Client(self._run, read_only=True))
        except ClientError:
            if isinstance(self._run, RemoteRun) or not RunPaths(self._run).is_run() or controller_lives(RunPaths(self._run)):
                raise
        else:
            return client.probe
        paths = RunPaths(self._run)
        ledger = read_ledger(self._run)
        prober = Prober(paths, load_recipe(paths.recipe))
        self._stack.push_async_callback(prober.close)

        async def ask_process(ask: p.ProbeAsk) -> AsyncGenerator[p.ProbeAnswer]:
            if ledger.checkpoints:  # else the run never had a controller, and what there is lies in its directory
                found = [ledger.find("latest" if name == "newest" else name) for name in ask.checkpoints]
                for each in found:
                    if isinstance(each, str):
                        raise ClientError(each)
                ids = tuple(each.id for each in found if not isinstance(each, str))
                ask = msgspec.structs.replace(ask, checkpoints=ids)
            answers: asyncio.Queue[p.ProbeAnswer] = asyncio.Queue()
            number = await prober.ask(ask, answers.put_nowait)
            left = set(range(len(ask.checkpoints)))
            try:
                while left:
                    answer = await answers.get()
                    if isinstance(answer, p.ProbeEnd):
                        left.discard(answer.which)
                    yield answer
            finally:
                prober.stop(number)

        return ask_process
