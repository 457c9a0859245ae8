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

import torch
from torch import Tensor

from midwatch.protocol import Sampled
from shards.common.arrays import Array
from shards.common.errors import ShardError
from trainer.batches import DeviceRows, filled, may_trim, samples_a_replica, share
from trainer.distributed.mesh import together
from trainer.model.sharded_model import ShardedModel
from trainer.objectives.advantages import adaptive, kl
from trainer.objectives.loss import last_place, real
from trainer.objectives.objective import ScoredResponses
from trainer.objectives.ppo.loss import RolloutData as Noted
from trainer.objectives.reward.loss import score_places
from trainer.rollout.reward_function import RewardError, by_function
from trainer.rollout.sampling import SampledResponses, log_probs, log_probs_and_entropy, over_rows, sample_responses
from trainer.stage.training import Training
from trainer.transfer import on_device

SHOWN = 16
"""Responses of a rollout that are reported at the most."""


def collect(training: Training) -> dict[str, float] | None:
    """Draws the next rollout into `training.experience`: its metrics; None where it was broken off or had to be put off."""
    stage, at = training.stage.stage, training.progress
    policy = stage.rollout_settings
    training.reporter.flush()
    began = time.monotonic()
    prompts = _prompts(training, stage.prompts_drawn)
    if prompts is None:
        return None
    training.phase("generating")
    every = [prompt for prompt in prompts for _ in range(policy.num_generations)]
    seeds = [_seed(training, at.position * policy.num_generations + number) for number in range(len(every))]
    drawn = sample_responses(training, every, policy.max_new_tokens, policy.temperature, seeds)
    if drawn is None:
        return None
    generated = time.monotonic()
    training.phase("scoring")
    given = score(training, drawn)
    if given is None:
        return None
    found = _noted(training, drawn, given)
    if found is None:
        return None
    rows, noted, metrics = found
    assert training.experience is not None
    training.experience.put(rows, noted)
    at.position += stage.prompts_drawn
    at.drawn.count += 1
    at.drawn.version, at.drawn.updates, at.drawn.left = drawn.version, 0, stage.updates_drawn
    show(training, drawn, given, noted)
    training.phase("training")
    usage = training.rollout_engine().usage
    if slots := sum(each.slots for each in usage):
        metrics["perf/kv_cache_utilization"] = sum(each.tokens for each in usage) / slots
        metrics["perf/kv_padded_ratio"] = sum(each.tokens for each in usage) / max(1, sum(each.padded for each in usage))
    scored = time.monotonic()
    metrics |= {"perf/generate_seconds": generated - began, "perf/score_seconds": scored - generated}
    tokens = float(sum(map(len, drawn.responses)))
    metrics["perf/generated_tokens_per_second"] = tokens / max(1e-9, generated - began)
    return metrics


def score(training: Training, drawn: SampledResponses) -> Tensor | None:
    """Scores [responses]; NaN of a response that has none. None where it had to be put off. By all ranks alike.

    An empty response has none, nor has one that the function gives None or the reward model what is not a number. That none of a
    whole rollout's has one is a fault of what scores them: there would be nothing to learn from, whatever is drawn.
    """
    stage, device = training.stage.stage, training.world.device
    written = on_device([bool(response) for response in drawn.responses], torch.bool, device)
    if stage.rollout_settings.function is not None:
        found: list[list[float]] = []
        problem = together(lambda: found.append(by_function(training, drawn)), training.world, RewardError)
        if problem:
            training.hold_for_data(problem, retries=False)
            return None
        given = on_device(found[0], torch.float32, device)
    else:
        assert training.roles.reward_model is not None
        rows = _as_ended(drawn, training.tokenizer.turn_end)
        every = over_rows(training, training.roles.reward_model, rows, ShardedModel.scores)
        given = every.gather(1, score_places(rows)[:, None])[:, 0]
    ended = on_device(drawn.ended, torch.bool, device)
    given = given - stage.rollout_settings.missing_eos_penalty * (~ended).float()
    lacking = int((written & ~given.isfinite()).sum())
    if lacking and lacking == int(written.sum()):
        who = stage.rollout_settings.function or "the reward model"
        training.hold_for_data(f"{who}: none of {lacking} responses has a score (correct it and resume)", retries=False)
        return None
    if lacking:
        text = f"{lacking} of {len(written)} responses have no score, or one that is not a number; they are left out"
        training.note("alarm", text)
    return given.masked_fill(~(written & given.isfinite()), math.nan)


