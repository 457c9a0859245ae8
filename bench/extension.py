"""Context extension: what each way of stretching positions does to held-out long text, before and after some training.

    python -m bench.extension

A small model of bytes is trained on the standard library's source with a short context, once for each kind of positions. Each
way of extension then starts from those same weights: no parameter changes shape, and none is converted. Measured is the loss on
held-out files in rows four times as long, in nats a byte: over the bytes past the short context, before any training with long
rows and after some; and, before, over the bytes within it, which an extension should leave as good as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from midwatch.recipe.model import Model, Rope
from shards.readers.sources import ReadPosition
from shards.readers.splits import split
from shards.spec import Source
from shards.tokenization.records import Document
from trainer.model.decoder import Decoder
from trainer.model.logprobs import log_probs

VOCABULARY = 256
TIMES = 4
"""The long context over the short one."""


@dataclass(frozen=True)
class Size:
    """How much of it: the bench's own size, and one for a test of seconds."""

    layers: int = 3
    width: int = 96
    context: int = 64
    steps: int = 600
    long_steps: int = 40
    batch: int = 24
    held_out: int = 32
    """Long rows that are measured."""
    lr: float = 1.5e-3


@dataclass(frozen=True)
class Way:
    """A way to read long rows: the stage's settings."""

    name: str
    position: Any
    rope: Rope | None = None
    """None: as they are."""
    factor: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """Losses in nats a byte."""

    way: Way
    within: float
    """Long rows, bytes within the short context, before training with long rows."""
    before: float
    """Bytes past the short context."""
    after: float
    """The same after training with long rows."""
    short: float
    """Rows of the short context, after the training at that length."""


WAYS = (
    Way("RoPE, as it is", "rope"),
    Way("RoPE, theta 80,000", "rope", Rope(theta=80_000.0)),
    Way("RoPE, linear", "rope", Rope(kind="linear", factor=TIMES)),
    Way("RoPE, NTK-aware", "rope", Rope(kind="ntk", factor=TIMES)),
    Way("RoPE, dynamic NTK", "rope", Rope(kind="dynamic", factor=TIMES)),
    Way("RoPE, YaRN", "rope", Rope(kind="yarn", factor=TIMES)),
    Way("RoPE, Llama 3's", "rope", Rope(kind="llama3", factor=TIMES)),
    Way("learned, interpolated", "learned", factor=TIMES),
    Way("sinusoidal, as it is", "sinusoidal"),
    Way("sinusoidal, interpolated", "sinusoidal", factor=TIMES),
    Way("ALiBi, as it is", "alibi"),
)


def texts() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's source: of files to train on, and of those held out, each laid end to end."""
    parts: tuple[list[bytes], list[bytes]] = [], []
    for _, record, held_out in split(Source(name="code", kind="text", origin="stdlib-code"), 0.1, 0, ReadPosition()):
        if isinstance(record, Document) and held_out is not None:
            parts[held_out].append("".join(record.parts).encode())
    train, held = (torch.from_numpy(np.frombuffer(b"\n".join(part), np.uint8).astype(np.int64)) for part in parts)
    return train, held


def learn(model: Decoder, text: Tensor, context: int, rows: int, steps: int, lr: float, seed: int) -> None:
    """Trains on rows drawn from the text, with AdamW and a cosine to nothing."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    for step in range(steps):
        at = 0.5 * (1 + np.cos(np.pi * step / steps)) * min(1.0, (step + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * at
        starts = torch.randint(0, len(text) - context - 1, (rows,), generator=generator)
        row = torch.stack([text[start : start + context + 1] for start in starts])
        loss = -_scores(model, row).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _scores(model: Decoder, rows: Tensor) -> Tensor:
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return log_probs(model(tokens, positions, torch.zeros_like(tokens)), targets)


@torch.no_grad()
def losses(model: Decoder, text: Tensor, context: int, rows: int) -> Tensor:
    """Mean loss at each place of held-out rows, [context]."""
    starts = torch.linspace(0, len(text) - context - 1, rows).long()
    found = [-_scores(model, torch.stack([text[s : s + context + 1] for s in part])) for part in starts.split(64)]
    return torch.cat(found).mean(0)


def extend(ways: tuple[Way, ...], size: Size) -> Iterator[Outcome]:
    """Each way's outcome; models are trained once for each kind of positions."""
    train, held = texts()
    bases: dict[str, Decoder] = {}
    long = size.context * TIMES
    for way in ways:
        if way.position not in bases:
            bases[way.position] = _short(way.position, train, size)
        model = copy.deepcopy(bases[way.position])
        short = float(losses(model, held, size.context, size.held_out).mean())
        model.set_positions(way.rope or Rope(), size.context, way.factor)
        first = losses(model, held, long, size.held_out)
        learn(model, train, long, max(1, size.batch // TIMES), size.long_steps, size.lr / 3, seed=2)
        after = losses(model, held, long, size.held_out)
        past = slice(size.context, None)
        yield Outcome(way, float(first[: size.context].mean()), float(first[past].mean()), float(after[past].mean()), short)


def _short(position: Any, text: Tensor, size: Size) -> Decoder:
    config = Model(num_layers=size.layers, hidden_size=size.width, num_heads=max(2, size.width // 32), position=position)
    if position == "learned":
        config = msgspec.structs.replace(config, max_positions=size.context)
    model = Decoder(config, VOCABULARY)
    model.initialise(0)
    model.set_positions(Rope(), size.context)
    learn(model, text, size.context, size.batch, size.steps, size.lr, seed=1)
    return model


def main() -> None:
    size, console = Size(), Console()
    table = Table(title=f"nats a byte of held-out source, trained at {size.context} bytes, read at {size.context * TIMES}")
    table.add_column("positions")
    for column in ("short rows", "long: within", "long: past, before", f"past, after {size.long_steps} steps"):
        table.add_column(column, justify="right")
    for found in extend(WAYS, size):
        values = (found.short, found.within, found.before, found.after)
        table.add_row(found.way.name, *(f"{value:.3f}" for value in values))
    console.print(table)


if __name__ == "__main__":
    main()
