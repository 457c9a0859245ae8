"""docs/protocol.md says what the code does."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from docs.protocol import PAGE, TABLES, page
from midwatch import protocol as p
from midwatch.commands import VERBS

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_tables_on_the_pages_are_those_of_the_code(path: Path) -> None:
    assert page(path) == path.read_text(encoding="utf-8"), "behind the code; write it anew with: python -m docs.protocol"


@pytest.mark.parametrize("kind", [*typing.get_args(p.Message), *typing.get_args(p.RankBody)], ids=lambda k: k.__name__)
def test_every_message_is_spoken_of(kind: type[object]) -> None:
    name = kind.__name__
    told = name if not name.endswith("Reply") else name.replace("Reply", "")
    assert f"`{name}`" in TEXT or f"`{told}" in TEXT


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_is_spoken_of(verb: str) -> None:
    assert f"`{verb}`" in TEXT
