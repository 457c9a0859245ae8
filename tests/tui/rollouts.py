"""A run in its PPO stage for the screen, with what its policy writes; the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np

from midwatch import protocol as p
from tests.tui.stage import NOW, STEP, Stage, _rows, replace, snapshot

FIRST = 1_000
UPDATES = 4
PROMPTS = (
    "What does os.path.join do?",
    "How do I read a file line by line\nwithout loading it whole?",
    "Explain the difference between a list and a tuple.",
    "Write a function that reverses a dict.",
)
ANSWERS = (
    "Join two or more pathname components, inserting / as needed. An absolute part discards what came before it.",
    "Open it and iterate:\n\n    with open(name) as file:\n        for line in file:\n            handle(line)\n\n"
    "Each line keeps its end.\x1b[2J",
    "Great question! Great question! Great question! As a helpful assistant I am happy to help you with this great question!",
    "def reverse(table):\n    return {value: key for key, value in table.items()}",
    "",
)


def series() -> dict[str, dict[int, np.ndarray]]:
    random = np.random.default_rng(3)
    steps = np.arange(FIRST, STEP + 1)
    drawn = steps[::UPDATES]
    part, late = (drawn - FIRST) / (STEP - FIRST), (steps[::45] - FIRST) / (STEP - FIRST)
    found = {
        "policy/reward": (drawn, 0.2 + 1.7 * part + random.normal(0, 0.1, len(drawn))),
        "policy/reward_std": (drawn, 0.9 + random.normal(0, 0.05, len(drawn))),
        "policy/kl_sequence": (drawn, 6.5 * part**0.7 + np.abs(random.normal(0, 0.2, len(drawn)))),
        "policy/entropy": (drawn, 2.9 - 0.7 * part + random.normal(0, 0.04, len(drawn))),
        "policy/response_length": (drawn, 70 + 22 * part + random.normal(0, 3, len(drawn))),
        "policy/truncated_fraction": (drawn, np.abs(random.normal(0.02, 0.01, len(drawn)))),
        "value/explained_variance": (steps, 0.1 + 0.6 * (steps - FIRST) / (STEP - FIRST) + random.normal(0, 0.05, len(steps))),
        "eval/questions/reward": (steps[::45], 0.2 + 1.4 * late),
        "eval/questions/kl_sequence": (steps[::45], 6.1 * late**0.7),
        "perf/generate_seconds": (drawn, 4.2 + random.normal(0, 0.1, len(drawn))),
        "perf/score_seconds": (drawn, 0.8 + random.normal(0, 0.02, len(drawn))),
        "perf/update_seconds": (steps, 0.78 + random.normal(0, 0.01, len(steps))),
    }
    return {name: {2: _rows(at, np.asarray(values))} for name, (at, values) in found.items()}


def rollouts(phase: str = "training", **changes: Any) -> p.Snapshot:
    """The second update of a rollout, or another phase of it, 1.5 s after it began."""
    base = snapshot()
    policy = replace(
        base.stages[-1], name="ppo", objective="ppo", mixture={"questions": 1.0}, updates=UPDATES, kl_target=6.0, losses={}
    )
    latest = {name: value for name, value in base.latest.items() if not name.startswith(("policy/", "preference/"))}
    latest |= {name: float(rows[2]["value"][-1]) for name, rows in series().items()}
    made = replace(
        base,
        stage="ppo",
        stages=(*base.stages[:-1], policy),
        latest=latest,
        settings={"lr": 1e-6, "value_lr": 1e-5, "max_grad_norm": 1.0, "kl_coef": 0.12, "ratio_clip": 0.2},
        phase=phase,
        phase_since=NOW - 1.5,
        events=base.events[:-3],
    )
    return replace(made, **changes)


def play(stage: Stage) -> None:
    """Gives a stage the run's series and what was written."""
    stage.snapshot = rollouts()
    stage.series = {name: rows for name, rows in stage.series.items() if not name.startswith(("policy/", "preference/"))} | series()
    random = np.random.default_rng(11)
    for step, lineage in [(430, 1), *((step, 2) for step in range(FIRST, STEP + 1, 12))]:
        write(stage, step, lineage, random)
    stage.snapshot = replace(stage.snapshot, samples=stage.samples.taken + 2)


def write(stage: Stage, step: int, lineage: int = 2, random: np.random.Generator | None = None) -> None:
    """A rollout's samples."""
    figures = (random or np.random.default_rng(step)).normal(0, 1, (5, 2))
    for number, answer in enumerate(ANSWERS):
        if answer:
            sample = p.Sampled(
                stage="ppo",
                step=step,
                lineage=lineage,
                prompt=PROMPTS[number % len(PROMPTS)],
                text=answer,
                reward=round(1.2 + float(figures[number, 0]), 3),
                kl=round(abs(4 + 3 * float(figures[number, 1])), 2),
                tokens=len(answer) // 4,
            )
            stage.samples.add("2/telemetry", stage.samples.taken + 1, NOW, sample)
