"""What stands in the controller's way is on the screen until it is put right, and what speaks against a checkpoint beside it."""

from __future__ import annotations

from tests.tui.conftest import attached
from tests.tui.stage import Stage, replace, snapshot
from tui.core.scene import Scene, checkpoint_flags, silence, speaks_against
from tui.dialogs.rollback import choices, pick, unknown

FAULT = "/runs/a/journal/000003.log: Input/output error; the storage is at fault, not full (/dev/sdb1 at /runs)"


async def test_a_journal_that_cannot_be_written_is_told_with_its_disk_until_it_can(stage: Stage) -> None:
    async with attached(stage) as screen:
        stage.send(faults=(FAULT,))
        await screen.sees("FAULT", "Input/output error", "/dev/sdb1")
        stage.send(faults=())
        await screen.until(lambda: "FAULT" not in screen.text(), "the fault is gone")


async def test_the_checkpoints_view_says_what_is_missing_and_why_one_is_not_to_be_trusted(stage: Stage) -> None:
    before = snapshot()
    first, second, *rest = sorted((c for c in before.checkpoints if c.on_line), key=lambda c: -c.step)
    doubted = replace(first, suspect=False, golden=False, doubt="after the alarm at step 900: spike: train/loss is 9")
    missing = replace(second, suspect=False, golden=False, missing=True)
    async with attached(stage) as screen:
        stage.send(checkpoints=(doubted, missing, *rest))
        await screen.press("k")
        await screen.sees("doubtful", "MISSING")
    scene = Scene("demo", before.time, snapshot=replace(before, checkpoints=(doubted, missing, *rest)), received=before.time)
    assert speaks_against(doubted) == doubted.doubt and "is missing" in speaks_against(missing)
    assert "MISSING" in checkpoint_flags(missing)
    assert choices(scene)[0].id not in (doubted.id, missing.id), "good ones come first in the rollback dialog"


def test_the_rollback_dialog_knows_what_the_last_rollback_left() -> None:
    before = snapshot()
    left = next(c for c in before.checkpoints if not c.on_line)
    scene = Scene("demo", before.time, snapshot=replace(before, undone=left.id), received=before.time)
    assert unknown(scene, "undone") == ""
    assert choices(scene)[pick(choices(scene), "undone", scene)].id == left.id
    none = Scene("demo", before.time, snapshot=before, received=before.time)
    assert unknown(none, "undone") == "rollback: no checkpoint of an undone lineage is left"


async def test_a_dialog_whose_choice_is_gone_does_nothing_until_it_is_chosen_again(stage: Stage) -> None:
    before = snapshot()
    async with attached(stage) as screen:
        await screen.press("R")
        await screen.sees("Undoes")
        chosen = screen.app.screen._chosen.id  # type: ignore[attr-defined]
        stage.send(checkpoints=tuple(c for c in before.checkpoints if c.id != chosen))
        await screen.sees(f"{chosen} was deleted")
        await screen.press("tab", "enter")
        await screen.sees("choose again with the arrow keys")
        assert stage.commands == []
        await screen.press("down", "up")
        await screen.sees("Undoes")
        await screen.press("enter")
        await screen.until(lambda: stage.commands, "the rollback")
        assert stage.commands[0].arguments["checkpoint"] != chosen


def test_a_run_that_is_shown_from_its_files_is_not_silent() -> None:
    shown = replace(snapshot(), archived=True, state="released")
    assert silence(Scene("demo", shown.time + 12, snapshot=shown, received=shown.time)) is None
    live = replace(shown, archived=False)
    assert silence(Scene("demo", live.time + 12, snapshot=live, received=live.time)) is not None
