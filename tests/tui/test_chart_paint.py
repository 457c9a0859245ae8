"""A chart paints at any size, with and without Unicode, and says in characters all that it says in colour."""

import math

import numpy as np
import pytest

from midwatch.metrics.m4_columns import Columns, columns_of
from midwatch.metrics.m4_nodes import ROW
from tui.chart.render import Border, Canvas, ChartMark, Picture, Series, dot_columns, paint, reading
from tui.chart.scale import compact, duration, scale
from tui.chart.sparkline import StagePart, bar, spark, stage_strip, text_of
from tui.chart.styles import Ink


def columns(name: str = "train/loss", offset: float = 0.0, steps: int = 1_000, width: int = 80) -> Columns:
    rows = np.zeros(steps, ROW)
    rows["step"] = np.arange(steps)
    rows["value"] = offset + 2 + np.cos(np.arange(steps) / 50)
    rows["tokens"], rows["time"] = rows["step"] * 1_000_000, rows["step"] * 2.0
    return columns_of(name, rows, 0, steps, dot_columns(width))


def full_picture(width: int = 80) -> Picture:
    a, b = columns(width=width), columns("eval/web/loss", 3.0, width=width)
    return Picture(
        "losses",
        a.grid,
        (Series(a, "train", window=100), Series(b, "web")),
        ghosts=(Series(columns(offset=1.0, steps=600, width=width)),),
        borders=(Border(500, "sft"),),
        marks=(ChartMark(100, "checkpoint"), ChartMark(200, "golden"), ChartMark(300, "rollback"), ChartMark(700, "spike")),
        crosshair=250,
    )


def text(canvas: Canvas) -> list[str]:
    return ["".join(row) for row in canvas.chars]


@pytest.mark.parametrize("unicode", [True, False])
def test_any_size_paints(unicode: bool) -> None:
    picture = full_picture()
    for width in (0, 1, 2, 7, 8, 9, 23, 24, 25, 80, 200):
        for height in (0, 1, 2, 3, 4, 5, 7, 8, 24, 60):
            canvas = paint(picture, width, height, unicode)
            assert canvas.chars.shape == (height, width)
            assert unicode or all(line.isascii() for line in text(canvas))
            for row in range(height):
                assert sum(len(run) for run, _ in canvas.row(row)) == width


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf], [0.0], [-1.0, 0.0], [1e308, -1e308], [1e-320]])
def test_any_values_paint(values: list[float], log: bool) -> None:
    rows = np.zeros(len(values), ROW)
    rows["step"], rows["value"] = np.arange(len(values)), values
    odd = columns_of("x", rows, 0, 100, 50)
    with np.errstate(all="raise", under="ignore"):
        paint(Picture("x", odd.grid, (Series(odd, window=3),), log=log), 60, 20)


def test_lines_marks_and_stages_show_without_colour() -> None:
    lines = text(paint(full_picture(), 80, 24))
    body = "\n".join(lines[2:-2])
    assert lines[0].startswith("losses") and "step 250" in lines[0]
    assert "A train" in lines[1] and "B web" in lines[1]
    assert body.count("A") >= 2 and body.count("B") >= 2
    assert "┊sft" in lines[2] and "│" in body
    assert [sign in lines[-2] for sign in "◇◆↶▲"] == [True] * 4
    assert "400" in lines[-1]


def test_a_nan_is_marked_on_the_axis_and_read_as_such() -> None:
    rows = np.zeros(200, ROW)
    rows["step"], rows["value"] = np.arange(200), 1.0
    rows["value"][90] = math.nan
    found = columns_of("loss", rows, 0, 200, dot_columns(60))
    canvas = paint(Picture("loss", found.grid, (Series(found),)), 60, 12)
    marked = np.argwhere(canvas.chars == "×")
    assert len(marked) == 1 and canvas.inks[tuple(marked[0])] == Ink.ALARM
    assert reading(found, 90).startswith("nan" if found.grid.column_width == 1 else "1")
    rows["value"][-1] = math.nan
    assert reading(columns_of("loss", rows, 0, 200, 100)) == "nan"


def test_alarm_ink_is_for_alarms_only() -> None:
    picture = Picture("loss", columns().grid, (Series(columns()),), marks=(ChartMark(5, "golden"), ChartMark(50, "rollback")))
    assert Ink.ALARM not in paint(picture, 80, 24).inks


def test_names_cannot_break_the_layout_or_send_escapes_to_the_terminal() -> None:
    found = columns()
    picture = Picture("損失\x1b]0;x\x07", found.grid, (Series(found, "é\u0301"),) * 2, borders=(Border(10, "训练\n"),))
    for unicode in (True, False):
        painted = "".join(text(paint(picture, 80, 24, unicode)))
        assert painted.isprintable() and "???]0;x?" in painted
        assert (("é" in painted) == unicode) and (unicode or painted.isascii())
        strip = text_of(stage_strip([StagePart("训练\x1b", 1, 0.5)], 40, unicode))
        assert len(strip) == 40 and strip.isprintable()


def test_ghosts_lie_beneath_and_stretch_the_scale_no_further_than_the_lines_stay_readable() -> None:
    alive = columns()
    low, high = float(np.nanmin(alive.min)), float(np.nanmax(alive.max))
    for offset in (0.5, 1e6):  # a spike, and a line that ran away
        picture = Picture("loss", alive.grid, (Series(alive),), ghosts=(Series(columns(offset=offset)),))
        canvas = paint(picture, 80, 24)
        assert (canvas.inks == Ink.GHOST).any()
        assert (canvas.inks == Ink.LINE_0).any(axis=1).sum() >= 7, "the lines keep a third of the height"
        top = max(float(line.split("┤")[0]) for line in text(canvas) if "┤" in line and line.split("┤")[0].strip())
        assert top <= high + 1.01 * (high - low), "no further than this"
    spike = Picture("loss", alive.grid, (Series(alive),), ghosts=(Series(columns(offset=0.5)),))
    inks = paint(spike, 80, 24).inks[1:]  # beneath the title
    ghost, own = ((inks == ink).any(axis=1).argmax() for ink in (Ink.GHOST, Ink.LINE_0))
    assert ghost < own, "it stands out above"


