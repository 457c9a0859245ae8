"""How each of the objectives that make data makes it, a batch of prompts at a time.

Rejection sampling (Touvron et al. 2023, section 3.2.3; Dong et al. 2023): several responses to a prompt, of which the reward model
likes one best. Constitution (Bai et al. 2022b): the model criticises its own response by a principle, and revises it; and, for
preferences, says which of two it holds better (RLAIF).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shards.common.errors import ShardError
from shards.tokenization.tokenizer import ASSISTANT, SYSTEM, USER, Tokenizer
from trainer.batches import of_one
from trainer.distributed.mesh import together
from trainer.model.sharded_model import ShardedModel
from trainer.objectives.loss import real
from trainer.rollout.rollout import score, show
from trainer.rollout.sampling import SampledResponses, over_rows, sample_responses
from trainer.stage.training import Training
from trainer.synthetic.stage import Made

Turns = list[tuple[str, str]]
"""(role, content)."""

PROBE = "\u2603"
"""A character that no template has."""
CRITIQUE = "Name what in your last answer goes against this principle, and how it could be better: {principle}"
REVISE = "Write the answer again, so that it follows the principle. Give the new answer alone."
COMPARE = (
    "Here are a request and two answers.\n\nRequest: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Which answer follows this principle better: {principle}\nSay A or B."
)


def step(training: Training) -> tuple[Made, dict[str, float]] | None:
    """What one batch of prompts gives, and its metrics; None where it was broken off or had to be put off. By all ranks alike."""
    stage = training.stage.stage
    prompts = _prompts(training)
    found = None
    if prompts is not None:
        found = rejection(training, prompts) if stage.objective == "rejection_sampling" else constitution(training, prompts)
    if found is None or prompts is None:
        return None
    made, metrics = found
    return made, metrics | {"synthetic/skipped": float(stage.global_batch - len(prompts))}


@dataclass(frozen=True)
class SynthesisPrompt:
    turns: Turns
    ids: list[int]


def _prompts(training: Training) -> list[SynthesisPrompt] | None:
    """The next batch's; those whose turns cannot be told any more, because they lost their beginning, are left out."""
    at, count = training.progress.position, training.stage.stage.global_batch
    found: list[SynthesisPrompt] = []

    def read() -> None:
        for ids in training.stage.feed.prompts(at, at + count):
            turns = turns_of(training.tokenizer, ids.tolist())
            if turns is not None:
                found.append(SynthesisPrompt(turns, ids.tolist()))

    problem = together(read, training.world, ShardError)
    if problem:
        training.hold_for_data(problem)
        return None
    return found


def turns_of(tokenizer: Tokenizer, ids: Sequence[int]) -> Turns | None:
    """The conversation that a prompt's ids are of; None if it is not to be had from them."""
    for turns in (_single(tokenizer, ids), _by_roles(tokenizer, ids)):
        if turns and tokenizer.chat(turns)[0] == list(ids):
            return turns
    return None


def _single(tokenizer: Tokenizer, ids: Sequence[int]) -> Turns | None:
    """By what the template puts around a message."""
    around, inner = tokenizer.chat([("user", PROBE)])[0], tokenizer.encode(PROBE)
    start = next((at for at in range(len(around)) if around[at : at + len(inner)] == inner), None)
    if start is None:
        return None
    return [("user", tokenizer.decode(ids[start : len(ids) - (len(around) - start - len(inner))]))]


def _by_roles(tokenizer: Tokenizer, ids: Sequence[int]) -> Turns:
    """By the ids that begin a turn."""
    names = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    roles = {tokenizer.reserved[name]: role for role, name in names.items()}
    starts = [at for at, id in enumerate(ids) if id in roles]
    ends = [*starts[1:], len(ids)]
    turns = [(roles[ids[at]], tokenizer.decode(ids[at + 1 : stop])) for at, stop in zip(starts, ends, strict=True)]
    return turns[:-1] if turns and turns[-1] == ("assistant", "") else turns


def _asked(training: Training, conversations: Sequence[Turns], stream: int) -> SampledResponses | None:
    policy, at, stage = training.stage.stage.rollout_settings, training.progress, training.stage.stage
    seeds = [hash_of(training, at.position * 64 + stream, number) for number in range(len(conversations))]
    ids = [training.tokenizer.chat(turns)[0] for turns in conversations]
    training.phase("generating")
    return sample_responses(training, ids, min(policy.max_new_tokens, stage.context - 1), policy.temperature, seeds)


