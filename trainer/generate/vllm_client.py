"""Generation by a server of somebody else's that speaks vLLM's protocol: the same requests in, the same responses out.

    /v1/models            what is served, and how long its rows may be
    /v1/completions       token ids in; `return_token_ids` gives those of the response, `logprobs` the chosen tokens' own
    /collective_rpc       `reload_weights` with the directory to read (with VLLM_SERVER_DEV_MODE=1, as the next)
    /reset_prefix_cache   what was cached is of older weights

Every request has a thread and a connection for as long as it is under way, so that leaving off closes the connections, which
makes the server leave off too.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec

from shards.common.decoding import UNDECODABLE, DecodeError, brief, json_as, shown
from trainer.generate.bounded import AnswerTooLargeError, bound_answer, read_answer
from trainer.generate.request import Request, Response

THREADS = "generate"
"""What the names of the threads begin with."""
CONNECT = 10.0
"""Seconds for a connection at the most; it is made or refused at once, or not at all."""
_LARGEST = 1 << 28
"""Bytes of an answer at the most."""
_TOKEN_ID = "token_id:"
Found = TypeVar("Found")


class ServerError(Exception):
    """The server is not there, refuses, or says what cannot be; the message names it and says the way out."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None]
    tokens: list[str] = []


class _Scored(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, _Scored] | None] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class Under(Generic[Found]):
    """Jobs under way in threads of their own, so many at a time; `close` breaks off what is left and joins them."""

    def __init__(self, jobs: Sequence[Callable[[ConnectionPool], Found]], most: int) -> None:
        self._lines = ConnectionPool()
        self._pool = ThreadPoolExecutor(max(1, min(most, len(jobs))), thread_name_prefix=THREADS)
        self._jobs: list[Future[Found]] = [self._pool.submit(job, self._lines) for job in jobs]

    def wait(self, seconds: float) -> bool:
        """Whether all is done; false after so many seconds at the latest."""
        return not wait(self._jobs, seconds).not_done

    @property
    def problem(self) -> str | None:
        """What the first that failed says; a bug is raised."""
        for job in self._jobs:
            if job.done() and not job.cancelled():
                error = job.exception()
                if isinstance(error, ServerError | OSError):
                    return str(error)
                if error is not None:
                    raise error
        return None

    def results(self) -> list[Found]:
        return [job.result() for job in self._jobs]

    def close(self) -> None:
        self._lines.cut()
        self._pool.shutdown(cancel_futures=True)


