"""Text from the model itself: continuations to look at, and fresh responses on which a policy's distance is measured.

The ranks' engines write it, with the policy's weights of the moment.
"""

from __future__ import annotations

from midwatch.protocol import Sampled
from shards.common.arrays import Array
from shards.common.errors import ShardError
from shards.sampling.batches import open_held_out
from trainer.distributed.mesh import together
from trainer.rollout.rollout import distances, score
from trainer.rollout.sampling import log_probs, log_probs_and_entropy, sample_responses
from trainer.stage.training import Training

TEMPERATURE = 0.8
"""Of the continuations that are shown. Responses that are measured are drawn as the stage draws what it learns from, else at 1."""
RESPONSES = 8
"""Fresh responses an evaluation measures, over all ranks."""


def show_samples(training: Training) -> bool:
    """Reports a continuation of each of the stage's prompts; whether it was broken off."""
    stage, at = training.stage.stage, training.progress
    training.sampled = training.mark
    if not stage.prompts or stage.scalar:
        return False
    training.phase("sampling")
    tokenizer = training.tokenizer
    if stage.objective == "pretrain":
        prompts = [tokenizer.prompt(prompt) for prompt in stage.prompts]
    else:
        prompts = [tokenizer.chat([("user", prompt)])[0] for prompt in stage.prompts]
    tokens = min(stage.sample_tokens, stage.context - 1)
    if tokens < 1:
        return False
    kept = [prompt[-(stage.context - tokens) :] for prompt in prompts]
    drawn = sample_responses(training, kept, tokens, TEMPERATURE, [_seed(training, 0, number) for number in range(len(kept))])
    if drawn is None:
        return True
    for prompt, response in zip(stage.prompts, drawn.responses, strict=True):
        text = tokenizer.decode(response)
        training.link.send(Sampled(stage=stage.name, step=at.step, lineage=at.lineage, prompt=prompt, text=text))
    return False


def policy_metrics(training: Training) -> dict[str, float] | None:
    """How far the policy is from the reference on fresh responses to held-out prompts; None if broken off.

    Of a policy that learns from its responses that is their score and KL, by source: `eval/NAME/reward`, `eval/NAME/kl` (k3 a
    token), `eval/NAME/kl_sequence` (k1 summed). They are drawn at the stage's temperature, and the KL is that of the two
    distributions at this temperature: what the stage's `kl` limits. Else what `distances` has, and DPO's implicit reward as
    `policy/reward`: beta times the summed log-ratio.
    """
    stage = training.stage.stage
    if training.reference is None:
        return {}
    sources = [task.name for task in training.stage.tasks if task.stage is stage]
    found: dict[str, float] = {}
    for stream, source in enumerate(sources if stage.draws else sources[:1], 1):
        values = _on_held_out(training, source, stream)
        if values is None:
            return None
        found |= values
    return found


def _on_held_out(training: Training, source: str, stream: int) -> dict[str, float] | None:
    stage, world = training.stage.stage, training.world
    count = stage.eval_samples if stage.draws else RESPONSES
    known: list[Array] = []

    def read() -> None:
        held = open_held_out(training.stage.made.get(source, training.data), source, "prompt", stage.context, limit=count)
        known.extend(held.prompts(0, count))

    problem = together(read, world, ShardError)
    if problem:
        training.hold_for_data(problem)
        training.evaluated = None
        return None
    tokens = stage.rollout_settings.max_new_tokens if stage.draws else min(stage.sample_tokens, stage.context - 1)
    if not known or tokens < 1:
        return {}
    training.phase("sampling")
    prompts = [known[number % len(known)] for number in range(max(len(known) if stage.draws else count, training.model.replicas))]
    prompts = [prompt[-(stage.context - tokens) :] for prompt in prompts]
    seeds = [_seed(training, stream, number) for number in range(len(prompts))]
    drawn = sample_responses(training, prompts, tokens, stage.temperature, seeds)
    if drawn is None:
        return None
    assert training.reference is not None
    policy, entropy = log_probs_and_entropy(training, training.model, drawn)
    far = distances(policy, log_probs(training, training.reference, drawn), entropy, drawn.rows.mask)
    if not stage.draws:
        return far | {"policy/reward": training.progress.settings.get("beta", stage.beta) * far["policy/kl_sequence"]}
    given = score(training, drawn)
    if given is None:
        training.evaluated = None
        return None
    scored = given.isfinite()
    told = {"reward": float(given[scored].mean())} if int(scored.sum()) else {}
    told |= {name: far[f"policy/{name}"] for name in ("kl", "kl_sequence", "response_length") if f"policy/{name}" in far}
    return {f"eval/{source}/{name}": value for name, value in told.items()}


def _seed(training: Training, stream: int, number: int) -> int:
    """Of the run's seed, the step, what it is for, and the response's number."""
    return ((training.recipe.run.seed * 1_000_003 + training.progress.step) * 1_009 + stream) * 1_000_003 + number
