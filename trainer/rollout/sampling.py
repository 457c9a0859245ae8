"""Responses of the policy, drawn by all ranks, and their log-probabilities and scores by the policy, the reference and others.

Whatever comes out is whole on every rank: rows [responses, context], of which each replica has computed a share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shards.common.arrays import Array
from trainer.batches import DeviceRows, may_trim, of_one, samples_a_replica, share, trimmed
from trainer.generate import Request, Response
from trainer.generate.vllm_client import ServerError
from trainer.model.sharded_model import ShardedModel
from trainer.objectives.loss import real
from trainer.stage.training import Training
from trainer.transfer import on_device, sent

Ids = Sequence[int] | Array


@dataclass(frozen=True)
class SampledResponses:
    """Prompts and the policy's responses; a prompt that is too long has an empty one, which weighs nothing."""

    prompts: list[list[int]]
    responses: list[list[int]]
    ended: list[bool]
    """Whether the response came to its end by itself."""
    rows: DeviceRows
    """[responses, context], on the device: all tokens of each; `mask` where the target is of the response."""
    engine: Tensor
    """[responses, context]: the engine's log-probabilities of the response's tokens, where these are targets."""
    version: int
    """Of the weights that drew them."""
    temperature: float = 1.0
    """At which they were drawn. Their log-probabilities are taken at the same one (`log_probs`), by every network: at another one
    the mean of log pi - log pi_ref is no KL, and may be far below 0."""

    @property
    def skipped(self) -> int:
        return sum(not response for response in self.responses)


def sample_responses(
    training: Training, prompts: Sequence[Ids], tokens: int, temperature: float, seeds: Sequence[int]
) -> SampledResponses | None:
    """A response of at most `tokens` ids to each prompt; None if it was broken or put off. By all ranks, with the same prompts."""
    context, stops = training.stage.stage.context, frozenset(training.tokenizer.stops)
    asked = [number for number, prompt in enumerate(prompts) if 0 < len(prompt) <= context - min(tokens, context - 1)]
    requests = [Request(tuple(map(int, prompts[number])), tokens, temperature, seed=seeds[number], stops=stops) for number in asked]
    rollout_engine = training.rollout_engine()
    rollout_engine.refresh(training.progress.step)
    peek = training.boundary.peek
    try:
        if not rollout_engine.hand_over([request.prompt for request in requests], partial(_of_prompts, training), peek):
            return None
        answers = rollout_engine.respond(requests, peek)
    except ServerError as error:
        training.hold_for_data(str(error))
        training.evaluated = None
        return None
    if answers is None:
        return None
    found: dict[int, Response] = dict(zip(asked, answers, strict=True))
    responses = [found[number].tokens if number in found else [] for number in range(len(prompts))]
    log_probs = [found[number].log_probs if number in found else [] for number in range(len(prompts))]
    ended = [number in found and found[number].finish == "stop" for number in range(len(prompts))]
    kept = [[int(id) for id in prompt] if number in found else [] for number, prompt in enumerate(prompts)]
    device = training.world.device
    columns, engine = _rows(kept, responses, log_probs, context, training.tokenizer.pad)
    rows = of_one(*(sent(column, device) for column in columns))
    return SampledResponses(kept, responses, ended, rows, sent(engine, device), training.progress.step, temperature)


def _of_prompts(training: Training, prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """The policy's log-probabilities [tokens] of the prompts' tokens but each one's first, at temperature 1. By all ranks."""
    model, context = training.model, training.stage.stage.context
    firsts, rest = [[prompt[0]] for prompt in prompts], [list(prompt[1:]) for prompt in prompts]
    columns, _ = _rows(firsts, rest, [[0.0] * len(each) for each in rest], context, training.tokenizer.pad)
    rows = of_one(*(sent(column, training.world.device) for column in columns))
    with model.configured(temperature=1.0):
        every = over_rows(training, model, rows, ShardedModel.log_probs)
    return every[rows.mask.bool()]


def _rows(
    prompts: list[list[int]], responses: list[list[int]], log_probs: list[list[float]], context: int, pad: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    shape = (len(prompts), context)
    tokens, targets, segments = torch.full(shape, pad), torch.full(shape, pad), torch.full(shape, -1)
    mask, engine = torch.zeros(shape), torch.zeros(shape)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if response:
            ids, drawn = torch.tensor([*prompt, *response]), slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            tokens[row, : len(ids)], targets[row, : len(ids) - 1] = ids, ids[1:]
            segments[row, : len(ids)], mask[row, drawn] = 0, 1
            engine[row, drawn] = torch.tensor(log_probs[row])
    return (tokens, targets, mask, segments), engine


@torch.no_grad()
def over_rows(
    training: Training, model: ShardedModel, rows: DeviceRows, through: Callable[[ShardedModel, DeviceRows], Tensor]
) -> Tensor:
    """What a forward gives for all the rows, in micro-batches, each replica a share: whole on every rank."""
    policy, stage, device = training.model, training.stage.stage, training.world.device
    count, context = rows.tokens.shape
    length = trimmed(rows.segments.cpu().numpy()) if may_trim(training.recipe, stage) else context
    start, stop = share(0, count, policy.replica, policy.replicas)
    each = samples_a_replica(count, policy.replicas)
    found: list[Tensor] = []
    for first in range(0, each, stage.micro_batch):
        training.heartbeat.beat(training.progress.step)
        # Replicas with a row less take the last one again, so that all have as many forwards.
        places = [min(start + at, count - 1) for at in range(first, min(first + stage.micro_batch, each))]
        chosen = on_device(places, torch.int64, device)
        columns = (rows.tokens, rows.targets, rows.mask, rows.segments)
        found.append(through(model, of_one(*(column[chosen, :length] for column in columns))))
    model.reshard()
    mine = torch.cat(found)[: stop - start]
    every = torch.zeros(count, context, *mine.shape[2:], device=device)
    if policy.is_replica_leader:
        every[start:stop, :length] = mine
    dist.all_reduce(every)
    return every


def log_probs(training: Training, model: ShardedModel, drawn: SampledResponses) -> Tensor:
    """Of the responses' tokens by a network, at the temperature that they were drawn at: [responses, context]; else 0."""
    with model.configured(temperature=drawn.temperature):
        return real(over_rows(training, model, drawn.rows, ShardedModel.log_probs), drawn.rows.mask)


def log_probs_and_entropy(training: Training, model: ShardedModel, drawn: SampledResponses) -> tuple[Tensor, Tensor]:
    """The same, and the entropy of what each token was drawn from, in nats: both [responses, context]."""
    with model.configured(temperature=drawn.temperature):
        both = over_rows(training, model, drawn.rows, partial(ShardedModel.log_probs, entropy=True))
    return real(both[..., 0], drawn.rows.mask), real(both[..., 1], drawn.rows.mask)
