"""Keys and typed commands reach the run; what came of them is said; what is lost is shown before anything is sent."""

from midwatch import protocol as p
from tests.tui.conftest import Screen, attached
from tests.tui.stage import NOW, STEP, Stage, replace
from tui.core import keys
from tui.dialogs.base import Press
from tui.dialogs.rollback import RollbackDialog


async def test_p_pauses_and_then_resumes(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("p")
        await screen.sees("pause: done at step 1,180")
        stage.send(state="paused", reason="by anna")
        await screen.sees("PAUSED", "by anna", "p resume")
        await screen.press("p")
        await screen.until(lambda: stage.verbs() == ["pause", "resume"])


async def test_a_command_is_shown_as_pending_until_its_outcome(stage: Stage) -> None:
    stage.hold.add("checkpoint")
    async with attached(stage) as screen:
        await screen.press("c")
        await screen.sees("checkpoint: asked, waiting for its outcome")
        assert "done" not in screen.panel("status")


async def test_a_refusal_is_shown_with_its_reason(stage: Stage) -> None:
    stage.outcome = lambda command: {"state": "refused", "step": None, "reason": "it is paused already"}
    async with attached(stage) as screen:
        await screen.press("p")
        await screen.sees("pause: refused: it is paused already")
        assert "Traceback" not in screen.text()


async def test_g_marks_the_newest_checkpoint_golden(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("g")
        await screen.until(lambda: stage.commands != [])
        assert (stage.commands[0].verb, stage.commands[0].arguments) == ("golden", {"checkpoint": "step-1100"})


async def test_in_checkpoints_g_marks_the_chosen_one_or_takes_the_mark_back(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("k", "checkpoints")
        await screen.press("up", "g")  # from step-1100 to step-1000, which is golden
        await screen.until(lambda: len(stage.commands) == 1)
        await screen.press("up", "g")
        await screen.until(lambda: len(stage.commands) == 2)
        assert [(c.verb, c.arguments["checkpoint"]) for c in stage.commands] == [("ungolden", "step-1000"), ("golden", "step-800")]


async def _rollback_dialog(screen: Screen) -> RollbackDialog:
    await screen.until(lambda: isinstance(screen.app.screen, RollbackDialog), "the dialog")
    dialog = screen.app.screen
    assert isinstance(dialog, RollbackDialog)
    await screen.sees("Undoes")
    return dialog


async def test_rollback_shows_what_it_undoes_with_the_focus_on_cancel(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("R")
        dialog = await _rollback_dialog(screen)
        assert isinstance(dialog.focused, Press) and dialog.focused.label == "Cancel"
        await screen.sees("180 steps", "2.95M tokens", "29s of training", "lr 5e-05 -> 0.0001", "▸ · step-1100")
        await screen.press("enter")
        await screen.until(lambda: len(screen.app.screen_stack) == 1)
        assert stage.commands == []
        assert "nothing was sent" in screen.panel("status")


async def test_rollback_goes_to_the_chosen_checkpoint_with_skip_and_rate(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("R")
        await _rollback_dialog(screen)
        await screen.press("down", "down", "down", "down")  # to the older golden
        await screen.sees("▸ ★ step-400")
        await screen.press("shift+tab", "backspace", "0", ".", "5")  # from Cancel back into the rate
        await screen.press("shift+tab", "backspace", "7")
        await screen.press("tab", "tab", "right", "enter")
        await screen.until(lambda: stage.commands != [])
        command = stage.commands[0]
        assert (command.verb, command.arguments) == (
            "rollback",
            {"checkpoint": "step-400", "skip": 7, "lr_scale": 0.5, "shown": 180},
        )


async def test_the_rollback_dialog_goes_on_with_the_run_and_sends_what_it_last_showed(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("R")
        await _rollback_dialog(screen)
        await screen.press("down", "tab")
        stage.undo = replace(stage.undo, steps=253)
        stage.send(step=STEP + 73)
        await screen.sees("Undoes 253 steps", "▸ ★ step-1000", "[ Roll back ]")
        await screen.press("enter")
        await screen.until(lambda: stage.commands != [])
        assert stage.commands[0].arguments == {"checkpoint": "step-1000", "shown": 253}


async def test_a_rollback_whose_cost_is_not_known_yet_is_not_sent(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("R")
        dialog = await _rollback_dialog(screen)
        dialog._undone.clear()
        await screen.press("tab", "enter")
        await screen.sees("wait: what this would undo is not known yet")
        assert stage.commands == []


def _spike(step: int, last: int, lineage: int = 2) -> p.Alarm:
    return p.Alarm(
        key="loss spike",
        text="loss spike: train/loss is 9, threshold: above 4",
        rule="loss spike",
        value=9.0,
        threshold="above 4",
        step=step,
        lineage=lineage,
        time=NOW - 20,
        last_step=last,
        last_time=NOW,
        count=3,
    )


async def test_before_an_alarm_the_newest_good_checkpoint_is_chosen_and_b_skips_to_the_bad_step(stage: Stage) -> None:
    stage.snapshot = replace(stage.snapshot, alarms=(_spike(1090, 1150),))
    async with attached(stage) as screen:
        await screen.press("R")
        await _rollback_dialog(screen)
        await screen.sees("▸ ★ step-1000", "The data of the bad step 1,150 is trained on again")
        await screen.press("b")
        await screen.sees("The data of steps 1,001 to 1,150 is skipped, including the bad step")
        await screen.press("up")  # the skip follows the checkpoint
        await screen.sees("▸ · step-1100", "The data of steps 1,101 to 1,150 is skipped")
        await screen.press("right", "enter")
        await screen.until(lambda: stage.commands != [])
        assert stage.commands[0].arguments == {"checkpoint": "step-1100", "skip": 50, "shown": 180}


async def test_an_alarm_on_a_line_that_was_rolled_back_does_not_choose(stage: Stage) -> None:
    stage.snapshot = replace(stage.snapshot, alarms=(_spike(450, 455, lineage=1),))
    async with attached(stage) as screen:
        await screen.press("R")
        await _rollback_dialog(screen)
        await screen.sees("▸ · step-1100")
        assert "bad step" not in screen.text()


async def test_a_wrong_entry_in_the_rollback_dialog_sends_nothing(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("R")
        await _rollback_dialog(screen)
        await screen.press("shift+tab", "backspace", "x", "tab", "right", "enter")
        await screen.sees("'x' is not a number")
        assert stage.commands == []


async def test_a_rollback_that_cannot_be_says_why(stage: Stage) -> None:
    stage.undo = replace(stage.undo, problem="step-1000 is being deleted")
    async with attached(stage) as screen:
        await screen.press("R")
        await screen.sees("step-1000 is being deleted")


async def test_advance_says_what_is_cut_short_and_passed_over(stage: Stage) -> None:
    waiting = [replace(s, state="waiting", step=0) if s.name in ("sft", "dpo") else s for s in stage.snapshot.stages]
    waiting[2] = replace(waiting[2], state="running", step=150)
    stage.snapshot = replace(stage.snapshot, stages=tuple(waiting), stage="extend")
    async with attached(stage) as screen:
        await screen.press("A")
        await screen.sees("Ends extend at step 150 of 200: 50 steps", "[ Cancel ]")
        await screen.press("down")
        await screen.sees("Skips sft entirely")
        await screen.press("right", "enter")
        await screen.until(lambda: stage.commands != [])
        assert (stage.commands[0].verb, stage.commands[0].arguments) == ("advance", {"to": "dpo"})


async def test_stop_now_says_what_is_lost(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("S")
        await screen.sees("Writes a checkpoint", "[ Cancel ]")
        await screen.press("down")
        await screen.sees("Loses 80 steps after step-1100")
        await screen.press("right", "enter")
        await screen.until(lambda: stage.verbs() == ["stop-now"])


async def test_escape_leaves_every_dialog_and_sends_nothing(stage: Stage) -> None:
    async with attached(stage) as screen:
        for key in "RAS":
            await screen.press(key)
            await screen.until(lambda: len(screen.app.screen_stack) == 2)
            await screen.press("escape")
            await screen.until(lambda: len(screen.app.screen_stack) == 1)
        assert stage.commands == []


async def test_typed_commands_are_sent(stage: Stage) -> None:
    typed = {
        "set lr 1e-4": ("set", {"key": "lr", "value": 1e-4}),
        "golden 140": ("golden", {"checkpoint": "140"}),
        "cancel 12": ("cancel", {"id": "12"}),
        "pause --release": ("release", {}),
        "rollback! 140 --skip 5 --lr-scale 0.5": ("rollback", {"checkpoint": "140", "skip": 5, "lr_scale": 0.5}),
        "stop! --now": ("stop-now", {}),
    }
    async with attached(stage) as screen:
        for number, line in enumerate(typed):
            await screen.type(line)
            await screen.until(lambda: len(stage.commands) == number + 1, line)  # noqa: B023
        assert [(c.verb, c.arguments) for c in stage.commands] == list(typed.values())


async def test_a_typed_rollback_asks_first_with_what_was_typed(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.type("rollback 800 --skip 5 --lr-scale 0.5")
        await _rollback_dialog(screen)
        await screen.sees("▸ · step-800")
        await screen.press("right", "enter")
        await screen.until(lambda: stage.commands != [])
        assert stage.commands[0].arguments == {"checkpoint": "step-800", "skip": 5, "lr_scale": 0.5, "shown": 180}


async def test_a_typed_rollback_to_what_is_not_there_sends_nothing(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.type("rollback 77")
        await screen.sees("there is no checkpoint '77'")
        assert len(screen.app.screen_stack) == 1 and stage.commands == []


async def test_what_is_mistyped_is_answered_in_plain_words(stage: Stage) -> None:
    async with attached(stage) as screen:
        for line, answer in (
            ("rolback 1", "no such command"),
            ("set lr fast", "'fast' is not a number"),
            ("set lr", "usage: set KEY"),
        ):
            await screen.type(line)
            await screen.sees(answer)
        assert stage.commands == []


async def test_tab_completes_and_the_arrows_recall(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("colon", "g", "o", "l", "tab")
        await screen.sees(":golden ")
        await screen.press("s", "tab")
        await screen.sees(":golden step-")
        await screen.press("2", "tab", "enter")
        await screen.until(lambda: [c.arguments for c in stage.commands] == [{"checkpoint": "step-200"}])
        await screen.press("colon", "up")
        await screen.sees(":golden step-200")


async def test_a_read_only_screen_binds_no_command(stage: Stage) -> None:
    async with attached(stage, read_only=True) as screen:
        for key in keys.COMMANDS:
            await screen.press(*key.keys)
            await screen.sees(f"{key.shown} is not bound")
        await screen.press("colon", "p", "a", "u", "s", "e", "enter")
        await screen.sees("refused: this screen is read-only")
        assert len(screen.app.screen_stack) == 1 and stage.commands == []
        await screen.sees("READ-ONLY")
        assert "pause" not in screen.panel("footer")


async def test_commands_of_others_show_while_they_wait(stage: Stage) -> None:
    waiting = p.CommandView(
        id="z", number=9, verb="rollback", arguments={"checkpoint": "step-400"}, author="rule", time=NOW, state="sent"
    )
    async with attached(stage) as screen:
        stage.send(commands=(waiting,))
        await screen.sees("#9 rollback step-400 (rule): sent")


async def test_settings_not_in_force_and_a_changed_environment_are_told_until_hidden(stage: Stage) -> None:
    stage.snapshot = replace(stage.snapshot, settings_asked={"lr": 1e-4}, changes=("torch 2.12.0 -> 2.13.0",))
    async with attached(stage) as screen:
        await screen.sees("lr 5e-05 in force, 0.0001 asked for", "torch 2.12.0 -> 2.13.0")
        await screen.press("escape")
        await screen.until(lambda: "asked for" not in screen.text() and "2.13.0" not in screen.text())
        stage.send(settings_asked={"lr": 2e-4})
        await screen.sees("0.0002 asked for")


async def test_an_alarm_stands_above_everything_until_a_acknowledges_it(stage: Stage) -> None:
    async with attached(stage) as screen:
        stage.send(alarms=(_spike(1090, 1150),), step=STEP + 1)
        await screen.sees("ALARM  08:53:20 3 times since step 1,090 loss spike: train/loss is 9", "above 4 (step 1,150)")
        await screen.press("m")
        await screen.sees("ALARM")
        await screen.press("a")
        await screen.until(lambda: stage.commands != [])
        assert (stage.commands[0].verb, stage.commands[0].arguments) == ("acknowledge", {"alarm": "loss spike"})
        stage.send(alarms=())
        await screen.until(lambda: "ALARM" not in screen.text())
        await screen.press("a")
        await screen.sees("acknowledge: there is no alarm")


async def test_alarms_that_find_no_room_are_counted(stage: Stage) -> None:
    async with attached(stage) as screen:
        stage.send(alarms=tuple(replace(_spike(n, n), key=f"rule {n}") for n in range(5)))
        await screen.sees("+2 more (j shows them)")
        await screen.type("acknowledge rule 3")
        await screen.until(lambda: stage.commands != [])
        assert stage.commands[0].arguments == {"alarm": "rule 3"}


async def test_a_refusal_longer_than_the_screen_is_shown_whole(stage: Stage) -> None:
    reason = (
        "stage \"dpo\" has no setting 'kl'; it has: lr, lr_scale, min_lr_ratio, weight_decay, clip, beta1, beta2, beta, the end"
    )
    stage.outcome = lambda command: {"state": "refused", "step": None, "reason": reason}
    async with attached(stage) as screen:
        await screen.type("set kl 1")
        await screen.sees("set kl 1", "refused", "the end")


async def test_keys_of_commands_that_need_arguments_begin_a_line_for_them(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("E")
        await screen.sees(":set ")
        await screen.press("l", "r", "equals_sign", "2", "enter")
        await screen.press("C")
        await screen.sees(":cancel ")
        await screen.press("1", "2", "enter")
        await screen.until(lambda: len(stage.commands) == 2)
        assert [(c.verb, c.arguments) for c in stage.commands] == [("set", {"key": "lr", "value": 2.0}), ("cancel", {"id": "12"})]


async def test_a_command_without_a_dialog_of_its_own_asks_all_the_same(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.type("regroup")
        await screen.sees("end the ranks and start them again", "[ Cancel ]", "Regroup")
        await screen.press("right", "enter")
        await screen.until(lambda: stage.verbs() == ["regroup"])
