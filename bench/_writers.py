"""Who writes responses how fast: `python -m bench._writers ROUNDS RESULT`, on one core and with one thread.

The same ragged requests, greedy and each to its own length, to Midwatch's engine, to transformers' `generate` (padded on the left,
in several batch sizes) and to its continuous batching, all with the weights of one small Llama. Round after round they take turns.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench._ranks import leave_after
from midwatch.recipe import Rope
from midwatch.recipe.huggingface.config import config_of
from midwatch.recipe.huggingface.weights_map import layout
from midwatch.recipe.model import Model
from trainer.generate import Engine, Request
from trainer.generate.engine import STEP_TOKENS
from trainer.model.decoder import Decoder

MODEL, VOCABULARY, CONTEXT = Model(num_layers=6, hidden_size=256, num_heads=8, num_kv_heads=8, intermediate_size=688), 2048, 256
REQUESTS, SHORTEST, LONGEST = 64, 8, 128
PADDED = (16, 32, 64)
"""Batches of transformers' `generate`; the fastest counts."""
Writer = Callable[[], list[list[int]]]


def requests() -> list[Request]:
    """Prompts and responses of many lengths; nothing ends a response before its own."""
    draw = random.Random(0)

    def one() -> Request:
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(SHORTEST, LONGEST)))
        return Request(prompt, draw.randint(SHORTEST, LONGEST), temperature=0)

    return [one() for _ in range(REQUESTS)]


def decoder() -> Decoder:
    made = Decoder(MODEL, VOCABULARY)
    made.initialise(0)
    with torch.no_grad():
        for parameter in made.parameters():  # so that no choice is so close that rounding decides it
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return made


@torch.no_grad()
def llama(ours: Decoder) -> Any:
    """transformers' model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of(MODEL, "llama", Rope(), CONTEXT, CONTEXT, VOCABULARY)
    shape = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    made = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).eval()
    theirs, own = made.state_dict(), dict(ours.named_parameters())
    for name, part in layout(MODEL, "llama", VOCABULARY).items():
        rows = torch.split(own[name], [piece.length for piece in part.pieces])
        for piece, values in zip(part.pieces, rows, strict=True):
            theirs[piece.tensor][piece.start : piece.start + piece.length].copy_(values)
    return made


def padded(model: Any, asked: list[Request], size: int) -> list[list[int]]:
    """In the order in which they came, so many at a time: as long as the longest, of which each one's own part is taken."""
    found: list[list[int]] = []
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        width, most = max(len(each.prompt) for each in batch), max(each.limit for each in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, each in enumerate(batch):
            ids[row, width - len(each.prompt) :], seen[row, width - len(each.prompt) :] = torch.tensor(each.prompt), 1
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=seen, max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        found += [out[row, width : width + each.limit].tolist() for row, each in enumerate(batch)]
    return found


@contextmanager
def continuous(model: Any, asked: list[Request]) -> Iterator[Writer]:
    """transformers' manager, running; with a cache of twice the engine's slots, or it takes most of the machine's memory."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=2 * REQUESTS, page_size=CONTEXT, max_batch_tokens=STEP_TOKENS)
    with model.continuous_batching_context_manager(generation_config=settings, continuous_batching_config=room) as manager:
        rounds = iter(range(1_000_000))

        def write() -> list[list[int]]:
            name, found = next(rounds), {}
            for number, each in enumerate(asked):
                manager.add_request(list(each.prompt), request_id=f"{name}-{number}", max_new_tokens=each.limit)
            while len(found) < len(asked):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError("no result within a minute")
                if result.is_finished():
                    found[result.request_id] = result.generated_tokens
            return [found[f"{name}-{number}"] for number in range(len(asked))]

        yield write


def timed(write: Writer, prepare: Callable[[], None] = lambda: None) -> tuple[float, float, list[list[int]]]:
    """Seconds on the wall, seconds of CPU, and what was written."""
    prepare()
    wall, cpu = time.perf_counter(), time.process_time()
    found = write()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def used(engine: Engine, asked: list[Request]) -> dict[str, float]:
    """Means over steps: of the cache's allocated slots those in use, and of those that padded rows would take."""
    for each in asked:
        engine.add(each)
    paged, rows = [], []
    while engine.busy:
        engine.step()
        usage = engine.usage()
        if usage.slots:
            paged.append(usage.tokens / usage.slots)
            rows.append(usage.tokens / usage.padded)
    return {"paged": statistics.mean(paged), "padded": statistics.mean(rows)}


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    asked, ours = requests(), decoder()
    model = llama(ours)
    engine = Engine(MODEL, VOCABULARY, torch.device("cpu"), CONTEXT, running=REQUESTS)

    def refresh() -> None:  # as before each rollout: nothing is cached
        engine.refresh(ours.named_parameters(), 1)

    def own() -> list[list[int]]:
        found = engine.generate(asked)
        assert found is not None
        return [each.tokens for each in found]

    writers: dict[str, Writer] = {"midwatch": own}
    writers |= {f"padded {size}": lambda size=size: padded(model, asked, size) for size in PADDED}  # type: ignore[misc]  # a lambda's default
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in [*writers, "continuous"]}
    refresh()
    expected = own()
    differ: dict[str, int] = {}

    def turn(name: str, write: Writer) -> None:
        wall, cpu, found = timed(write, refresh if name == "midwatch" else lambda: None)
        differ[name] = sum(one != other for one, other in zip(found, expected, strict=True))
        turns[name].append({"wall_seconds": wall, "cpu_seconds": cpu})

    problem = ""
    for number in range(rounds + 1):
        for name, write in writers.items():
            turn(name, write)
        try:
            if not problem:
                # Only while it is its turn: its thread polls, also with nothing to do.
                with continuous(model, asked) as write:
                    turn("continuous", write)
        except Exception as error:  # whatever another package meets with
            problem = f"{type(error).__name__}: {error}"
        if not number:  # the first round warms all of them up
            turns = {name: [] for name in turns}
    refresh()
    return {
        "tokens": sum(map(len, expected)),
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "responses_that_differ": differ,
        "turns": turns,
        "problem": problem,
        "slots_used": used(engine, asked),
    }


def main() -> None:
    rounds, result = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    Path(result).write_text(json.dumps(measure(int(rounds))))


if __name__ == "__main__":
    leave_after(main)