def test_smoothing_is_bright_over_the_raw_line() -> None:
    found = columns()
    canvas = paint(Picture("loss", found.grid, (Series(found, window=200),)), 80, 24)
    assert (canvas.inks == Ink.LINE_0).any() and (canvas.inks == Ink.RAW_0).any()


def test_x_labels_in_tokens_and_time() -> None:
    found = columns()
    for axis, expected in (("tokens", "400M"), ("time", "10m 00s")):
        picture = Picture("loss", found.grid, (Series(found),), x_axis=axis)  # type: ignore[arg-type]
        assert expected in text(paint(picture, 80, 24))[-1]


def test_the_crosshair_reads_the_column_it_stands_on() -> None:
    found = columns(width=200, steps=300)
    assert found.grid.column_width == 1
    step = 157
    picture = Picture("loss", found.grid, (Series(found),), crosshair=step)
    title = text(paint(picture, 200, 20))[0]
    assert f"step {step}" in title and compact(2 + math.cos(step / 50)) in title


def test_a_growing_run_changes_few_rows() -> None:
    changed = []
    for steps in range(10_000, 10_020):
        pictures = [columns(steps=length) for length in (steps, steps + 1)]
        old, new = (paint(Picture("loss", found.grid, (Series(found),)), 80, 24) for found in pictures)
        changed.append(len(new.changed_rows(old)))
    assert sorted(changed)[len(changed) // 2] <= 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (1.5, "1.5"), (12_345, "12.3k"), (999_999, "1M"), (3e-4, "3e-4"), (1.234e-5, "1.2e-5"),
        (-2.5, "-2.5"), (7e15, "7e15"), (math.nan, "nan"), (math.inf, "inf"), (9_999.9, "10k"), (2.34567, "2.346"),
        (1e11, "100B"), (1e300, "1e300"), (0.1234567, "0.1235"),
    ],
)  # fmt: skip
def test_compact_numbers(value: float, expected: str) -> None:
    assert compact(value) == expected


def test_compact_numbers_fit_the_margin_and_tell_ticks_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        low = rng.normal() * 10.0 ** rng.integers(-6, 14)
        high = low + abs(rng.normal()) * 10.0 ** rng.integers(-3, 14)
        found = scale(low, high, int(rng.integers(1, 12)))
        slack = (high - low) * 1e-6
        assert found.low <= low + slack and found.high >= high - slack
        assert all(len(compact(value)) <= 8 for value in (low, high, *found.ticks))
        assert len(found.ticks) < 40
    for ticks in (scale(2.01, 2.04, 4).ticks, scale(-0.0024, -0.0022, 4).ticks):
        labels = {compact(tick, ticks[1] - ticks[0]) for tick in ticks}
        assert len(labels) == len(ticks) and all(len(label) <= 7 for label in labels)


def test_durations() -> None:
    assert [duration(s) for s in (5, 90, 7_500, 273_600)] == ["5s", "1m 30s", "2h 05m", "3d 4h"]


def test_strips() -> None:
    assert text_of(spark([0, 50, 100, math.nan], 10, 0, 100)) == "▁▄█·"
    assert text_of(spark([0, 50, 100, math.nan], 10, 0, 100, unicode=False)) == "_-#?"
    assert text_of(spark(range(100), 10, 0, 99, several="max"))[-1] == "█"
    assert text_of(spark([5, 5], 10)) == "▄▄" and spark([], 10) == [] and spark([1], 0) == []
    assert text_of(bar(0.5, 10)) == "━━━━━─────" and text_of(bar(0.5, 10, unicode=False)) == "#####-----"
    assert text_of(bar(math.nan, 3)) == "───" and bar(0.5, 0) == []
    stages = [StagePart("pretrain", 10, 1.0), StagePart("sft", 2, 0.5, active=True), StagePart("dpo", 1, 0.0)]
    for width in (0, 1, 2, 3, 10, 18, 40, 200):
        for unicode in (True, False):
            strip = text_of(stage_strip(stages, width, unicode))
            assert len(strip) <= width
            assert unicode or strip.isascii()
    assert "✓pretrain" in text_of(stage_strip(stages, 80)) and "▸sft" in text_of(stage_strip(stages, 80))


def test_labels_of_unequal_steps_stand_where_their_round_times_were_reached() -> None:
    """The first half took 1 s a step, the second 9 s: the same time is a shorter way along the steps."""
    rows = np.zeros(200, ROW)
    rows["step"], rows["value"] = np.arange(200), 1.0
    rows["time"] = np.where(np.arange(200) < 100, np.arange(200), 100 + 9 * (np.arange(200) - 100))
    found = columns_of("loss", rows, 0, 200, 140)
    canvas = text(paint(Picture("loss", found.grid, (Series(found),), x_axis="time"), 80, 24))
    ticks, labels = canvas[-2], canvas[-1]
    at = [number for number, char in enumerate(ticks) if char == "┬"]
    assert labels.strip().startswith("0s") and "5m 00s" in labels and "10m 00s" in labels
    left = len(ticks) - len(ticks.lstrip())
    assert at[1] - at[0] > 2 * (at[2] - at[1]), (left, at, labels)