class ConnectionPool:
    """Open connections, which another thread may cut."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._cut = False

    @contextlib.contextmanager
    def hold(self, line: socket.socket) -> Any:
        with self._lock:
            if self._cut:
                raise ConnectionAbortedError("left off")
            self._open.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(line)

    def cut(self) -> None:
        """All that are open, and all that would be opened."""
        with self._lock:
            self._cut = True
            for line in self._open:
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)


class Server:
    """What is known of it; several threads may ask at a time."""

    def __init__(self, url: str, model: str | None, timeout: float, context: int, vocabulary: int, weights: str) -> None:
        """timeout: seconds of one answer. context, vocabulary: of what it should serve, which is in the directory `weights`."""
        self.url, self._timeout, self._context, self._vocabulary = url.rstrip("/"), timeout, context, vocabulary
        self._wanted, self._model, self._weights = model, model, weights
        parts = urlsplit(self.url)
        self._secure, self._host, self._port, self._path = parts.scheme == "https", parts.hostname or "", parts.port, parts.path

    def meet(self, lines: ConnectionPool) -> None:
        """Learns what it serves. Raises ServerError where that cannot be the policy."""
        cards = self._read("/v1/models", self._ask(lines, "GET", "/v1/models"), _Models).data
        names = [card.id for card in cards]
        if self._wanted is not None and self._wanted not in names:
            raise self._error(
                "/v1/models", f"serves {', '.join(names) or 'nothing'}, not {self._wanted!r}", "correct [generate] model"
            )
        if not cards:
            raise self._error("/v1/models", "serves nothing", f"start it with {self._weights}")
        card = cards[names.index(self._wanted)] if self._wanted is not None else cards[0]
        self._model = card.id
        if card.max_model_len is not None and card.max_model_len < self._context:
            problem = f"takes {card.max_model_len} tokens at the most, and the stage's context is {self._context}"
            raise self._error("/v1/models", problem, f"start it with --max-model-len {self._context}")

    def reload(self, lines: ConnectionPool, directory: str) -> None:
        """Takes over the weights there, and forgets what it cached with others. Raises ServerError."""
        told = {"method": "reload_weights", "kwargs": {"weights_path": directory}, "timeout": self._timeout}
        self._ask(lines, "POST", "/collective_rpc", told)
        self._ask(lines, "POST", "/reset_prefix_cache?reset_running_requests=true", {})

    def respond(self, lines: ConnectionPool, request: Request, version: int) -> Response:
        """Raises ServerError."""
        limit = min(request.limit, self._context - len(request.prompt))
        asked = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": limit,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "seed": request.seed % 2**63,
            "stop_token_ids": sorted(request.stops),
            "stop": request.stop_strings,
            # Only what is asked for ends or bends a response, whatever the model's generation_config.json has.
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_p": 0.0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        told = self._read("/v1/completions", self._ask(lines, "POST", "/v1/completions", asked), _Completion)
        if len(told.choices) != 1:
            raise self._error("/v1/completions", f"gave {len(told.choices)} responses to one prompt", "is it vLLM?")
        return self._response(told.choices[0], request, limit, version)

    def prompt_log_probs(self, lines: ConnectionPool, prompt: tuple[int, ...]) -> list[float]:
        """Log-probabilities of a prompt's tokens but the first, at temperature 1. Raises ServerError."""
        asked = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 1.0,
            "ignore_eos": True,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        told = self._read("/v1/completions", self._ask(lines, "POST", "/v1/completions", asked), _Completion)
        scored = told.choices[0].prompt_logprobs if len(told.choices) == 1 else None
        if scored is None:
            raise self._error("/v1/completions", "gives no log-probabilities of prompts", "use a vLLM that has `prompt_logprobs`")
        found = [
            one[str(id)].logprob if one is not None and str(id) in one else math.nan
            for id, one in zip(prompt[1:], scored[1:], strict=False)
        ]
        if len(scored) != len(prompt) or not all(map(math.isfinite, found)):
            problem = f"gives no log-probability for some of a prompt's {len(prompt)} tokens"
            raise self._error("/v1/completions", problem, "its weights may be damaged: look at its log")
        return found

    def stale(self, problem: str) -> ServerError:
        """The error of a server that has loaded the policy's weights and answers with others."""
        way_out = f"start it again with {self._weights}, which has all weights written out, and the dtype of the model"
        return self._error("/collective_rpc", f"answers with other weights than it was told to load: it {problem}", way_out)

    def _response(self, choice: _Choice, request: Request, limit: int, version: int) -> Response:
        def wrong(problem: str, way_out: str) -> ServerError:
            return self._error("/v1/completions", problem, way_out)

        if choice.logprobs is None:
            raise wrong("gives no log-probabilities", "use a vLLM that has `logprobs` in completions")
        tokens, given = _ids(choice, choice.logprobs), choice.logprobs.token_logprobs
        if tokens is None:
            raise wrong("gives no token ids", "use a vLLM that has `return_token_ids`, 0.10.2 or later")
        if choice.prompt_token_ids is not None and tuple(choice.prompt_token_ids) != request.prompt:
            raise wrong("answers another prompt than the one that it was asked", "it must neither shorten prompts nor add to them")
        if len(tokens) != len(given):
            raise wrong(
                f"gives {len(tokens)} tokens and {len(given)} log-probabilities", "nothing was taken over; resume to ask again"
            )
        if not all(0 <= token < self._vocabulary for token in tokens):
            problem = f"gives token {max(tokens)}, and the vocabulary has {self._vocabulary}"
            raise wrong(problem, f"start it with {self._weights}")
        log_probs = [value for value in given if value is not None and math.isfinite(value)]
        if len(log_probs) != len(given):
            raise wrong("gives a log-probability that is not a number", "its weights may be damaged: look at its log")
        if choice.finish_reason == "stop" and 0 < len(tokens) <= limit:
            return Response(tokens, log_probs, "stop", version, version)
        if choice.finish_reason == "length" and len(tokens) == limit:
            return Response(tokens, log_probs, "length", version, version)
        problem = f"ends a response of {len(tokens)} tokens, of {limit} at the most, with {shown(choice.finish_reason)}"
        raise wrong(problem, "look at its log, and resume to ask again")

    def _ask(self, lines: ConnectionPool, method: str, place: str, body: object = None) -> bytes:
        """The body of an answer that is not an error's. Raises ServerError."""
        until, limit = time.monotonic() + self._timeout, min(CONNECT, self._timeout)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=limit)
        try:
            connection.connect()
            limit = self._timeout
            assert connection.sock is not None
            with lines.hold(connection.sock):
                bound_answer(connection, until, _LARGEST)
                connection.sock.settimeout(max(0.001, until - time.monotonic()))
                sent = None if body is None else msgspec.json.encode(body)
                connection.request(method, self._path + place, sent, {"Content-Type": "application/json", "Connection": "close"})
                answer = connection.getresponse()
                found = read_answer(answer)
        except AnswerTooLargeError:
            raise self._error(place, "does not come to an end", "is it vLLM?") from None
        except TimeoutError:
            way_out = "look at its log, or raise [generate] timeout" if limit == self._timeout else "is its machine up?"
            raise self._error(place, f"did not answer within {limit:g} s", way_out) from None
        except (OSError, http.client.HTTPException) as error:
            why = (
                f"{error.strerror or error}"
                if isinstance(error, OSError)
                else f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
            raise self._error(
                place, f"cannot be asked ({why})", f"start it with {self._weights}, or correct [generate] url"
            ) from None
        finally:
            connection.close()
        if answer.status == 404 and not place.startswith("/v1/"):
            raise self._error(place, "has no such endpoint", "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment")
        if answer.status != 200:
            raise self._error(place, f"refuses: {answer.status} {_reason(found)}", "look at its log")
        return found

    def _read(self, place: str, body: bytes, kind: type[Found]) -> Found:
        try:
            return json_as(body, kind)
        except DecodeError as error:
            raise self._error(place, f"says what is not of the protocol ({error})", "is it vLLM?") from None

    def _error(self, place: str, problem: str, way_out: str) -> ServerError:
        return ServerError(f"{self.url}{place.partition('?')[0]}: the server {problem} ({way_out})")


def _ids(choice: _Choice, log_probs: _LogProbs) -> list[int] | None:
    """From `token_ids`, or spelled out where log-probabilities stand, as servers without the one have it."""
    if choice.token_ids is not None:
        return choice.token_ids
    spelled = [token.removeprefix(_TOKEN_ID) for token in log_probs.tokens if token.startswith(_TOKEN_ID)]
    if not spelled or len(spelled) != len(log_probs.tokens) or not all(map(str.isdecimal, spelled)):
        return None
    return [int(token) for token in spelled] if all(len(token) < 20 for token in spelled) else None


def _reason(body: bytes) -> str:
    """What an error's body says, in a line."""
    with contextlib.suppress(*UNDECODABLE):
        told: Any = msgspec.json.decode(body)
        if isinstance(told, dict):
            error = told.get("error", told)
            told = error.get("message", error.get("detail", told)) if isinstance(error, dict) else error
        return " ".join(str(told).split())[:300]
    return " ".join(body.decode(errors="replace").split())[:300]