def _as_ended(drawn: SampledResponses, end: int) -> DeviceRows:
    """The rows with the end of a turn behind each response that was cut off, or as its last token where the row is full.

    A reward model has only learned what it says once a turn has ended. What it says of another token is arbitrary: it varies more
    from one last token to the next than with all that is before them. A policy then learns to be cut off, and no critic can tell
    the score beforehand. OpenRLHF ends what it scores in the same way.
    """
    rows, context = drawn.rows, drawn.rows.tokens.shape[1]
    unended = [bool(response) and not ended for response, ended in zip(drawn.responses, drawn.ended, strict=True)]
    cut = on_device(unended, torch.bool, rows.tokens.device)[:, None]
    place = torch.arange(context, device=rows.tokens.device) == (last_place(rows.segments >= 0)[:, None] + 1).clamp(max=context - 1)
    return rows._replace(tokens=rows.tokens.masked_fill(cut & place, end), segments=rows.segments.masked_fill(cut & place, 0))


def _noted(training: Training, drawn: SampledResponses, given: Tensor) -> tuple[DeviceRows, Noted, dict[str, float]] | None:
    """The rows with what is learned from in their mask, what updates need to know of each token, and the rollout's metrics.

    The KL's coefficient is steered on the way. None, with nothing changed, where the responses are not the policy's and had to be
    put off.
    """
    stage, drawn_at = training.stage.stage, training.progress.drawn
    coefficient = training.progress.settings["kl_coef"] * (
        drawn_at.kl_scale if stage.rollout_settings.kl_target is not None else 1.0
    )
    policy, written = stage.rollout_settings, drawn.rows.mask
    old, entropy = log_probs_and_entropy(training, training.model, drawn)
    assert training.reference is not None
    reference = log_probs(training, training.reference, drawn)
    scored = given.isfinite()
    rules = training.stage.objective.rollout
    assert rules is not None
    learned = rules.learned(scored, policy)
    mask = written * learned[:, None]
    metrics = distances(old, reference, entropy, written) | _scores_of(given)
    metrics |= {
        "policy/truncated_fraction": 1 - sum(drawn.ended) / max(1, len(drawn.ended) - drawn.skipped),
        "policy/empty": float(drawn.skipped),
        "policy/unscored": float(len(scored) - drawn.skipped - int(scored.sum())),
        "policy/skipped": float(len(learned) - int(learned.sum())),
        "policy/kl_coefficient": coefficient,
        "policy/logprob_mismatch": float((old - drawn.engine).abs().sum()) / max(1.0, float(written.sum())),
        "policy/weights_step": float(drawn.version),
    }
    if not metrics["policy/logprob_mismatch"] <= policy.mismatch and _mismatched(training, metrics["policy/logprob_mismatch"]):
        return None
    worth = real(_normalised(training, given, scored) if policy.normalise else given, scored)
    rows = drawn.rows._replace(mask=mask)
    critic = training.roles.critic
    values = None if critic is None else real(over_rows(training, critic.model, drawn.rows, ShardedModel.scores), mask)
    credit = rules.credit(ScoredResponses(worth, scored, mask, old, reference, values, coefficient, policy))
    metrics |= credit.metrics
    if policy.kl_target is not None:
        drawn_at.kl_scale = adaptive(
            drawn_at.kl_scale, metrics["policy/kl_sequence"], policy.kl_target, policy.kl_horizon, int(written.any(-1).sum())
        )
    return rows, Noted(old, credit.advantages, credit.returns, values, reference), metrics


def _mismatched(training: Training, mismatch: float) -> bool:
    """Says that engine and trainer differ; whether the rollout is put off for it: what a server drew is not learned from then."""
    policy, rollout_engine = training.stage.stage.rollout_settings, training.rollout_engine()
    text = f"engine and trainer differ by {mismatch:.3g} nats a token about what was drawn"
    text = f"{text} (more than rollout.mismatch {policy.mismatch:g}): their weights or positions are not the same"
    if rollout_engine.serves_from is None:
        training.note("alarm", text)
        return False
    rollout_engine.forget()
    processed = "" if policy.temperature == 1.0 else " with --logprobs-mode processed_logprobs"
    training.hold_for_data(f"{text} (start the server again{processed} from {rollout_engine.serves_from})", retries=False)
    return True