def hash_of(training: Training, place: int, number: int) -> int:
    return ((training.recipe.run.seed * 1_009 + training.progress.stage) * 1_000_000_007 + place) * 1_000_003 + number


@dataclass(frozen=True)
class SampledAnswerRecord:
    """A response as its record tells of it: the ids that were drawn are what is learned, with an end only if it has one."""

    text: str
    ids: list[int]
    ended: bool

    def fields(self, name: str) -> dict[str, Any]:
        """As the answer `name` of a record: response, chosen or rejected."""
        finish = "finish_reason" if name == "response" else f"{name}_finish_reason"
        return {name: self.text, f"{name}_ids": self.ids, finish: "stop" if self.ended else "length"}


def _answers(training: Training, drawn: SampledResponses) -> list[SampledAnswerRecord]:
    stops, tokenizer = training.tokenizer.stops, training.tokenizer
    texts = [tokenizer.decode([id for id in response if id not in stops]).strip() for response in drawn.responses]
    return [SampledAnswerRecord(*each) for each in zip(texts, drawn.responses, drawn.ended, strict=True)]


def rejection(training: Training, prompts: Sequence[SynthesisPrompt]) -> tuple[Made, dict[str, float]] | None:
    """Of the responses to each prompt the best, and the best beside the worst."""
    count = training.stage.stage.rollout_settings.num_generations
    drawn = _asked(training, [prompt.turns for prompt in prompts for _ in range(count)], 0)
    if drawn is None:
        return None
    training.phase("scoring")
    given = score(training, drawn)
    if given is None:
        return None
    scores, answers = given.tolist(), _answers(training, drawn)
    scored = given.isfinite().tolist()
    made: Made = {"best": [], "pairs": []}
    gained: list[float] = []
    for number, prompt in enumerate(prompts):
        group = [at for at in range(number * count, (number + 1) * count) if scored[at] and answers[at].text]
        if not group:
            continue
        best, worst = max(group, key=scores.__getitem__), min(group, key=scores.__getitem__)
        gained.append(scores[best] - sum(scores[at] for at in group) / len(group))
        asked = _messages(prompt.turns)
        reward = {"reward": scores[best], "of": len(group)}
        made["best"].append({"prompt": asked} | answers[best].fields("response") | reward)
        if answers[best].text != answers[worst].text and scores[best] > scores[worst]:
            rewards = {"chosen_reward": scores[best], "rejected_reward": scores[worst]}
            made["pairs"].append(_pair(asked, answers[best], answers[worst]) | rewards)
    show(training, drawn, given, None)
    known = [value for value, there in zip(scores, scored, strict=True) if there]
    metrics = {
        "policy/reward": sum(known) / max(1, len(known)),
        "policy/empty": float(sum(not answer.text for answer in answers)),
        "policy/unscored": float(len(scored) - drawn.skipped - len(known)),
        "synthetic/gain": sum(gained) / max(1, len(gained)),
        "synthetic/best": float(len(made["best"])),
        "synthetic/pairs": float(len(made["pairs"])),
    }
    return made, metrics


