"""One animated SVG out of many screenshots of a Textual app.

Textual exports a screen as an SVG: a background rectangle and a text for each run of cells, row by row. A row that stays the same
from one frame to the next is written once, and SMIL shows each row while its frames last. A recording is thus a few times the size
of one screenshot. A viewer that does not animate shows the poster frame.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import NamedTuple

ROW = 24.4
"""Height of a row in Rich's export."""
LEFT, TOP, FOOT = 9, 41, 64
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Frame(NamedTuple):
    svg: str
    """As `App.export_screenshot` makes it."""
    seconds: float
    key: str
    """The key that was pressed before it; empty if none was."""
    caption: str


class _Screen(NamedTuple):
    width: float
    height: float
    rows: dict[int, str]
    """What each row is drawn with, its top at 0, by its place."""


def _read(svg: str) -> _Screen:
    """The rows of an exported screen, each with its styles written out, so that rows of different exports compare."""
    size = re.search(r'clip-terminal">\s*<rect x="0" y="0" width="([\d.]+)" height="([\d.]+)"', svg)
    styles = dict(re.findall(r"\.[\w-]+-(r\d+) \{ ([^}]*) \}", svg))
    assert size is not None
    rows: dict[int, list[str]] = {}
    for x, y, width, fill in (
        (m["x"], m["y"], m["width"], m["fill"])
        for m in re.finditer(r'<rect fill="(?P<fill>#\w+)" x="(?P<x>[\d.]+)" y="(?P<y>[\d.]+)" width="(?P<width>[\d.]+)"', svg)
    ):
        if float(width):
            rows.setdefault(int(float(y) / ROW), []).append(f'<rect fill="{fill}" x="{x}" width="{width}" height="24.7"/>')
    text = r'<text class="[\w-]+-(r\d+)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"[^>]*>([^<]*)</text>'
    for name, x, y, length, content in re.findall(text, svg):
        style = styles[name].replace("font-weight: bold", "font-weight:700").strip(" ;")
        row = rows.setdefault(int((float(y) - 18) / ROW + 0.01), [])
        row += _texts(style, float(x), float(length), html.unescape(content))
    return _Screen(float(size[1]), float(size[2]), {at: _joined(parts) for at, parts in rows.items()})


def _texts(style: str, x: float, length: float, content: str) -> Iterator[str]:
    """A run of cells as texts of ASCII, each at its place and as wide as its cells, and of other signs, each at a place of its own.

    Fonts that lack a sign have it from another font, in another width, which would move all that follows.
    """
    content = content.replace("\n", "").replace("\xa0", " ").replace("\u2800", " ")
    cell = length / max(1, len(content))
    for match in re.finditer(r"([!-~]+(?: [!-~]+)*)|[^ -~]+", content):
        place, words = x + match.start() * cell, match[0]
        if match[1]:
            places = f'x="{place:.5g}" textLength="{len(words) * cell:.5g}"'
        else:
            places = f'x="{" ".join(f"{place + cell * n:.5g}" for n in range(len(words)))}"'
        yield f'<text style="{style}" {places} y="18.5">{html.escape(words, quote=False)}</text>'


def _joined(parts: list[str]) -> str:
    """Neighbouring rectangles of one colour become one."""
    found: list[str] = []
    before: tuple[str, float, float] | None = None
    for part in parts:
        match = re.match(r'<rect fill="(#\w+)" x="([\d.]+)" width="([\d.]+)"', part)
        if match is None:
            found.append(part)
            continue
        fill, x, width = match[1], float(match[2]), float(match[3])
        if before is not None and before[0] == fill and abs(before[1] + before[2] - x) < 0.1:
            x, width = before[1], before[2] + width
            found.pop()
        before = (fill, x, width)
        found.append(f'<rect fill="{fill}" x="{x:g}" width="{width:.5g}" height="24.7"/>')
    return "".join(found)


def animate(frames: list[Frame], title: str, poster: int) -> str:
    """The frames as one SVG that repeats; `poster` is the frame that is shown where nothing animates."""
    screens = [_read(frame.svg) for frame in frames]
    width, height = screens[0].width, screens[0].height
    total = sum(frame.seconds for frame in frames)
    starts = [sum(frame.seconds for frame in frames[:at]) for at in range(len(frames) + 1)]
    layers: dict[tuple[float, str], list[int]] = {}
    for number, (screen, frame) in enumerate(zip(screens, frames, strict=True)):
        for at, content in screen.rows.items():
            layers.setdefault((at * ROW, content), []).append(number)
        layers.setdefault((height + 12, _caption(frame)), []).append(number)
    names: dict[str, str] = {}
    body = []
    for (y, content), shown in sorted(layers.items()):
        shared = re.sub(r'style="([^"]*)"', lambda style: f'class="{names.setdefault(style[1], f"s{len(names)}")}"', content)
        inside = "" if len(shown) == len(frames) else _visibility(shown, starts, total)
        hidden = "" if poster in shown else ' visibility="hidden"'
        body.append(f'<g transform="translate(0 {y:.4g})"{hidden}>{shared}{inside}</g>')
    classes = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 2 * LEFT:g} {height + TOP + FOOT:g}" role="img">'
        f"<title>{html.escape(title)}</title>"
        f"<style>text{{font:20px {FONT};white-space:pre}}{classes}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#292929"/>'
        f'<circle cx="26" cy="22" r="7" fill="#ff5f57"/><circle cx="48" cy="22" r="7" fill="#febc2e"/>'
        f'<circle cx="70" cy="22" r="7" fill="#28c840"/>'
        f'<g transform="translate({LEFT} {TOP})">{"".join(body)}</g></svg>\n'
    )


def _caption(frame: Frame) -> str:
    """The line below the screen: the key in a cap, then what happens."""
    cap, x = "", 4
    if frame.key:
        wide = 20 + 12 * len(frame.key)
        cap = (
            f'<rect x="4" width="{wide}" height="32" rx="5" fill="#e5c76b"/>'
            f'<text style="fill:#161b22;font-weight:700" x="14" y="22.5">{html.escape(frame.key)}</text>'
        )
        x = wide + 18
    return f'{cap}<text style="fill:#d0d7e2" x="{x}" y="22.5">{html.escape(frame.caption)}</text>'


def _visibility(shown: list[int], starts: list[float], total: float) -> str:
    """SMIL: visible during these frames, hidden in all others."""
    times, values = [0.0], ["visible" if shown[0] == 0 else "hidden"]
    for at in range(1, len(starts) - 1):
        value = "visible" if at in shown else "hidden"
        if value != values[-1]:
            times.append(starts[at] / total)
            values.append(value)
    key_times = ";".join(f"{time:.4g}" for time in times)
    return (
        f'<animate attributeName="visibility" calcMode="discrete" dur="{total:g}s" repeatCount="indefinite" '
        f'keyTimes="{key_times}" values="{";".join(values)}"/>'
    )
