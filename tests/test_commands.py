"""Every command exists wherever commands are given: each place reads it as it is typed, from the one spec."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.protocol import COMMANDS, typed
from launcher.cli.parser import make_parser
from launcher.controller.commands.command_queue import _NODE_MARKS, Dispatch
from launcher.controller.core.events import Events
from midwatch.commands import (
    BY_NAME,
    BY_VERB,
    GROUPS,
    SPECS,
    Argument,
    CommandError,
    CommandSpec,
    Doing,
    check_arguments,
    describe,
    parse_command,
    read,
    usage_of,
)
from midwatch.recipe import Watch
from tests.tui.stage import snapshot
from tui.core import keys
from tui.core.command_line import complete, parse
from tui.script import parse_script

VALUES: dict[str, Any] = {"text": "n1", "whole number": 3, "number": 0.5}
ALL = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.verb)


def given_arguments(spec: CommandSpec) -> dict[str, Any]:
    """A value for each argument that can be typed."""
    return {argument.name: VALUES[argument.kind] for argument in spec.typed_arguments}


def line_of(spec: CommandSpec) -> str:
    """The command with all its arguments, put together from the spec alone."""
    words = [spec.typed]
    for argument in spec.typed_arguments:
        words += [argument.flag] if argument.option else []
        words.append(str(VALUES[argument.kind]))
    return " ".join(words)


# The places


@ALL
def test_the_command_line_reads_it(spec: CommandSpec) -> None:
    words = line_of(spec).removeprefix(spec.name).split()
    arguments = make_parser().parse_args([*spec.name.split(), "RUN", "--json", *words])
    assert (arguments.run, arguments.json) == ("RUN", True)
    assert read(arguments.steering, arguments) == (spec.verb, given_arguments(spec))


@ALL
def test_the_prompt_reads_it_and_asks_first_if_something_is_lost(spec: CommandSpec) -> None:
    found = parse(line_of(spec))
    assert (found.verb, found.arguments, found.sure, found.problem) == (spec.verb, given_arguments(spec), False, "")
    first, _, rest = line_of(spec).partition(" ")
    assert parse(f"{first}! {rest}").sure


@ALL
def test_the_prompt_completes_it(spec: CommandSpec) -> None:
    line = ""
    for word in spec.typed.split():
        choices = complete(line, snapshot())[1]
        assert word in (choices or complete(f"{line}-", snapshot())[1]), line
        line += f"{word} "
    first = next((argument for argument in spec.typed_arguments if argument.place and argument.choices), None)
    if first is not None and first.choices is not None and (offered := sorted(first.choices(snapshot()))):
        assert complete(line, snapshot())[1] == offered


@ALL
def test_a_script_reads_it(spec: CommandSpec) -> None:
    (step,) = parse_script(f"20: {line_of(spec)}")
    assert step.commands == ((spec.verb, given_arguments(spec)),)


@ALL
def test_a_watch_rule_gives_it_unless_it_makes_no_sense_there(spec: CommandSpec) -> None:
    rule = Watch(name="r", metric="train/loss", above=1.0, action=line_of(spec))
    if spec.by_rule:
        assert rule.problems() == []
        assert rule.command() == (spec.verb, given_arguments(spec))
    else:
        ((key, message),) = rule.problems()
        assert key == "action" and "a rule cannot give this command" in message


@ALL
def test_the_page_of_commands_has_it(spec: CommandSpec) -> None:
    (row,) = [line for line in typed().splitlines() if line.startswith(f"| `{usage_of(spec)}` ")]
    assert row in COMMANDS.read_text(encoding="utf-8") and spec.help in row


def test_the_keys_of_the_specs_are_bound() -> None:
    bound = [spec for spec in SPECS if spec.key is not None]
    assert {"pause", "set", "cancel", "node-drain"} <= {spec.verb for spec in bound}
    for spec in bound:
        assert spec.key is not None
        key = keys.find(spec.key.view or "watch", spec.key.key)
        assert key is not None and key.action == f"command:{spec.verb}" and key.changes


# Who carries it out


def test_each_command_has_what_carries_it_out_and_nothing_else_has() -> None:
    dispatch = Dispatch(*(_Anything() for _ in range(3)))  # type: ignore[arg-type]
    assert set(dispatch.at_once) == {spec.verb for spec in SPECS if spec.at_once}
    shaped = {spec.verb for spec in SPECS if any(doing is Doing.SHAPE for doing, _ in spec.states.values())}
    assert set(dispatch.shaping) == shaped - set(_NODE_MARKS)
    assert set(_NODE_MARKS) <= shaped
    for spec in SPECS:
        assert spec.at_once or spec.order or spec.verb in _NODE_MARKS, f"{spec.verb}: nothing carries it out"


class _Anything:
    """Has the events that the controller's parts subscribe to."""

    events = Events()


def test_what_parsers_call_their_own_is_no_argument_of_a_command() -> None:
    own = {"run", "json", "no_wait", "command", "steering", "node_command", "version"}
    for spec in SPECS:
        assert not own & {argument.name for argument in spec.arguments}


def test_commands_that_share_words_differ_by_their_flag() -> None:
    for name, specs in BY_NAME.items():
        assert sum(not spec.flag for spec in specs) == 1, name
        assert len({spec.flag for spec in specs}) == len(specs)
        assert name.count(" ") <= 1
    assert not set(GROUPS) & set(BY_NAME)


# Reading and writing


LETTERS = "abz09 .-_/#'\"\\$;,~é世"
"""Among them all that a shell gives a meaning to."""


def _text() -> st.SearchStrategy[str]:
    return st.text(LETTERS, min_size=1).filter(lambda text: text[:1] != "-")


