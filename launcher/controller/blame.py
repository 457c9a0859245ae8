"""Which node and which rank ended a generation: the others are mostly its victims."""

from __future__ import annotations

from launcher.protocol import RankExit, RanksEnded


def first_failure(told: dict[str, RanksEnded]) -> tuple[str, str, bool]:
    """Node, words, and whether the node itself is to blame, of what ended the ranks: others are mostly its victims.

    A rank that was killed, or that its device failed, comes before one that left by itself: its end broke the others' collectives.
    """
    candidates: list[tuple[int, str, str, bool]] = []
    for node, message in told.items():
        failed = next((e for e in message.exits if e.code < 0), next((e for e in message.exits if e.code), None))
        if failed is not None:
            hard = failed.code < 0 or "CUDA error" in failed.message
            candidates.append((0 if hard else 2, node, _describe(failed), hard))
        elif not message.ok:
            candidates.append((1 if message.reason != "ended by the controller" else 3, node, message.reason, False))
    if not candidates:
        return next(iter(told), ""), "they left without saying why", False
    _, node, words, hard = min(candidates, key=lambda c: c[0])
    return node, f"{words} (on {node})" if len(told) > 1 else words, hard


def _describe(failed: RankExit) -> str:
    if failed.rank < 0:
        return failed.message
    how = f"was killed by signal {-failed.code}" if failed.code < 0 else f"ended with status {failed.code}"
    return f"rank {failed.rank} {how}" + (f": {failed.message}" if failed.message else "")