def constitution(training: Training, prompts: Sequence[SynthesisPrompt]) -> tuple[Made, dict[str, float]] | None:
    """Answers, critiques by a principle, and revisions; and of two answers the one that the model holds better."""
    principles, place = training.stage.stage.principles, training.progress.position
    chosen = [random.Random(hash_of(training, place, number)).choice(principles) for number in range(len(prompts))]
    conversations = [list(prompt.turns) for prompt in prompts]
    said: list[list[SampledAnswerRecord]] = []
    for stream, request in enumerate((None, CRITIQUE, REVISE)):
        if request is not None:
            for turns, principle in zip(conversations, chosen, strict=True):
                turns.append(("user", request.format(principle=principle)))
        drawn = _asked(training, conversations, stream)
        if drawn is None:
            return None
        found = _answers(training, drawn)
        for turns, answer in zip(conversations, found, strict=True):
            turns.append(("assistant", answer.text))
        said.append(found)
        if stream == 0:
            show(training, drawn, None, None)
    others = _asked(training, [prompt.turns for prompt in prompts], 3)
    if others is None:
        return None
    answers, critiques, revisions = said
    made: Made = {"revisions": [], "pairs": [], "judged": []}
    for prompt, principle, answer, critique, revision in zip(prompts, chosen, answers, critiques, revisions, strict=True):
        if not answer.text or not revision.text:
            continue
        asked, how = _messages(prompt.turns), {"principle": principle, "critique": critique.text}
        made["revisions"].append({"prompt": asked} | revision.fields("response") | {"original": answer.text} | how)
        if answer.text != revision.text:
            made["pairs"].append(_pair(asked, revision, answer) | how)
    training.phase("scoring")
    second = _answers(training, others)
    sure = _preferences(training, prompts, [each.text for each in answers], [each.text for each in second], chosen)
    for prompt, principle, one, other, log_odds in zip(prompts, chosen, answers, second, sure, strict=True):
        if one.text and other.text and one.text != other.text and log_odds:
            better, worse = (one, other) if log_odds > 0 else (other, one)
            told = {"principle": principle, "probability": 1 / (1 + math.exp(-abs(log_odds)))}
            made["judged"].append(_pair(_messages(prompt.turns), better, worse) | told)
    changed = sum(a.text != b.text for a, b in zip(answers, revisions, strict=True))
    return made, {
        "synthetic/revisions": float(len(made["revisions"])),
        "synthetic/changed": changed / max(1, len(answers)),
        "synthetic/judged": float(len(made["judged"])),
        "synthetic/certainty": sum(abs(each) for each in sure) / max(1, len(sure)),
    }


def _preferences(
    training: Training, prompts: Sequence[SynthesisPrompt], ones: Sequence[str], others: Sequence[str], principles: Sequence[str]
) -> list[float]:
    """Log-odds that the model holds the first answer better; asked both ways round, as it may like a letter best.

    0 where the question does not fit the context.
    """
    tokenizer, context = training.tokenizer, training.stage.stage.context
    sequences: list[tuple[list[int], int]] = []
    for prompt, one, other, principle in zip(prompts, ones, others, principles, strict=True):
        request = "\n".join(content for _, content in prompt.turns)
        for first, second in ((one, other), (other, one)):
            question = COMPARE.format(prompt=request, first=first, second=second, principle=principle)
            asked = tokenizer.chat([("user", question)])[0]
            for letter in ("A", "B"):
                told, _ = tokenizer.chat([("user", question), ("assistant", letter)])
                fits = told[: len(asked)] == asked and len(told) <= context
                sequences.append((told, len(asked)) if fits else ([], 0))
    found = _log_probs_of(training, sequences)
    odds = []
    for at in range(0, len(found), 4):
        first_a, first_b, second_a, second_b = found[at : at + 4]
        complete = all(ids for ids, _ in sequences[at : at + 4])
        odds.append(((first_a - first_b) + (second_b - second_a)) / 2 if complete else 0.0)
    return odds


def _log_probs_of(training: Training, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
    """Of what follows the first so many ids of each; at temperature 1, as it was not drawn at another."""
    if not sequences:
        return []
    context, pad = training.stage.stage.context, training.tokenizer.pad
    shape = (len(sequences), context)
    tokens, targets, mask, segments = torch.full(shape, pad), torch.full(shape, pad), torch.zeros(shape), torch.full(shape, -1)
    for row, (ids, start) in enumerate(sequences):
        if ids:
            tokens[row, : len(ids)], targets[row, : len(ids) - 1] = torch.tensor(ids), torch.tensor(ids[1:])
            segments[row, : len(ids)], mask[row, start - 1 : len(ids) - 1] = 0, 1
    rows = of_one(*(column.to(training.world.device) for column in (tokens, targets, mask, segments)))
    with training.model.configured(temperature=1.0):
        every = over_rows(training, training.model, rows, ShardedModel.log_probs)
    found: list[float] = real(every, rows.mask).sum(-1).tolist()
    return found


def _pair(asked: list[dict[str, str]], better: SampledAnswerRecord, worse: SampledAnswerRecord) -> dict[str, Any]:
    return {"prompt": asked} | better.fields("chosen") | worse.fields("rejected")


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]
