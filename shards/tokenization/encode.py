"""Documents to token ids, by worker processes; what comes out does not depend on how many there are."""

from __future__ import annotations

import ctypes
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

from shards.errors import ShardError, SpecError
from shards.format.seekable_zstd import Array
from shards.spec import Kind
from shards.tokenization.chat import Message
from shards.tokenization.records import Document, SampledAnswer
from shards.tokenization.templates import DEFAULT, Template
from shards.tokenization.tokenizer import Tokenizer, token_dtype, train

_STOPPING = {signal.SIGINT, signal.SIGTERM}
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


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
    """Why the tokenizer's template does not take a document; empty where it does."""
    both = chats(document, kind)
    reason = next(filter(None, (tokenizer.refusal(chat) for chat in both)), "")
    if not reason and kind == "preference" and _bare(document.parts[-2]) == _bare(document.parts[-1]):
        (_, chosen), (_, rejected) = _pair(tokenizer, document)
        return "both answers are the same, as the template and the tokenizer write them" if chosen == rejected else ""
    return reason


def _bare(text: str) -> str:
    """A text without what templates trim and tokenizers normalise: blanks, case, accents, compatible forms of characters."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in plain if not letter.isspace() and not unicodedata.combining(letter))


def notes(tokenizer: Tokenizer, kind: Kind, document: Document) -> list[str]:
    """What is to be counted of a document that is learned from, because not all of it is."""
    return [*document.notes, *(tokenizer.notes(chats(document, kind)[0]) if kind in ("sft", "unpaired") else [])]


def _conversation(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[int]]:
    """Ids and mask. An answer that a model drew has the very ids that were drawn, and an end only if it came to its end."""
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
    """Twice the prompt, with the chosen answer and with the rejected one; see `_conversation`."""
    found = []
    drawn = document.sampled or (SampledAnswer((), True),) * 2
    for chat, text, sampled in zip(chats(document, "preference"), document.parts[-2:], drawn, strict=True):
        prompt, answer = _answered(*tokenizer.chat(chat, ended=sampled.ended))
        found.append((prompt, list(sampled.ids) if _is_as_drawn(tokenizer, text, sampled) else answer))
    return found


def _is_as_drawn(tokenizer: Tokenizer, text: str, sampled: SampledAnswer) -> bool:
    """Whether ids are a text by this tokenizer; else another one drew them, or the text was edited since."""
    ids = sampled.ids
    body = ids[:-1] if sampled.ended else ids
    if not ids or sampled.ended != (ids[-1] in tokenizer.stops) or not all(0 <= id < tokenizer.vocab for id in ids):
        return False
    return tokenizer.stops.isdisjoint(body) and tokenizer.decode(body).strip() == text.strip()


def _answered(ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """The prompt and the last answer of a conversation; what the template writes behind that is left out."""
    stop = len(mask) - mask[::-1].index(1)
    start = stop
    while start and mask[start - 1]:
        start -= 1
    return ids[:start], ids[start:stop]


class Workers:
    """`count` processes that train a tokenizer and encode; with 0 all is done here. A context: it ends them.

    Each has one pipe and one batch at a time, taken in turn, so results come in the batches' order. A worker whose
    parent is gone reads the end of its pipe, and ends too.
    """

    def __init__(self, count: int) -> None:
        self._tokenizer: Tokenizer | None = None
        self._workers: list[tuple[BaseProcess, Connection]] = []
        context = multiprocessing.get_context("spawn")
        if count:
            resource_tracker.ensure_running()  # which would unblock below what is blocked
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid()), name=f"shards-encode-{number}", daemon=True)
            # A process begins with what is blocked here: a signal to all the group does not meet it before it is ready.
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
        """`function(*task)` for each task, on whichever process is free; yields each task when it is done, in any order."""
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
            self.close()  # a task may take minutes more, and nobody waits for its answer
            raise

    def encode(self, kind: Kind, batches: Iterable[tuple[list[Document], Any]]) -> Iterator[tuple[Encoded, Any]]:
        """Each batch encoded, in order, with whatever came along with it. Reads ahead by the number of workers."""
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
            while busy:  # left early: what is under way must not answer the next question
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
            f"an encoding worker ended by itself (exit status {process.exitcode}; -9 is often too little memory):"
            " the same command goes on from the last whole shard; --workers 1 takes less memory"
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
    """Ends this process when its parent does, in the middle of a task: what it still wrote could meet the next build."""
    with suppress(OSError, AttributeError):  # not Linux: then it ends after its task, which reads the end of the pipe
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(pipe: Connection, parent: int) -> None:
    """A worker's whole life: answer until the pipe ends."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of rensa: there is a process a core already
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