def _scores_of(given: Tensor) -> dict[str, float]:
    """Mean and sample deviation of those that have one."""
    there = given[given.isfinite()]
    if not len(there):
        return {}
    return {"policy/reward": float(there.mean()), "policy/reward_std": float(there.std()) if len(there) > 1 else 0.0}


def distances(policy: Tensor, reference: Tensor, entropy: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the policy is from the reference on what it drew; log-probabilities, entropies and mask [responses, context].

    With d = log pi - log pi_ref of each drawn token (Schulman 2020, "Approximating KL divergence"): `policy/kl` is the mean of
    k3 = exp(-d) - 1 + d over tokens, which is never negative; `policy/kl_k1` that of d itself, `policy/kl_sequence` the mean over
    responses of d summed. All log-probabilities must be taken at the temperature that the responses were drawn at.
    """
    policy, reference = real(policy, mask), real(reference, mask)
    sums = torch.stack([policy - reference, kl(policy, reference, "k3"), real(entropy, mask), mask]).sum((1, 2)).tolist()
    k1, k3, sharding, tokens = sums
    responses = float(mask.any(-1).sum())
    if not tokens:
        return {"policy/kl_sequence": 0.0}
    return {
        "policy/kl": k3 / tokens,
        "policy/kl_k1": k1 / tokens,
        "policy/kl_sequence": k1 / responses,
        "policy/entropy": sharding / tokens,
        "policy/response_length": tokens / responses,
    }


def _normalised(training: Training, given: Tensor, scored: Tensor) -> Tensor:
    """Scores divided by the deviation of all so far: Welford's running one, in the form of Chan et al. 1979 for many at a time."""
    at, new = training.progress.drawn, given[scored].double()
    count = len(new)
    if count:
        mean = float(new.mean())
        apart, total = mean - at.mean, at.scores + count
        at.squares += float((new - mean).square().sum()) + apart * apart * at.scores * count / total
        at.mean += apart * count / total
        at.scores = total
    deviation = math.sqrt(at.squares / (at.scores - 1)) if at.scores > 1 else 1.0
    return given / (deviation + 1e-6)


def minibatch(training: Training) -> tuple[list[DeviceRows], list[Noted], float, int]:
    """The next update's responses: this replica's share in micro-batches; of all replicas' the objective's weight and the tokens.

    Each epoch takes the rollout in another order.
    """
    stage, at, model, held = training.stage.stage, training.progress, training.model, training.experience
    assert held is not None
    number = at.drawn.updates % (held.responses // stage.global_batch)
    epoch = at.drawn.updates // (held.responses // stage.global_batch)
    generator = torch.Generator().manual_seed(_seed(training, at.drawn.count * 1_009 + epoch) % 2**63)
    order = torch.randperm(held.responses, generator=generator)
    chosen = order[number * stage.global_batch : (number + 1) * stage.global_batch]
    mine = chosen[slice(*share(0, len(chosen), model.replica, model.replicas))]
    samples, size = filled(samples_a_replica(stage.global_batch, model.replicas), stage.micro_batch, training.world.pipeline.size)
    length = held.length() if may_trim(training.recipe, stage) else stage.context
    parts = list(held.parts(mine, samples, size, length))
    mask = held.mask()[chosen.numpy()]
    return [rows for rows, _ in parts], [noted for _, noted in parts], training.stage.objective.weight(mask), int(mask.sum())


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


def show(training: Training, drawn: SampledResponses, given: Tensor | None, noted: Noted | None) -> None:
    """Reports some of the responses: the best, the worst, the longest, the furthest from the reference, and the first ones."""
    there = [number for number, response in enumerate(drawn.responses) if response]
    scores = [score if math.isfinite(score) else None for score in given.tolist()] if given is not None else None
    apart: list[float] | None = None
    if noted is not None and noted.reference is not None:
        apart = real(noted.old - noted.reference, drawn.rows.mask).sum(-1).tolist()
    ways: list[dict[int, float]] = [{number: float(len(drawn.responses[number])) for number in there}]
    if scores is not None:
        known = {number: score for number in there if (score := scores[number]) is not None}
        ways += [known, {number: -score for number, score in known.items()}]
    if apart is not None:
        ways.append({number: apart[number] for number in there})
    chosen = [max(way, key=way.__getitem__) for way in ways if way]
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
