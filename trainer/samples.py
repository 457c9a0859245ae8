"""Text from the model itself: continuations to look at, and fresh responses on which a policy's distance is measured.

The ranks' engines write it, with the policy's weights of the moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.protocol import Sampled
from shards.errors import ShardError
from shards.feed import open_held_out
from trainer.batch import Rows, share
from trainer.generate import Request
from trainer.optimizer import total
from trainer.parallel import together
from trainer.training import Training

TEMPERATURE = 0.8
"""Of the continuations that are shown; responses that are measured are drawn at 1, or their KL would come out wrong."""
RESPONSES = 8
"""Fresh responses an evaluation measures, over all ranks."""


def show_samples(training: Training) -> bool:
    """Reports a continuation of each of the stage's prompts; whether it was broken off."""
    stage, at = training.stage.stage, training.progress
    training.sampled = training.mark
    if not stage.prompts:
        return False
    training.phase("sampling")
    tokenizer = training.tokenizer
    if stage.objective == "pretrain":
        prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in stage.prompts]
    else:
        prompts = [tokenizer.chat([("user", prompt)])[0] for prompt in stage.prompts]
    responses = generate(training, prompts, TEMPERATURE, stream=0)
    if responses is None:
        return True
    for prompt, response in zip(stage.prompts, responses, strict=True):
        text = tokenizer.decode(response)
        training.link.send(Sampled(stage=stage.name, step=at.step, lineage=at.lineage, prompt=prompt, text=text))
    return False


def generate(training: Training, prompts: Sequence[Sequence[int]], temperature: float, stream: int) -> list[list[int]] | None:
    """Continuations of at most `sample_tokens` ids, up to EOS, on every rank; None if broken off. Prompts keep their ends.

    Every rank gives the same prompts. stream: tells apart what is drawn at the same step.
    """
    stage, stops = training.stage.stage, frozenset([training.tokenizer.eos])
    longest = min(stage.sample_tokens, stage.context - 1)
    if longest < 1:
        return [[] for _ in prompts]
    requests = [
        Request(
            tuple(prompt[-(stage.context - longest) :]), longest, temperature, seed=_seed(training, stream, number), stops=stops
        )
        for number, prompt in enumerate(prompts)
    ]
    responder = training.responder()
    responder.refresh(training.progress.step)
    found = responder.respond(requests, training.boundary.peek)
    return None if found is None else [response.tokens for response in found]


@torch.no_grad()
def policy_metrics(training: Training) -> dict[str, float] | None:
    """How far the policy is from the reference, on fresh responses drawn at temperature 1; None if broken off.

    With d = log pi - log pi_ref of each drawn token (Schulman 2020, "Approximating KL divergence"): `policy/kl` is the mean of
    k3 = exp(-d) - 1 + d over tokens, `policy/kl_k1` that of d itself, `policy/kl_sequence` the mean over responses of d summed.
    `policy/reward` is DPO's implicit reward, beta times that sum.
    """
    stage, world, reference = training.stage.stage, training.world, training.reference
    assert reference is not None
    source = next((exam.samples.name for exam in training.stage.exams if exam.stage is stage), None)
    if source is None:
        return {}
    known: list[list[int]] = []

    def read() -> None:
        held = open_held_out(training.data, source, "prompt", stage.context, limit=RESPONSES)
        known.extend([int(id) for id in prompt] for prompt in held.prompts(0, RESPONSES))

    problem = together(read, world, ShardError)
    if problem:
        training.hold_for_data(problem)
        training.evaluated = None
        return None
    network = training.network
    prompts = [known[at % len(known)] for at in range(max(RESPONSES, network.replicas))]
    training.phase("sampling")
    responses = generate(training, prompts, 1.0, stream=1)
    if responses is None:
        return None
    mine = slice(*share(0, len(prompts), network.replica, network.replicas))
    sums = total(_distance(training, prompts[mine], responses[mine]) * network.speaks).tolist()
    k1, k3, entropy, tokens, count = sums
    if not tokens:
        return {}
    beta = training.progress.settings.get("beta", stage.beta)
    return {
        "policy/kl": k3 / tokens,
        "policy/kl_k1": k1 / tokens,
        "policy/kl_sequence": k1 / count,
        "policy/reward": beta * k1 / count,
        "policy/entropy": entropy / tokens,
        "policy/response_length": tokens / count,
    }


def _distance(training: Training, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """Sums over this rank's responses: of k1, k3 and entropy by token, tokens, responses."""
    device, context = training.world.device, training.stage.stage.context
    width = min(context, max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) - 1)
    shape = (len(prompts), width)
    tokens = torch.full(shape, training.tokenizer.pad)
    targets, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for at, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = [*prompt, *response][-(width + 1) :]
        tokens[at, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[at, : len(ids) - 1] = torch.tensor(ids[1:])
        mask[at, len(ids) - 1 - len(response) : len(ids) - 1] = 1
    positions = torch.arange(width).expand(shape)
    rows = Rows(*(part.to(device) for part in (tokens, targets, mask, torch.zeros_like(tokens), positions)))
    assert training.reference is not None
    policy, entropy = training.network.log_probs(rows, entropy=True).unbind(-1)
    d = policy - training.reference.log_probs(rows)
    for each in training.networks:
        each.reshard()
    by_token = torch.stack([d, torch.expm1(-d) + d, entropy]) * rows.mask
    counts = torch.tensor([rows.mask.sum().item(), float(len(prompts))], device=device)
    return torch.cat([by_token.sum((1, 2)), counts])


def _seed(training: Training, stream: int, number: int) -> int:
    """Of the run's seed, the step, what it is for, and the response's number."""
    return ((training.recipe.run.seed * 1_000_003 + training.progress.step) * 1_009 + stream) * 1_000_003 + number
