"""Long documents made of short ones, each marked as what it is: related documents, conversations, tasks over their length.

For training on long contexts where naturally long text is scarce. All of it is a pure function of its input and a seed.
The tasks are of families made up here (a ledger, a relay, amendments of a rule), whose text no evaluation has. The synthetic
evaluations of long contexts known here ask for planted sentences and keys, assigned variables, word counts and moved objects;
following a relay trains what following assigned variables needs, so say so where such a score is reported.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.common.optional import need
from shards.filters.heuristics.text import Text

BATCH = 4096  # documents compared with each other at a time; bounds time, which grows with its square
PERMUTATIONS = 64
GRAM = 3  # words
Family = Literal["ledger", "relay", "amendments"]
FAMILIES: tuple[Family, ...] = ("ledger", "relay", "amendments")
JOIN = "\n\n"


class LongDocument(NamedTuple):
    """A long document and what it was made of."""

    label: str  # "related", or "task-" and its family
    text: str
    parts: tuple[int, ...]  # numbers of the documents in it, in order
    question: str = ""  # a task's, which its text ends with
    answer: str = ""


class MadeConversation(NamedTuple):
    """A long conversation of shorter ones, whole and in turn."""

    label: str  # "conversation"
    messages: tuple[tuple[str, str], ...]  # (role, what is said)
    parts: tuple[int, ...]


def signatures(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """MinHash signatures [texts, PERMUTATIONS] of each text's different runs of GRAM words (Broder 1997)."""
    rensa = need("rensa", "joining related documents")
    result = np.zeros((len(texts), PERMUTATIONS), np.uint64)
    for row, text in zip(result, texts, strict=True):
        tokens = Text(text.lower()).tokens
        sketch = rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update([" ".join(tokens[at : at + GRAM]) for at in range(max(1, len(tokens) - GRAM + 1))])
        row[:] = sketch.digest()
    return result


def _chains(texts: Sequence[str], sizes: Sequence[int], target: int, similar: float, same: float) -> Iterator[list[int]]:
    """Documents, each in one chain at most, where each is the one most like the last; chains of at least `target` characters."""
    for first in range(0, len(texts), BATCH):
        marks = signatures(texts[first : first + BATCH])
        free = np.ones(len(marks), np.bool_)
        for begin in range(len(marks)):
            if not free[begin]:
                continue
            chain, size = [begin], sizes[first + begin]
            taken = free.copy()
            taken[begin] = False
            while size < target:
                likeness = (marks == marks[chain[-1]]).mean(axis=1)
                # Near duplicates would teach copying, not reading far back.
                near = np.flatnonzero(taken & (likeness >= similar))
                near = near[(marks[near][:, None, :] == marks[chain][None, :, :]).mean(axis=2).max(axis=1, initial=0) < same]
                if not len(near):
                    break
                best = int(near[likeness[near].argmax()])
                chain.append(best)
                taken[best] = False
                size += sizes[first + best]
            if size >= target:
                free &= taken
                yield [first + member for member in chain]


def join_related(texts: Sequence[str], target: int, similar: float = 0.05, same: float = 0.8) -> Iterator[LongDocument]:
    """Long documents of at least `target` characters: documents of which each is estimated at Jaccard `similar` or more with the
    one before, and below `same` with all others. A document is used once at most; those with too few like them are left.
    """
    for chain in _chains(texts, [len(text) for text in texts], target, similar, same):
        yield LongDocument("related", JOIN.join(texts[member] for member in chain), tuple(chain))


def join_conversations(
    conversations: Sequence[Sequence[tuple[str, str]]], target: int, similar: float = 0.02, same: float = 0.8
) -> Iterator[MadeConversation]:
    """Long conversations of at least `target` characters: whole conversations on like things one after the other."""
    texts = ["\n".join(said for _, said in messages) for messages in conversations]
    for chain in _chains(texts, [len(text) for text in texts], target, similar, same):
        joined = tuple((role, said) for member in chain for role, said in conversations[member])
        yield MadeConversation("conversation", joined, tuple(chain))


