"""A recipe.toml that is edited under a run: what the journal has of it, and what it must not have."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from launcher_desk import Desk, desk_at, make_recipe

from launcher.controller.core.recipe_change import note_change, run_began, stated
from midwatch.journal import entries as j


def changes(desk: Desk) -> list[tuple[str, ...]]:
    return [entry.changes for _, entry in desk.journal.entries if isinstance(entry, j.RecipeChanged)]


async def test_an_edit_is_journaled_once_and_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    environment = {"MY_TOKEN": "sesame-2", "URL": "https://ann:sesame-3@host/"}
    cluster = msgspec.structs.replace(recipe.cluster, setup=("export A_TOKEN=sesame-1 B=2",), env=environment)
    recipe = msgspec.structs.replace(recipe, cluster=cluster)
    async with desk_at(tmp_path / "run", monkeypatch, "starting", recipe=recipe) as desk:
        file = desk.paths.recipe
        before = file.read_text()
        desk.context.record(run_began("desk", desk.context.recipe, before, 1.0, desk.context.run))
        note_change(desk.context)
        assert changes(desk) == [], "nothing was edited"
        file.write_text("# a comment\n" + before)
        note_change(desk.context)
        assert changes(desk) == [], "nor does a comment count"

        file.write_text(before.replace("keep = 3", "keep = 4"))
        note_change(desk.context)
        note_change(desk.context)
        assert changes(desk) == [("checkpoint.keep: 3 -> 4",)]
        told = [e for _, e in desk.journal.entries if isinstance(e, j.Noted) and "recipe.toml was edited" in e.text]
        assert [(e.level, e.text.endswith(": checkpoint.keep: 3 -> 4")) for e in told] == [("warning", True)]

        file.write_text(before.replace("keep = 3", "keep = 4").replace("sesame-2", "sesame-9"))
        note_change(desk.context)
        assert changes(desk)[1:] == [()], "that a secret has changed is seen, and not what it is"
        written = b"".join(f.read_bytes() for f in desk.paths.journal.glob("*.log"))
        assert b"sesame" not in written and b"A_TOKEN=***" in written and b"https://ann:***@host/" in written


def test_tables_of_a_list_are_told_by_their_names() -> None:
    text = '[[stage]]\nname = "one"\nlr = 1.0\n[[stage]]\nname = "two"\nmixture = { a = 1.0 }\n'
    assert stated(text) == {
        "stage.one.name": '"one"',
        "stage.one.lr": "1.0",
        "stage.two.name": '"two"',
        "stage.two.mixture.a": "1.0",
    }


def test_the_journal_of_an_earlier_version_is_no_edit() -> None:
    entry = j.decoder.decode(b'{"type":"RunBegan","time":1.0,"name":"x","recipe":"y"}')
    assert isinstance(entry, j.RunBegan) and (entry.file, entry.stated) == ("", {})
