"""Encodes documents in worker processes; the result does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shards.common.arrays import Array
from shards.common.errors import ShardError, SpecError
from shards.common.linux import kill_with_parent
from shards.spec import Kind
from shards.tokenization.chat import Message
from shards.tokenization.records import Document, SampledAnswer
from shards.tokenization.templates import DEFAULT, Template
from shards.tokenization.tokenizer import Tokenizer, token_dtype, train

_STOPPING = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Encoded:
    """A batch of documents, one after the other."""

    tokens: Array
    mask: npt.NDArray[np.uint8] | None  # for sft and preference, as the manifest has it
    lengths: list[int]  # tokens of each document
    text_bytes: list[int]  # bytes of UTF-8 of each


def encode(tokenizer: Tokenizer, kind: Kind, batch: list[Document]) -> Encoded:
    """Text: `[BOS] text [EOS]`. Sft: a chat. Unpaired: the same.

    Preference: a chat's prompt, one response with its end, the other with its end.
    """
    text_bytes = [sum(len(part.encode()) for part in document.parts) for document in batch]
    if kind == "text":
        tokens, counts = tokenizer.encode_texts([document.parts[0] for document in batch])
        return Encoded(tokens, None, counts, text_bytes)
    ids: list[int] = []
    mask: list[int] = []
    lengths: list[int] = []
    for document in batch:
        before = len(ids)
        if kind in ("sft", "unpaired"):
            found, said = _conversation(tokenizer, document)
            ids += found
            mask += said if document.desirable else [2 * each for each in said]
        else:
            (prompt, chosen), (_, rejected) = _pair(tokenizer, document)
            ids += prompt + chosen + rejected
            mask += [0] * len(prompt) + [1] * len(chosen) + [2] * len(rejected)
        lengths.append(len(ids) - before)
    return Encoded(
        tokens=np.array(ids, dtype=token_dtype(tokenizer.vocab)),
        mask=np.array(mask, dtype=np.uint8),
        lengths=lengths,
        text_bytes=text_bytes,
    )


def chats(document: Document, kind: Kind) -> list[list[Message]]:
    """The conversations that a document holds: of sft one, of preference two, with one answer and with the other."""
    if kind == "text":
        return []
    if kind in ("sft", "unpaired"):
        return [list(zip(document.roles or ("user", "assistant"), document.parts, strict=True))]
    prompt: list[Message] = list(zip(document.roles or ("user",), document.parts[:-2], strict=True))
    return [[*prompt, ("assistant", response)] for response in document.parts[-2:]]


def refusal(tokenizer: Tokenizer, kind: Kind, document: Document) -> str:
    """Why the tokenizer's template refuses a document; empty where it does not."""
    both = chats(document, kind)
    reason = next(filter(None, (tokenizer.refusal(chat) for chat in both)), "")
    if not reason and kind == "preference" and _bare(document.parts[-2]) == _bare(document.parts[-1]):
        (_, chosen), (_, rejected) = _pair(tokenizer, document)
        return "both answers are the same, as the template and the tokenizer write them" if chosen == rejected else ""
    return reason


def _bare(text: str) -> str:
    """A text without the differences that templates trim and tokenizers normalise: blanks, case, accents, compatibility forms."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in plain if not letter.isspace() and not unicodedata.combining(letter))


def notes(tokenizer: Tokenizer, kind: Kind, document: Document) -> list[str]:
    """Notes on a document that is trained on, to be counted: what of it is not used."""
    return [*document.notes, *(tokenizer.notes(chats(document, kind)[0]) if kind in ("sft", "unpaired") else [])]


def _conversation(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[int]]:
    """Ids and mask. A sampled answer has exactly the ids that were sampled, and an end only if it ended."""
    (chat,) = chats(document, "sft")
    if not document.sampled:
        return tokenizer.chat(chat, document.masked)
    (sampled,) = document.sampled
    if _is_as_drawn(tokenizer, document.parts[-1], sampled):
        whole, mask = tokenizer.chat(chat, document.masked)
        prompt = _answered(whole, mask)[0]
        return [*prompt, *sampled.ids], [*mask[: len(prompt)], *[1] * len(sampled.ids)]
    return tokenizer.chat(chat, document.masked, ended=sampled.ended)


def _pair(tokenizer: Tokenizer, document: Document) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) for the chosen answer and for the rejected one; see `_conversation`."""
    found = []
    drawn = document.sampled or (SampledAnswer((), True),) * 2
    for chat, text, sampled in zip(chats(document, "preference"), document.parts[-2:], drawn, strict=True):
        prompt, answer = _answered(*tokenizer.chat(chat, ended=sampled.ended))
        found.append((prompt, list(sampled.ids) if _is_as_drawn(tokenizer, text, sampled) else answer))
    return found


def _is_as_drawn(tokenizer: Tokenizer, text: str, sampled: SampledAnswer) -> bool:
    """Whether the ids decode to the text. If not, another tokenizer made them, or the text was edited since."""
    ids = sampled.ids
    body = ids[:-1] if sampled.ended else ids
    if not ids or sampled.ended != (ids[-1] in tokenizer.stops) or not all(0 <= id < tokenizer.vocab for id in ids):
        return False
    return tokenizer.stops.isdisjoint(body) and tokenizer.decode(body).strip() == text.strip()