def _value(argument: Argument) -> st.SearchStrategy[Any]:
    if argument.kind == "whole number":
        return st.integers(0, 10**9)
    if argument.kind == "number":
        return st.sampled_from([0.5, 1e-4, 2.0, 700.0])
    return _text() if argument.name != "key" else _text().filter(lambda text: "=" not in text)


@given(st.data())
def test_a_command_that_is_written_down_reads_back_the_same(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(SPECS))
    arguments = {
        argument.name: data.draw(_value(argument))
        for argument in spec.typed_arguments
        if argument.required or argument.default or data.draw(st.booleans())
    }
    neutral = {argument.name: argument.neutral for argument in spec.arguments}
    said = {name: value for name, value in arguments.items() if neutral[name] is None or value != neutral[name]}
    assert parse_command(describe(spec.verb, arguments)) == (spec.verb, said)


@pytest.mark.parametrize(
    ("line", "verb", "arguments"),
    [
        ("set lr=1e-4", "set", {"key": "lr", "value": 1e-4}),
        ("set lr 1e-4", "set", {"key": "lr", "value": 1e-4}),
        ("set mixture.a -1", "set", {"key": "mixture.a", "value": -1.0}),
        ("advance sft", "advance", {"to": "sft"}),
        ("advance --to=sft", "advance", {"to": "sft"}),
        ("golden", "golden", {"checkpoint": "latest"}),
        ("acknowledge", "acknowledge", {"alarm": "all"}),
        ("acknowledge loss spike", "acknowledge", {"alarm": "loss spike"}),
        ("rollback --skip 3 140", "rollback", {"checkpoint": "140", "skip": 3}),
        ("stop-now", "stop-now", {}),
        ("release", "release", {}),
        ("node-drain n1", "node-drain", {"node": "n1"}),
    ],
)
def test_what_may_be_typed_in_more_than_one_way(line: str, verb: str, arguments: dict[str, Any]) -> None:
    assert parse_command(line) == (verb, arguments)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "nothing typed"),
        ("rolback 1", "no such command (did you mean 'rollback'?)"),
        ("node", "node: needs one of drain, add, quarantine"),
        ("node empty n1", "node: 'empty' is none of drain, add, quarantine"),
        ("rollback", "rollback: the following arguments are required: ID (usage: rollback ID [--skip N] [--lr-scale X])"),
        ("rollback 1 2", "unrecognized arguments: 2"),
        ("rollback 1 --sk 3", "unrecognized arguments"),
        ("rollback 1 --skip 1.5", "'1.5' is not a whole number"),
        ("rollback 1 --skip -3", "skip: -3 must be at least 0"),
        ("rollback 1 --lr-scale 0", "lr_scale: 0.0 must be above 0 and at most 1000"),
        ("rollback 1 --lr-scale nan", "nan is not a finite number"),
        ("set lr", "set: VALUE is missing (usage: set KEY VALUE)"),
        ("set =3", "set: KEY is missing"),
        ("set lr=fast", "'fast' is not a number"),
        ("set lr fast", "'fast' is not a number"),
        ("advance sft --to dpo", "STAGE is given twice, as 'sft' and by --to"),
        ("golden 'a", "No closing quotation"),
    ],
)
def test_what_cannot_be_a_command_says_why_and_how_it_is_typed(line: str, says: str) -> None:
    with pytest.raises(CommandError) as error:
        parse_command(line)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("dance", {}, "dance: there is no such command in this version"),
        ("pause", {"now": 1}, "pause: unknown argument 'now'"),
        ("rollback", {}, "rollback: the argument 'checkpoint' is missing"),
        ("golden", {}, "golden: the argument 'checkpoint' is missing"),
        ("rollback", {"checkpoint": 5}, "rollback: checkpoint: 5 is not a text"),
        ("rollback", {"checkpoint": "a", "skip": True}, "skip: True is not a whole number"),
        ("rollback", {"checkpoint": "a", "skip": 1.0}, "skip: 1.0 is not a whole number"),
        ("rollback", {"checkpoint": "a", "skip": -1}, "skip: -1 must be at least 0"),
        ("rollback", {"checkpoint": "a", "lr_scale": 1001}, "lr_scale: 1001 must be above 0 and at most 1000"),
        ("set", {"key": "lr", "value": "1"}, "value: '1' is not a number"),
        ("set", {"key": "lr", "value": float("inf")}, "value: inf is not a finite number"),
        ("rollback", {"checkpoint": "a", "skip": 0, "lr_scale": 1000, "shown": 9}, ""),
        ("set", {"key": "lr", "value": 1}, ""),
    ],
)
def test_the_controller_checks_arguments_by_the_spec(verb: str, arguments: dict[str, Any], says: str) -> None:
    problem = check_arguments(verb, arguments)
    assert says in problem and bool(says) == bool(problem)


def test_a_journal_of_another_version_can_still_be_shown() -> None:
    assert describe("dance", {"node": "n1"}) == "dance n1"
    assert describe("rollback", {"checkpoint": 5, "skip": "x"}) == "rollback 5 --skip x"


def test_options_may_stand_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = make_parser().parse_args(["golden", "RUN", "--json", "step-3"])
    assert isinstance(parsed, argparse.Namespace) and parsed.checkpoint == "step-3"
    parsed = make_parser().parse_args(shlex.split("set RUN lr --no-wait 0.5"))
    assert (parsed.key, parsed.value, parsed.no_wait) == ("lr", 0.5, True)
    with pytest.raises(SystemExit):
        make_parser().parse_args(["golden", "RUN", "a", "b"])
    assert "unrecognized arguments: b" in capsys.readouterr().err


def test_every_verb_is_its_own_word() -> None:
    assert len(BY_VERB) == len(SPECS)
