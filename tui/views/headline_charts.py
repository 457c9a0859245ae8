"""Which charts the watch shows: those that the spec of the stage's objective names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from midwatch.objectives.registry import ObjectiveError, spec_of
from midwatch.objectives.spec import GRADIENT_NORM, LOSS, Chart
from midwatch.protocol import Snapshot
from tui.chart.formatting import setting

Charts = tuple[tuple[Chart, ...], ...]
GENERAL = (
    Chart(GRADIENT_NORM, "gradient norm"),
    Chart("perf/tokens_per_second", "tokens/s"),
    Chart("train/lr", "learning rate"),
    Chart("preference/accuracy", "accuracy"),
)


class Slot(NamedTuple):
    title: str
    metrics: tuple[str, ...]


def charts_of(snapshot: Snapshot) -> Charts:
    """Of the stage that trains; empty where its objective is not installed here, as on a machine that only attaches."""
    objective = next((stage.objective for stage in snapshot.stages if stage.name == snapshot.stage), "")
    try:
        return spec_of(objective).charts
    except ObjectiveError:
        return ()


def slots(latest: Mapping[str, float], charts: Charts = (), settings: Mapping[str, float] | None = None) -> list[Slot]:
    """The charts worth watching, the most telling first, by what the run reports."""
    found = []
    for alternatives in charts:
        chart = next((each for each in alternatives if each.metric in latest), None)
        if chart is not None:
            found.append(_slot(chart, latest, settings or {}))
    if any(each.metric == LOSS for alternatives in charts for each in alternatives) and charts[0][0].metric in latest:
        return found
    found = [Slot("loss", (LOSS,)), *(slot for slot in found if slot.metrics[0] != LOSS)]
    held_out = tuple(sorted(name for name in latest if re.fullmatch(r"eval/.+/loss", name)))[:6]
    if held_out:
        found.append(Slot("held-out loss", held_out))
    shown = {metric for slot in found for metric in slot.metrics}
    return found + [Slot(chart.title, (chart.metric,)) for chart in GENERAL if chart.metric in latest and chart.metric not in shown]


def _slot(chart: Chart, latest: Mapping[str, float], settings: Mapping[str, float]) -> Slot:
    held_out = sorted(name for name in latest if chart.held_out and re.fullmatch(rf"eval/.+/{chart.held_out}", name))[:5]
    value = settings.get(chart.setting)
    shown = "" if value is None else f", {chart.setting.removesuffix('_coef')} {setting(value)}"
    return Slot(f"{chart.title}{shown}", (chart.metric, *held_out))
