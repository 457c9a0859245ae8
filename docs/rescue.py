"""The run behind docs/rescue.svg: a controller's stand-in that speaks the real protocol. Seeds and clock are fixed."""

from __future__ import annotations

from typing import Any

import numpy as np

from midwatch import protocol as p
from midwatch.metrics.m4_columns import columns_of
from midwatch.metrics.m4_nodes import ROW
from tests.tui.stage import Stage, replace

ZERO = 1_759_977_300.0
"""The clock at the newest good checkpoint: 02:35 UTC on 9 October 2025."""
STEP_SECONDS = 8.0
TOKENS = 2_097_152
"""Of a step."""
GOLDEN, FORK, SPIKE, ALARM, BAD = 300, 400, 430, 436, 454
"""Checkpoints at 300 (golden) and 400; the loss leaves its course at 430; the alarm is raised at 436, last at 454."""


class Night(Stage):
    """The run at a step of a lineage: `at(step, lineage)` sends what a controller would."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.lineage, self.left = 0, 1, 0
        self.lines: list[tuple[float, str, str, str, Any]] = []
        self.alarmed = False
        self.whole = _series()
        self.outcome = lambda command: {"state": "done", "step": FORK, "detail": {"lineage": 2, "undone": self.step - FORK}}

    @property
    def now(self) -> float:
        """Steps that were undone have taken their time too."""
        extra = (self.left - FORK) if self.lineage == 2 else 0
        return ZERO + (self.step + extra - FORK) * STEP_SECONDS

    def note(self, kind: str, words: str, author: str = "", level: Any = "info") -> None:
        self.lines.append((self.now, kind, author, words, level))

    def raise_alarm(self) -> None:
        self.alarmed = True
        value = self.whole["train/loss"][1]["value"][ALARM]
        self.note("alarm", f"loss spike: train/loss is {value:.3g}, threshold: above 4.3", level="alarm")

    def at(self, step: int, lineage: int = 1) -> None:
        if lineage == 2 and self.lineage == 1:
            self.left = self.step
        self.step, self.lineage = step, lineage
        limit = {1: self.left or step, 2: step}
        self.series = {
            name: {line: rows[rows["step"] <= limit[line]] for line, rows in lines.items() if line <= lineage}
            for name, lines in self.whole.items()
        }
        self.journal = [
            p.JournalLine(index=at, time=when, term=1, kind=kind, author=author, text=words, level=level)
            for at, (when, kind, author, words, level) in enumerate(self.lines)
        ]
        latest = {name: float(lines[lineage]["value"][-1]) for name, lines in self.series.items()}
        alarm = p.Alarm(
            key="loss spike",
            text=f"loss spike: train/loss is {latest['train/loss']:.3g}, threshold: above 4.3",
            rule="loss spike",
            value=latest["train/loss"],
            threshold="above 4.3",
            step=ALARM,
            lineage=1,
            time=ZERO + (ALARM - FORK) * STEP_SECONDS,
            last_step=min(step, BAD),
            last_time=self.now,
            count=max(1, min(step, BAD) - ALARM + 1),
        )
        self.undo = p.UndoReply(
            id=0, checkpoint="", step=FORK, stage="pretrain", steps=step - FORK, tokens=(step - FORK) * TOKENS,
            seconds=(step - FORK) * STEP_SECONDS,
        )  # fmt: skip
        self.send(**self._snapshot(latest, (alarm,) if self.alarmed else ()))

    def _answer(self, question: p.Message) -> p.Message:
        if isinstance(question, p.ChartQuery):
            lines = self.series.get(question.metric, {})
            rows = lines.get(question.lineage or self.lineage, np.zeros(0, ROW))
            columns = columns_of(question.metric, rows, question.start, question.stop, question.width)
            return p.ChartReply(id=question.id, columns=columns.encode())
        return super()._answer(question)

    def _snapshot(self, latest: dict[str, float], alarms: tuple[p.Alarm, ...]) -> dict[str, Any]:
        now, step = self.now, self.step
        base = self.snapshot
        first = replace(
            base.stages[1], name="pretrain", objective="pretrain", context=8192, lr=3e-4, steps=24_000, state="running", step=step,
            product=None, losses={},
            mixture={"web": 0.6, "code": 0.25, "books": 0.15}, seconds=step * STEP_SECONDS,
            seconds_left=(24_000 - step) * STEP_SECONDS, tokens=step * TOKENS,
        )  # fmt: skip
        later = (("extend", "pretrain", 2_000), ("sft", "sft", 1_500), ("dpo", "dpo", 600))
        stages = (
            first,
            *(replace(first, name=name, objective=objective, steps=steps, state="waiting", step=0, seconds=0.0, seconds_left=None)
              for name, objective, steps in later),
        )  # fmt: skip
        kept = [(GOLDEN, 1, True, True), (FORK, 1, False, True)]
        kept += [(500, 2, False, True)] if step >= 500 else []
        losses = self.whole["train/loss"]
        checkpoints = tuple(
            replace(
                base.checkpoints[0], id=f"{at}-{line}", step=at, lineage=line, stage_step=at, golden=golden, on_line=on_line,
                time=ZERO + (at - FORK) * STEP_SECONDS, bytes=128_000_000_000, loss=float(losses[line]["value"][at]),
            )
            for at, line, golden, on_line in kept
        )  # fmt: skip
        lineages = (p.Lineage(id=1, time=ZERO - FORK * STEP_SECONDS),)
        if self.lineage == 2:
            lineages += (
                p.Lineage(id=2, parent=1, fork=f"{FORK}-1", fork_step=FORK, cause="rollback", skip=BAD - FORK,
                          author="anna", time=ZERO + (self.left - FORK) * STEP_SECONDS),
            )  # fmt: skip
        return {
            "run": "llama-8b",
            "directory": "/runs/llama-8b",
            "time": now,
            "heard": now,
            "started": ZERO - FORK * STEP_SECONDS,
            "step": step,
            "total_steps": 28_100,
            "step_seconds": STEP_SECONDS,
            "seconds_left": (28_100 - step) * STEP_SECONDS,
            "tokens": step * TOKENS,
            "stage": "pretrain",
            "stages": stages,
            "world": 16,
            "generation": 1,
            "lineage": self.lineage,
            "lineages": lineages,
            "left_at": {1: self.left} if self.left else {},
            "checkpoints": checkpoints,
            "commands": (),
            "nodes": _nodes(now, step),
            "latest": latest,
            "events": tuple(self.journal[-12:]),
            "alarms": alarms,
            "settings": {"lr": 3e-4, "lr_scale": 1.0, "max_grad_norm": 1.0},
        }


def _nodes(now: float, step: int) -> tuple[p.NodeView, ...]:
    random = np.random.default_rng(step)

    def gpu(index: int) -> p.Gpu:
        busy = float(0.96 + 0.03 * random.random())
        heat = float(63 + 6 * random.random())
        return p.Gpu(index=index, name="NVIDIA H100 80GB HBM3", utilisation=busy, memory_used=71_000_000_000,
                     memory_total=80_000_000_000, temperature=heat, power=float(640 + 30 * random.random()))  # fmt: skip

    return tuple(
        p.NodeView(
            name=name,
            state="up",
            ranks=8,
            first_rank=8 * at,
            stats=p.NodeStats(node=name, time=now, cpus=(0.2,) * 8, memory_used=210_000_000_000, memory_total=1_000_000_000_000,
                              gpus=tuple(map(gpu, range(8)))),
        )
        for at, name in enumerate(("gpu-01", "gpu-02"))
    )  # fmt: skip


def _series() -> dict[str, dict[int, np.ndarray]]:
    """Rows of each metric, by lineage: the second goes on from step 1,100 of the first, past the data that hurt."""
    random = np.random.default_rng(3)
    steps = np.arange(1_000)
    calm = 2.6 + 6.2 * np.exp(-steps / 40) + 2.2 * np.exp(-steps / 300) + random.normal(0, 0.03, len(steps))
    after = np.maximum(0, steps - SPIKE)
    hurt = calm + 4.2 * (1 - np.exp(-after / 7)) + random.normal(0, 0.12, len(steps)) * (after > 0)
    norm = 0.45 + 1.8 * np.exp(-steps / 30) + np.abs(random.normal(0, 0.05, len(steps)))
    lr = 3e-4 * np.minimum(1, steps / 240)
    found = {
        "train/loss": (hurt, calm),
        "train/grad_norm": (norm + (after > 0) * np.abs(random.normal(3, 1, len(steps))), norm),
        "train/lr": (lr, lr),
        "perf/tokens_per_second": (TOKENS / STEP_SECONDS + random.normal(0, 2_000, len(steps)),) * 2,
        "perf/step_seconds": (STEP_SECONDS + np.abs(random.normal(0, 0.02, len(steps))),) * 2,
    }
    return {name: {line: _rows(steps, values) for line, values in enumerate(pair, 1)} for name, pair in found.items()}


def _rows(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(steps), ROW)
    rows["step"], rows["value"] = steps, values
    rows["tokens"] = steps * TOKENS
    rows["time"] = ZERO + (steps - FORK) * STEP_SECONDS
    return rows
