"""A server that speaks what Midwatch asks of vLLM's, and answers with an engine that it loads from the directory it is told to.

Endpoints, fields and refusals as in vLLM's own server: vllm/entrypoints/openai/completion and serve/dev, 2026.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open

from midwatch.recipe.huggingface.files import open_directory
from midwatch.recipe.huggingface.weights_map import layout
from midwatch.recipe.model import Model
from trainer.generate import Engine, Request
from trainer.model.decoder import Decoder

Tamper = Callable[[dict[str, Any]], Any]


class StandIn:
    """Answers at `url` until it is closed. What happens to an answer before it is sent is up to `tamper`."""

    def __init__(self, max_model_len: int = 96, names: tuple[str, ...] = ("policy",), developing: bool = True) -> None:
        """developing: VLLM_SERVER_DEV_MODE=1."""
        self.max_model_len, self.names, self.developing = max_model_len, names, developing
        self.loaded: list[Path] = []
        self.resets = 0
        self.asked: list[dict[str, Any]] = []
        self.tamper: Tamper = lambda answer: answer
        self.delay = 0.0
        self.most, self._at_once = 0, 0
        """Requests under way at a time."""
        self.engine: Engine | None = None
        self.decoder: Decoder | None = None
        """The same weights, for what is asked of a prompt's own tokens."""
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._http: http.server.ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, port: int = 0) -> None:
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stand_in.get(self)

            def do_POST(self) -> None:
                stand_in.post(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Listening(http.server.ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        self._http = Listening(("127.0.0.1", port), Handler)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="stand-in")
        self._thread.start()

    def close(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
            self._http = None

    def get(self, handler: Any) -> None:
        if handler.path != "/v1/models":
            return self._say(handler, 404, {"detail": "Not Found"})
        cards = [{"id": name, "object": "model", "max_model_len": self.max_model_len} for name in self.names]
        return self._say(handler, 200, {"object": "list", "data": cards})

    def post(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length", 0))) or b"{}")
        place = handler.path.partition("?")[0]
        if place == "/v1/completions":
            return self._complete(handler, body)
        if not self.developing or place not in ("/collective_rpc", "/reset_prefix_cache"):
            return self._say(handler, 404, {"detail": "Not Found"})
        if place == "/reset_prefix_cache":
            self.resets += 1
            return self._say(handler, 200, None)
        if body["method"] != "reload_weights":
            return self._say(handler, 500, {"error": {"message": f"no such method: {body['method']}"}})
        with self._lock:
            self.load(Path(body["kwargs"]["weights_path"]))
        return self._say(handler, 200, {"results": [None]})

    def load(self, directory: Path) -> None:
        """As a real server, of all files in the directory: half of one would not load."""
        found = open_directory(directory)
        model = msgspec.convert(found.keys, Model)
        assert model.vocabulary is not None
        engine = Engine(model, model.vocabulary, torch.device("cpu"), self.max_model_len)
        engine.set_rope(model.rope, model.rope.original_context or self.max_model_len)
        weights = {}
        with safe_open(directory / "model.safetensors", "pt") as file:
            for name, part in layout(model, found.family, model.vocabulary).items():
                rows = [file.get_slice(piece.tensor)[piece.start : piece.start + piece.length] for piece in part.pieces]
                weights[name] = torch.cat(rows)
        engine.refresh(weights.items(), len(self.loaded))
        decoder = Decoder(model, model.vocabulary)
        decoder.set_positions(model.rope, model.rope.original_context or self.max_model_len)
        decoder.load_state_dict(weights)
        self.engine, self.decoder = engine, decoder
        self.loaded.append(directory)

    def _complete(self, handler: Any, body: dict[str, Any]) -> None:
        with self._counting:
            self._at_once += 1
            self.most = max(self.most, self._at_once)
            self.asked.append(body)
        try:
            time.sleep(self.delay)
            answer = self.tamper(self._answer(body))
        finally:
            with self._counting:
                self._at_once -= 1
        self._say(handler, 200, answer)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["model"] in self.names
        assert body["ignore_eos"] and body["return_token_ids"]
        if "prompt_logprobs" in body:
            return self._scored(body)
        assert body["logprobs"] == 0
        request = Request(
            tuple(body["prompt"]),
            body["max_tokens"],
            body["temperature"],
            body["top_p"],
            body["top_k"],
            body["seed"],
            frozenset(body["stop_token_ids"]),
        )
        with self._lock:
            assert self.engine is not None
            found = self.engine.generate([request])
        assert found is not None
        (response,) = found
        spelled = [f"token_id:{id}" for id in response.tokens]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": response.finish,
            "stop_reason": None,
            "token_ids": response.tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": response.log_probs, "tokens": spelled, "top_logprobs": None, "text_offset": []},
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """A prompt's own log-probabilities."""
        assert body["prompt_logprobs"] == 0 and body["temperature"] == 1.0
        prompt = body["prompt"]
        with self._lock:
            assert self.decoder is not None
            ids = torch.tensor([prompt])
            places, documents = torch.arange(len(prompt))[None], torch.zeros_like(ids)
            with torch.no_grad():
                found = self.decoder(ids, places, documents, ids.roll(-1))[0, :-1].tolist()
        scored = [None, *({str(id): {"logprob": value}} for id, value in zip(prompt[1:], found, strict=True))]
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None, "prompt_token_ids": prompt}
        return {"id": "cmpl-1", "object": "text_completion", "choices": [choice | {"prompt_logprobs": scored}]}

    def _say(self, handler: Any, status: int, body: object) -> None:
        """bytes are sent as they are, a tuple with another status, half of a list's only member; None is an empty answer."""
        if isinstance(body, tuple):
            status, body = body
        whole = body[0] if isinstance(body, list) else body
        raw = whole if isinstance(whole, bytes) else b"" if whole is None else json.dumps(whole).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(raw)))
            if isinstance(body, list):
                raw, handler.close_connection = raw[: len(raw) // 2], True
            handler.end_headers()
            handler.wfile.write(raw)
        except (BrokenPipeError, ConnectionResetError):
            pass  # nobody waits for it any more
