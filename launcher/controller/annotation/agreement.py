"""How far annotators agree with one another, and a reward model with them. Pure functions.

A pair's label is `first`, `second` or `neither` (a tie, or both bad); who skipped a pair has not labelled it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from launcher.controller.annotation.records import Decision
from midwatch.metrics.wilson import wilson_interval
from midwatch.protocol import Agreement, Share


def measure(decisions: Mapping[str, Sequence[Decision]]) -> Agreement:
    """Of all annotators; the newest decision of each on a pair counts."""
    labels: dict[str, dict[str, str]] = {}
    for annotator, made in decisions.items():
        for decision in made:
            if decision.label:
                labels.setdefault(decision.pair, {})[annotator] = decision.label
    units = [tuple(by[name] for name in sorted(by)) for by in labels.values() if len(by) > 1]
    among = len({name for by in labels.values() if len(by) > 1 for name in by})
    value = cohen([(unit[0], unit[1]) for unit in units]) if among == 2 else krippendorff(units)
    every = [decision for made in decisions.values() for decision in made]
    sides = [decision.choice for decision in every if decision.choice in ("left", "right")]
    return Agreement(
        measure="" if among < 2 else "Cohen's kappa" if among == 2 else "Krippendorff's alpha",
        value=value,
        pairs=len(units),
        annotators=among,
        alike=share(sum(len(set(unit)) == 1 for unit in units), len(units)),
        reward=reward_model(every),
        left=share(sides.count("left"), len(sides)),
        decisions={annotator: len(decisions[annotator]) for annotator in sorted(decisions)},
    )


def cohen(units: Sequence[tuple[str, str]]) -> float | None:
    """Cohen 1960: (observed - expected) / (1 - expected) of two annotators' labels; None where no chance is left, or nothing is."""
    if not units:
        return None
    count = len(units)
    observed = sum(one == other for one, other in units) / count
    ones, others = Counter(one for one, _ in units), Counter(other for _, other in units)
    expected = sum(ones[label] * others[label] for label in ones) / count**2
    return (observed - expected) / (1 - expected) if expected < 1 else None


def krippendorff(units: Iterable[Sequence[str]]) -> float | None:
    """Krippendorff 2011's alpha for nominal labels; units of fewer than two say nothing. None where all labels are the same."""
    rated = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[str] = sum(rated, Counter())
    count = totals.total()
    apart = sum(_unequal(each) / (each.total() - 1) for each in rated)
    possible = _unequal(totals)
    return 1 - (count - 1) * apart / possible if possible else None


def _unequal(labels: Counter[str]) -> int:
    """Ordered pairs of different labels."""
    return labels.total() ** 2 - sum(count**2 for count in labels.values())


def reward_model(decisions: Iterable[Decision]) -> Share:
    """In how many decisions for one side the chosen answer has the higher score; equal scores count for neither."""
    found = [decision.chosen for decision in decisions if decision.chosen is not None]
    scored = [(better.score, worse.score) for better, worse in found if better.score is not None and worse.score is not None]
    unequal = [(better, worse) for better, worse in scored if better != worse]
    return share(sum(better > worse for better, worse in unequal), len(unequal))


def share(hits: int, count: int) -> Share:
    """A share with its 95 % interval; without one where nothing was counted."""
    return Share(hits, count, *wilson_interval(hits / count, count)) if count else Share(0, 0, None, None)
