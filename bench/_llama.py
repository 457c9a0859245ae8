"""What the trainer is held against: a plain Llama and the training loop around it, in nanoGPT's way, with nothing to steer.

One process, one optimizer over all parameters, batches cut at random from a memory-mapped file of token ids, a forward, a
backward, clipping, a step; the loss is looked at every so many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midwatch.recipe import Model, Stage

LOG_EVERY = 10


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.sizes = [model.num_heads * model.head, model.key_value_heads * model.head, model.key_value_heads * model.head]
        self.head, self.grouped = model.head, model.num_heads != model.key_value_heads
        self.qkv = nn.Linear(model.hidden_size, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.sizes[0], model.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (each.view(batch, time, -1, self.head).transpose(1, 2) for each in self.qkv(x).split(self.sizes, dim=-1))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, a dimension of the first half with its counterpart in the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.attention = Attention(model)
        self.mlp_norm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.gate = nn.Linear(model.hidden_size, model.hidden_width, bias=False)
        self.up = nn.Linear(model.hidden_size, model.hidden_width, bias=False)
        self.down = nn.Linear(model.hidden_width, model.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Tokens and targets [batch, time] to the mean loss; embedding and output layer share their weights."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Model, vocabulary: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, model.hidden_size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        frequency = model.rope_theta ** -(torch.arange(0, model.head, 2) / model.head)
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model.num_layers) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch(data: np.memmap, rows: int, context: int) -> tuple[Tensor, Tensor]:
    """Tokens and what follows each, [rows, context], from random places of the file."""
    places = torch.randint(len(data) - context, (rows,))
    tokens = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in places])
    targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in places])
    return tokens, targets


def rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine down to a part of the peak."""
    if step < stage.resolved_warmup_steps:
        return stage.lr * (step + 1) / stage.resolved_warmup_steps
    done = (step - stage.resolved_warmup_steps) / (stage.steps - stage.warmup_steps)
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: Model, vocabulary: int, stage: Stage, file: Path, steps: int, each: Callable[[int, Callable[[], float]], None]
) -> int:
    """Trains; number of parameters. each: called after every step, with its number and a way to look at its loss."""
    torch.manual_seed(1)
    network = Llama(model, vocabulary, stage.context)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)
    data = np.memmap(file, dtype=np.uint16, mode="r")
    parts = stage.global_batch // stage.micro_batch
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(stage, step)
        for _ in range(parts):
            loss = network(*batch(data, stage.micro_batch, stage.context)) / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = loss.detach() * parts
        if step % LOG_EVERY == 0:
            last.item()
        each(step, last.item)
    return sum(p.numel() for p in network.parameters())
