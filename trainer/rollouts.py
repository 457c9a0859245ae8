"""A rollout: prompts, responses of the policy, their scores, and what follows from these for each token.

    generating   every rank's engine writes its share of the responses
    scoring      the policy, the reference and the value model go over them, the reward model or a function scores them
    the KL check the distance from the reference steers its coefficient
    updating     the loop's ordinary steps, `updates_drawn` of them, each on `global_batch` responses of the rollout

Schulman et al. 2017; Ouyang et al. 2022. What is random derives from the seed and the prompt's number in the stage's order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.protocol import Sampled
from shards.container import Array
from shards.errors import ShardError
from trainer.batch import Rows, filled, may_trim, samples_a_replica, share
from trainer.drawing import Drawn, draw, log_probs_and_entropy, over_rows, scores
from trainer.drawing import log_probs as log_probs_of
from trainer.objectives import grpo
from trainer.objectives.advantages import adaptive, gae, token_rewards, whiten
from trainer.objectives.ppo import Experience as Noted
from trainer.objectives.reward import score_places
from trainer.outside import Outside
from trainer.parallel import together
from trainer.rewards import RewardError, by_function
from trainer.training import Training

SHOWN = 16
"""Responses of a rollout that are reported at the most."""


def collect(training: Training) -> dict[str, float] | None:
    """Draws the next rollout into `training.experience`: its metrics; None where it was broken off or had to be put off."""
    stage, at = training.stage.stage, training.progress
    policy = stage.rollout
    training.reporter.flush()
    began = time.monotonic()
    prompts = _prompts(training, stage.prompts_drawn)
    if prompts is None:
        return None
    training.phase("generating")
    every = [prompt for prompt in prompts for _ in range(policy.responses)]
    seeds = [_seed(training, at.position * policy.responses + number) for number in range(len(every))]
    drawn = draw(training, every, policy.tokens, policy.temperature, seeds)
    if drawn is None:
        return None
    generated = time.monotonic()
    training.phase("scoring")
    judged = judge(training, drawn)
    if judged is None:
        return None
    found = _noted(training, drawn, *judged)
    if found is None:
        return None
    noted, metrics = found
    assert training.experience is not None
    training.experience.put(drawn.rows, noted)
    at.position += stage.prompts_drawn
    at.drawn.count += 1
    at.drawn.version, at.drawn.updates, at.drawn.left = drawn.version, 0, stage.updates_drawn
    show(training, drawn, judged[0], noted)
    training.phase("training")
    usage = training.responder().usage
    if slots := sum(each.slots for each in usage):
        metrics["perf/kv_used"] = sum(each.tokens for each in usage) / slots
        metrics["perf/kv_padded"] = sum(each.tokens for each in usage) / max(1, sum(each.padded for each in usage))
    scored = time.monotonic()
    metrics |= {"perf/generate_seconds": generated - began, "perf/score_seconds": scored - generated}
    tokens = float(sum(map(len, drawn.responses)))
    metrics["perf/generated_tokens_per_second"] = tokens / max(1e-9, generated - began)
    return metrics


def judge(training: Training, drawn: Drawn) -> tuple[Tensor, Tensor] | None:
    """Scores [responses], and the mask [responses, context] without responses that have none; None where it had to be put off."""
    stage = training.stage.stage
    if stage.rollout.function is not None:
        found: list[list[float]] = []
        problem = together(lambda: found.append(by_function(training, drawn)), training.world, RewardError)
        if problem:
            training.hold_for_data(problem, retries=False)
            return None
        given = torch.tensor(found[0], device=training.world.device)
    else:
        assert training.cast.judge is not None
        every = over_rows(training, training.cast.judge, drawn.rows, scores)
        given = every.gather(1, score_places(drawn.rows)[:, None])[:, 0]
    ended = torch.tensor(drawn.ended, device=given.device)
    given = given - stage.rollout.missing_eos * (~ended).float()
    bad = ~torch.isfinite(given)
    if int(bad.sum()):
        training.note("alarm", f"{int(bad.sum())} of {len(bad)} responses have a score that is not a number; they are left out")
    return given.masked_fill(bad, 0.0), drawn.rows.mask * (~bad)[:, None]


def _noted(training: Training, drawn: Drawn, given: Tensor, mask: Tensor) -> tuple[Noted, dict[str, float]] | None:
    """What updates need to know of each token, and the rollout's metrics; the KL's coefficient is steered on the way.

    None, with nothing changed, where the responses are not the policy's and had to be put off.
    """
    stage, drawn_at = training.stage.stage, training.progress.drawn
    coefficient = training.progress.settings["kl"] * (drawn_at.kl_scale if stage.rollout.kl_target is not None else 1.0)
    policy, rows = stage.rollout, drawn.rows._replace(mask=mask)
    both = over_rows(training, training.network, rows, log_probs_and_entropy)
    old, entropy = both[..., 0] * mask, both[..., 1]
    assert training.reference is not None
    reference = over_rows(training, training.reference, rows, log_probs_of) * mask
    real, responses, tokens = mask.any(-1), max(1, int(mask.any(-1).sum())), max(1.0, float(mask.sum()))
    metrics = distances(old, reference, entropy, mask)
    metrics |= {
        "policy/reward": float((given * real).sum()) / responses,
        "policy/reward_deviation": float(given[real].std()) if responses > 1 else 0.0,
        "policy/truncated": 1 - sum(drawn.ended) / max(1, len(drawn.ended) - drawn.skipped),
        "policy/skipped": float(len(drawn.ended) - int(real.sum())),
        "policy/kl_coefficient": coefficient,
        "policy/mismatch": float(((old - drawn.engine) * mask).abs().sum()) / tokens,
        "policy/version": float(drawn.version),
    }
    if metrics["policy/mismatch"] > policy.mismatch and _mismatched(training, metrics["policy/mismatch"]):
        return None
    worth = _normalised(training, given, real) if policy.normalise else given
    if stage.objective == "grpo":
        worth = _without_unscored(worth, real, policy.responses)
        advantages = grpo.advantages(worth, policy.responses, policy.advantage == "leave-one-out")[:, None] * mask
        return Noted(old, advantages, reference=reference), metrics
    assert training.cast.critic is not None
    values = over_rows(training, training.cast.critic.network, rows, scores) * mask
    rewards = token_rewards(worth, old - reference, mask, coefficient)
    advantages, returns = gae(rewards, values, mask, policy.gamma, policy.lam)
    if policy.whiten:
        advantages = whiten(advantages, mask)
    if policy.kl_target is not None:
        drawn_at.kl_scale = adaptive(
            drawn_at.kl_scale, metrics["policy/kl_sequence"], policy.kl_target, policy.kl_horizon, responses
        )
    return Noted(old, advantages, returns, values, reference), metrics


def _mismatched(training: Training, mismatch: float) -> bool:
    """Says that engine and trainer differ; whether the rollout is put off for it: what a server drew is not learned from then."""
    policy, responder = training.stage.stage.rollout, training.responder()
    text = f"engine and trainer differ by {mismatch:.3g} nats a token about what was drawn"
    text = f"{text} (more than policy.mismatch {policy.mismatch:g}): their weights or positions are not the same"
    if not isinstance(responder, Outside):
        training.note("alarm", text)
        return False
    responder.forget()
    processed = "" if policy.temperature == 1.0 else " with --logprobs-mode processed_logprobs"
    training.hold_for_data(f"{text} (start the server again{processed} from {responder.latest})", retries=False)
    return True


def _without_unscored(worth: Tensor, real: Tensor, group: int) -> Tensor:
    """Those that have no score get the mean of their group's others, so that they say nothing of these."""
    scores, there = worth.view(-1, group), real.view(-1, group)
    mean = (scores * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(there, scores, mean).flatten()


def distances(policy: Tensor, reference: Tensor, entropy: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the policy is from the reference on what it drew; log-probabilities, entropies and mask [responses, context].

    With d = log pi - log pi_ref of each drawn token (Schulman 2020, "Approximating KL divergence"): `policy/kl` is the mean of
    k3 = exp(-d) - 1 + d over tokens, `policy/kl_k1` that of d itself, `policy/kl_sequence` the mean over responses of d summed.
    """
    d = (policy - reference) * mask
    sums = torch.stack([d, torch.expm1(-d) + d, entropy * mask, mask]).sum((1, 2)).tolist()
    k1, k3, spread, tokens = sums
    responses = float(mask.any(-1).sum())
    if not tokens:
        return {"policy/kl_sequence": 0.0}
    return {
        "policy/kl": k3 / tokens,
        "policy/kl_k1": k1 / tokens,
        "policy/kl_sequence": k1 / responses,
        "policy/entropy": spread / tokens,
        "policy/response_length": tokens / responses,
    }


def _normalised(training: Training, given: Tensor, real: Tensor) -> Tensor:
    """Scores divided by the deviation of all so far: Welford's running one, in the form of Chan et al. 1979 for many at a time."""
    at, new = training.progress.drawn, given[real].double()
    count = len(new)
    if count:
        mean = float(new.mean())
        apart, total = mean - at.mean, at.scores + count
        at.squares += float((new - mean).square().sum()) + apart * apart * at.scores * count / total
        at.mean += apart * count / total
        at.scores = total
    deviation = math.sqrt(at.squares / (at.scores - 1)) if at.scores > 1 else 1.0
    return given / (deviation + 1e-6)


def minibatch(training: Training) -> tuple[list[Rows], list[Noted], int]:
    """The next update's responses: this replica's share in micro-batches, and the tokens of all replicas'.

    Each epoch takes the rollout in another order.
    """
    stage, at, network, held = training.stage.stage, training.progress, training.network, training.experience
    assert held is not None
    number = at.drawn.updates % (held.responses // stage.global_batch)
    epoch = at.drawn.updates // (held.responses // stage.global_batch)
    generator = torch.Generator().manual_seed(_seed(training, at.drawn.count * 1_009 + epoch) % 2**63)
    order = torch.randperm(held.responses, generator=generator).to(training.world.device)
    chosen = order[number * stage.global_batch : (number + 1) * stage.global_batch]
    mine = chosen[slice(*share(0, len(chosen), network.replica, network.replicas))]
    samples, size = filled(samples_a_replica(stage.global_batch, network.replicas), stage.micro_batch, training.world.pipeline.size)
    length = held.length() if may_trim(training.recipe, stage) else stage.context
    parts = list(held.parts(mine, samples, size, length))
    return [rows for rows, _ in parts], [noted for _, noted in parts], held.weight(chosen)


def _prompts(training: Training, count: int) -> list[Array] | None:
    found: list[list[Array]] = []
    start = training.progress.position
    problem = together(lambda: found.append(training.stage.feed.prompts(start, start + count)), training.world, ShardError)
    if problem:
        training.hold_for_data(problem)
        return None
    return found[0]


def _seed(training: Training, number: int) -> int:
    return (training.recipe.run.seed * 1_009 + training.progress.stage) * 1_000_000_007 + number


def show(training: Training, drawn: Drawn, given: Tensor | None, noted: Noted | None) -> None:
    """Reports some of the responses: the best, the worst, the longest, the furthest from the reference, and the first ones."""
    there = [number for number, response in enumerate(drawn.responses) if response]
    scores = given.tolist() if given is not None else None
    apart: list[float] | None = None
    if noted is not None and noted.reference is not None:
        apart = ((noted.old - noted.reference) * drawn.rows.mask).sum(-1).tolist()
    ways: list[Sequence[float]] = [[float(len(response)) for response in drawn.responses]]
    if scores is not None:
        ways += [scores, [-score for score in scores]]
    if apart is not None:
        ways.append(apart)
    chosen = [max(there, key=way.__getitem__) for way in ways if there]
    at, tokenizer = training.progress, training.tokenizer
    for number in dict.fromkeys([*chosen, *there][:SHOWN]):
        training.link.send(
            Sampled(
                stage=at.stage_name,
                step=at.step,
                lineage=at.lineage,
                prompt=tokenizer.decode(drawn.prompts[number]),
                text=tokenizer.decode(drawn.responses[number]),
                reward=None if scores is None else scores[number],
                kl=None if apart is None else apart[number],
                tokens=len(drawn.responses[number]),
            )
        )
