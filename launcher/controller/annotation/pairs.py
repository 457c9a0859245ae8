"""Decisions as (prompt, chosen, rejected), for a source of `kind = "preference"` and `origin = "jsonl"`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from launcher.controller.annotation.records import Decision
from launcher.controller.annotation.store import EXPORTED, all_decisions
from midwatch.run_directory import PUBLIC_FILE
from shards.common.files import write_atomically


def export(directory: Path, to: Path | None = None) -> Counter[str]:
    """Writes the pairs of all annotators, in the order of their times; how many, and how many of each kind were left out.

    to: a file; None: `pairs.jsonl` beside the decisions. A reader finds the old or the new content. Raises OSError.
    """
    decisions = sorted((each for made in all_decisions(directory).values() for each in made), key=lambda each: (each.time, each.id))
    counts: Counter[str] = Counter()
    lines: list[bytes] = []
    for decision in decisions:
        record = record_of(decision)
        counts[record if isinstance(record, str) else "pairs"] += 1
        if not isinstance(record, str):
            lines.append(msgspec.json.encode(record) + b"\n")
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to if to is not None else directory / EXPORTED, b"".join(lines), mode=PUBLIC_FILE)
    return counts


def record_of(decision: Decision) -> dict[str, Any] | str:
    """As shards read it; or why nothing can be learned from it."""
    if decision.chosen is None:
        return decision.choice
    better, worse = decision.chosen
    if not better.text.strip() or not worse.text.strip():
        return "empty"
    if better.text == worse.text:
        return "alike"
    return {
        "prompt": msgspec.to_builtins(decision.prompt),
        "chosen": better.text,
        "rejected": worse.text,
        "chosen_finish_reason": better.finish,
        "rejected_finish_reason": worse.finish,
        "annotator": decision.annotator,
        "time": decision.time,
        "decision": decision.id,
        "pair": decision.pair,
        "checkpoints": [better.checkpoint, worse.checkpoint],
        "scores": [better.score, worse.score],
    }
