"""Text from the model itself: continuations to look at, and fresh responses on which a policy's distance is measured.

Plain decoding without a cache: every token costs a whole forward. Under FSDP every forward is a joint one, so all ranks take
the same number of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.protocol import Sampled
from shards.errors import ShardError
from shards.feed import open_held_out
from trainer.batch import Rows, share
from trainer.documents import undivided
from trainer.optimizer import total
from trainer.parallel import reduce, together
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
    responses = generate(training, prompts, TEMPERATURE, seed=_seed(training, 0))
    if responses is None:
        return True
    for prompt, response in zip(stage.prompts, responses, strict=True):
        text = tokenizer.decode(response)
        training.link.send(Sampled(stage=stage.name, step=at.step, lineage=at.lineage, prompt=prompt, text=text))
    return False


@torch.no_grad()
def generate(training: Training, prompts: Sequence[Sequence[int]], temperature: float, seed: int) -> list[list[int]] | None:
    """Continuations of at most `sample_tokens` ids, up to EOS; None if broken off. Prompts keep their ends.

    Every rank gives the same number of prompts.
    """
    stage, tokenizer, world = training.stage.stage, training.tokenizer, training.world
    longest = min(stage.sample_tokens, stage.context - 1)
    rows = [list(prompt[-(stage.context - longest) :]) for prompt in prompts]
    starts = [len(row) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    finished = [False] * len(rows)
    network = training.network
    masked, network.documents_masked = network.documents_masked, False
    try:
        for _ in range(longest):
            if training.boundary.peek():
                return None
            if not reduce([int(not all(finished))], world.control, dist.ReduceOp.MAX)[0]:
                break
            logits = _next_logits(training, rows)
            drawn = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator).flatten().tolist()
            for at, token in enumerate(drawn):
                if not finished[at]:
                    rows[at].append(token)
                    finished[at] = token == tokenizer.eos
    finally:
        network.documents_masked = masked
        network.reshard()
    return [row[start:] for row, start in zip(rows, starts, strict=True)]


def _next_logits(training: Training, rows: list[list[int]]) -> Tensor:
    """Logits of what follows each row: [rows, vocabulary]. Rows are filled up behind their ends, where nobody looks."""
    device, width = training.world.device, max(len(row) for row in rows)
    tokens = torch.tensor([row + [training.tokenizer.pad] * (width - len(row)) for row in rows], device=device)
    positions = torch.arange(width, device=device).expand_as(tokens)
    return training.network.next_logits(tokens, positions, torch.tensor([len(row) - 1 for row in rows], device=device))


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
    start, stop = share(0, RESPONSES, network.replica, network.replicas)
    prompts = [known[at % len(known)] for at in range(start, max(stop, start + 1))]
    training.phase("sampling")
    responses = generate(training, prompts, 1.0, seed=_seed(training, 1 + network.replica))
    if responses is None:
        return None
    sums = total(_distance(training, prompts, responses) * network.speaks).tolist()
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
    tokens, targets, mask, positions = (part.to(device) for part in (tokens, targets, mask, positions))
    rows = Rows(tokens, targets, mask, torch.zeros_like(tokens), positions, undivided(len(prompts), width, device))
    assert training.reference is not None
    policy, entropy = training.network.log_probs(rows, entropy=True).unbind(-1)
    d = policy - training.reference.log_probs(rows)
    for each in training.networks:
        each.reshard()
    by_token = torch.stack([d, torch.expm1(-d) + d, entropy]) * rows.mask
    counts = torch.tensor([rows.mask.sum().item(), float(len(prompts))], device=device)
    return torch.cat([by_token.sum((1, 2)), counts])


def _seed(training: Training, stream: int) -> int:
    """Of the run's seed, the step, and who draws."""
    return (training.recipe.run.seed * 1_000_003 + training.progress.step) * 1_009 + stream