def _answered(ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """The prompt and the last answer of a conversation, without what the template writes after it."""
    stop = len(mask) - mask[::-1].index(1)
    start = stop
    while start and mask[start - 1]:
        start -= 1
    return ids[:start], ids[start:stop]


class Workers:
    """`count` processes that train a tokenizer and encode; with 0 this process does it. As a context it ends them.

    Each has one pipe and one batch at a time, in turn, so results are in the order of the batches. A worker whose parent has
    ended reads the end of its pipe, and ends, too.
    """

    def __init__(self, count: int) -> None:
        self._tokenizer: Tokenizer | None = None
        self._workers: list[tuple[BaseProcess, Connection]] = []
        context = multiprocessing.get_context("spawn")
        if count:
            resource_tracker.ensure_running()  # now: starting it below would unblock the signals
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid()), name=f"shards-encode-{number}", daemon=True)
            # A process inherits blocked signals, so that a signal to the group does not reach it before it is ready.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._workers.append((process, ours))

    def train(self, texts: list[str], vocab: int, kind: Literal["bpe", "unigram"], template: Template = DEFAULT) -> bytes:
        """A tokenizer model; see shards.tokenization.tokenizer.train."""
        if not self._workers:
            return train(texts, vocab=vocab, kind=kind, template=template)
        worker = self._workers[0]
        self._send(worker, ("train", texts, vocab, kind, template))
        model: bytes = self._receive(worker)
        return model

    def use(self, model: bytes, template: Template = DEFAULT) -> None:
        """Encode with this tokenizer from now on."""
        self._tokenizer = Tokenizer(model, template=template)
        for worker in self._workers:
            self._send(worker, ("use", model, template))
            self._receive(worker)

    def run(self, function: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Call `function(*task)` for each task in a free process; yields each task when it is done, in any order."""
        if not self._workers:
            for task in tasks:
                function(*task)
                yield task
            return
        waiting = deque(tasks)
        idle = list(self._workers)
        busy: dict[Connection, tuple[tuple[BaseProcess, Connection], tuple[Any, ...]]] = {}
        try:
            while True:
                while idle and waiting:
                    worker, task = idle.pop(), waiting.popleft()
                    self._send(worker, ("call", function, task))
                    busy[worker[1]] = worker, task
                if not busy:
                    return
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    worker, task = busy.pop(pipe)
                    self._receive(worker)
                    idle.append(worker)
                    yield task
        except BaseException:
            self.close()  # a running task may take minutes, and its result is not needed
            raise

    def encode(self, kind: Kind, batches: Iterable[tuple[list[Document], Any]]) -> Iterator[tuple[Encoded, Any]]:
        """Each batch encoded, in order, with the object that came with it. Reads ahead by the number of workers."""
        assert self._tokenizer is not None
        if not self._workers:
            for batch, along in batches:
                yield encode(self._tokenizer, kind, batch), along
            return
        idle = deque(self._workers)
        busy: deque[tuple[tuple[BaseProcess, Connection], Any]] = deque()
        try:
            for batch, along in batches:
                worker = idle.popleft()
                self._send(worker, ("encode", kind, batch))
                busy.append((worker, along))
                if not idle:
                    worker, along = busy.popleft()
                    result = self._receive(worker)
                    idle.append(worker)
                    yield result, along
            while busy:
                worker, along = busy.popleft()
                result = self._receive(worker)
                yield result, along
        finally:
            while busy:  # left early: a running batch must not be taken for the answer to the next request
                with suppress(ShardError):
                    self._receive(busy.popleft()[0])

    def _send(self, worker: tuple[BaseProcess, Connection], message: tuple[Any, ...]) -> None:
        try:
            worker[1].send(message)
        except OSError:
            raise self._lost(worker[0]) from None

    def _receive(self, worker: tuple[BaseProcess, Connection]) -> Any:
        try:
            outcome, value = worker[1].recv()
        except (EOFError, OSError):
            raise self._lost(worker[0]) from None
        if outcome == "refused":
            raise SpecError(value)
        if outcome == "wrong":
            raise ShardError(value)
        if outcome == "os":
            name, why = value
            raise OSError(0, why, name)
        if outcome == "failed":
            raise RuntimeError(f"in an encoding worker:\n{value}")
        return value

    def _lost(self, process: BaseProcess) -> ShardError:
        process.join(5)
        return ShardError(
            f"an encoding worker exited unexpectedly (exit status {process.exitcode}; -9 usually means that memory ran out):"
            " the same command resumes after the last complete shard; --workers 1 needs less memory"
        )

    def close(self) -> None:
        """End the processes, whatever they are doing, and wait for them."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _end_with(parent: int) -> None:
    """Ends this process with its parent, even within a task: its files could get in the way of the next build.

    Where the system cannot do that, it ends after its task, when it reads the end of its pipe.
    """
    kill_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def _work(pipe: Connection, parent: int) -> None:
    """The main loop of a worker: answer requests until the pipe ends."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of rensa: there is already a process for each core
    tokenizer: Tokenizer | None = None
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, Any]
        try:
            if message[0] == "train":
                answer = "done", train(message[1], vocab=message[2], kind=message[3], template=message[4])
            elif message[0] == "use":
                tokenizer = Tokenizer(message[1], template=message[2])
                answer = "done", None
            elif message[0] == "call":
                message[1](*message[2])
                answer = "done", None
            else:
                assert tokenizer is not None
                answer = "done", encode(tokenizer, message[1], message[2])
        except SpecError as error:
            answer = "refused", str(error)
        except ShardError as error:
            answer = "wrong", str(error)
        except OSError as error:
            answer = "os", (error.filename, error.strerror or str(error))
        except Exception:
            answer = "failed", traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:
            return
