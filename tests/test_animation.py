"""A recording of the screen: many exported screens as one animated SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from rich.console import Console

from docs.animation import Frame, animate
from docs.recording import TARGET


def exported(*lines: str) -> str:
    console = Console(record=True, width=20, height=len(lines), force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in lines:
        console.print(line)
    return console.export_svg(title="")


FRAMES = [
    Frame(exported("[bold]loss[/] 2.5", "calm", "⡀⢀ end"), 1.0, "", "All is calm."),
    Frame(exported("[bold]loss[/] 7.1", "ALARM", "⡀⢀ end"), 2.0, "R", "It spikes & stays."),
    Frame(exported("[bold]loss[/] 2.5", "calm", "⡀⢀ end"), 1.0, "", "All is calm."),
]


def layers(svg: str) -> dict[str, ElementTree.Element]:
    """The rows by their words."""
    space = "{http://www.w3.org/2000/svg}"
    groups = ElementTree.fromstring(svg).iter(f"{space}g")
    return {"|".join(text.text or "" for text in group.findall(f"{space}text")): group for group in groups}


def test_a_row_is_written_once_and_shown_while_its_frames_last() -> None:
    found = layers(animate(FRAMES, "title", poster=1))
    assert len(re.findall("calm</text>", animate(FRAMES, "title", poster=1))) == 1
    calm, alarm = found["calm"], found["ALARM"]
    animation = calm[-1]
    assert (animation.get("keyTimes"), animation.get("values")) == ("0;0.25;0.75", "visible;hidden;visible")
    assert alarm[-1].get("values") == "hidden;visible;hidden" and alarm[-1].get("dur") == "4s"


def test_what_never_changes_is_not_animated_and_the_poster_shows_without_animation() -> None:
    found = layers(animate(FRAMES, "title", poster=1))
    always = found["⡀⢀|end"]
    assert [child.tag for child in always if child.tag.endswith("animate")] == [] and always.get("visibility") is None
    assert found["calm"].get("visibility") == "hidden" and found["ALARM"].get("visibility") is None
    assert "R|It spikes & stays." in found


def test_signs_that_a_font_may_lack_have_a_place_each() -> None:
    always = layers(animate(FRAMES, "title", poster=0))["⡀⢀|end"]
    braille, word = always[-2], always[-1]
    assert braille.get("x") == "0 12.2" and braille.get("textLength") is None
    assert word.get("x") == "36.6" and word.get("textLength") == "36.6"


def test_the_recording_in_the_docs_is_whole_and_small() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    words = " ".join(layers(text))
    for expected in ("A watch rule raises an alarm.", "Roll back", "lineage 2", "The data of steps 401 to 454 is skipped"):
        assert expected in words, expected
    assert not re.search(r"(href|src|url\()", text)