def make_tasks(
    texts: Sequence[str], target: int, count: int, seed: int, hops: int = 6, families: Sequence[Family] = FAMILIES
) -> Iterator[LongDocument]:
    """Tasks over real documents: `hops` notes are put between paragraphs, from end to end of at least `target` characters of text,
    and the question at its end needs all of them. Fewer than `count` come where the texts do not suffice; each text is used once.
    """
    draw = random.Random(f"tasks {seed}")
    order = list(range(len(texts)))
    draw.shuffle(order)
    while count > 0:
        parts: list[int] = []
        size = 0
        while order and size < target:
            parts.append(order.pop())
            size += len(texts[parts[-1]])
        paragraphs = [piece for part in parts for piece in texts[part].split(JOIN) if piece.strip()]
        if size < target or len(paragraphs) < hops:
            return
        family = draw.choice(list(families))
        notes, question, answer = _WRITERS[family](draw, hops)
        # One note in each of as many equal stretches, so that every distance up to the whole length comes.
        places = [draw.randint(len(paragraphs) * n // hops, len(paragraphs) * (n + 1) // hops - 1) for n in range(hops)]
        for place, note in reversed(list(zip(places, notes, strict=True))):
            paragraphs.insert(place, note)
        yield LongDocument(f"task-{family}", JOIN.join([*paragraphs, question, answer]), tuple(parts), question, answer)
        count -= 1


_NAMES = (
    *("Ada", "Bruno", "Chiara", "Dmitri", "Esra", "Femi", "Greta", "Hideo", "Ines", "Jonas", "Kavya", "Leif", "Mara", "Niko"),
    *("Olga", "Pablo", "Quinn", "Rosa", "Sanjay", "Tove", "Umar", "Vera", "Wanda", "Xenia", "Yusuf", "Zora"),
)
_STALLS = ("the fish stall", "the bakery", "the bookbinder", "the ropemaker", "the chandler", "the tea house", "the smithy")
_RULES = ("mooring fee", "length of a watch", "width of the gangway", "price of a lantern", "depth of the channel")


def _ledger(draw: random.Random, hops: int) -> tuple[list[str], str, str]:
    stall = draw.choice(_STALLS)
    total = draw.randint(200, 900)
    notes = [f"(Ledger: {stall} begins with {total} crowns.)"]
    for _ in range(hops - 1):
        change = draw.randint(1, 99)
        if draw.random() < 0.5 and total > change:
            total -= change
            notes.append(f"(Ledger: {stall} pays out {change} crowns.)")
        else:
            total += change
            notes.append(f"(Ledger: {stall} takes in {change} crowns.)")
    return notes, f"Question: after all ledger notes above, how many crowns does {stall} have?", f"Answer: {total}"


def _relay(draw: random.Random, hops: int) -> tuple[list[str], str, str]:
    runners = draw.sample(_NAMES, min(hops, len(_NAMES) - 1) + 1)
    legs = [f"(Relay: {giver} runs before {taker}.)" for giver, taker in pairwise(runners)]
    legs += ["(Relay: nobody else runs.)"] * (hops - len(legs))
    draw.shuffle(legs)
    return legs, f"Question: in the relay noted above, who runs last after {runners[0]} has begun?", f"Answer: {runners[-1]}"


def _amendments(draw: random.Random, hops: int) -> tuple[list[str], str, str]:
    rule = draw.choice(_RULES)
    value = draw.randint(10, 400)
    notes = [f"(Harbour rule: the {rule} is {value}.)"]
    for _ in range(hops - 1):
        kind = draw.choice(["raised", "lowered", "doubled"])
        if kind == "doubled" and value < 5000:
            value *= 2
            notes.append(f"(Amendment: the {rule} is doubled.)")
        else:
            step = draw.randint(1, 9)
            down = kind == "lowered" and value > step
            value += -step if down else step
            notes.append(f"(Amendment: the {rule} is {'lowered' if down else 'raised'} by {step}.)")
    return notes, f"Question: after all amendments above, taken in order, what is the {rule}?", f"Answer: {value}"


_WRITERS = {"ledger": _ledger, "relay": _relay, "amendments": _amendments}
