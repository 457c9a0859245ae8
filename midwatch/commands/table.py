"""All commands, one entry each.

A command is complete with its entry here; a handler in the controller if it is done there (launcher/controller/command_queue.py);
and, for one that ranks carry out, its number in `protocol.Op` and a handler in trainer/loop/apply_command.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from midwatch.commands.spec import Argument, CommandKey, CommandSpec
from midwatch.commands.states import ALWAYS, FAILED, NO_RANKS, NO_STEPS, NOW, QUEUE, SHAPE, no, states

if TYPE_CHECKING:
    from midwatch.protocol import Snapshot

# Values that a prompt offers


def _targets(snapshot: Snapshot) -> Iterator[str]:
    yield from ("golden", "latest", *(["undone"] if snapshot.undone else []))
    yield from (checkpoint.id for checkpoint in snapshot.checkpoints)


def _not_golden(snapshot: Snapshot) -> Iterator[str]:
    yield "latest"
    yield from (checkpoint.id for checkpoint in snapshot.checkpoints if not checkpoint.golden)


def _golden(snapshot: Snapshot) -> Iterator[str]:
    return (checkpoint.id for checkpoint in snapshot.checkpoints if checkpoint.golden)


def _later_stages(snapshot: Snapshot) -> Iterator[str]:
    return (stage.name for stage in snapshot.stages if stage.state == "waiting")


def _settings(snapshot: Snapshot) -> Iterator[str]:
    return iter(snapshot.settings)


def _queued(snapshot: Snapshot) -> Iterator[str]:
    return (str(command.number) for command in snapshot.commands if command.state == "queued")


def _alarms(snapshot: Snapshot) -> Iterator[str]:
    yield "all"
    yield from (alarm.key for alarm in snapshot.alarms)


def _nodes(snapshot: Snapshot) -> Iterator[str]:
    return (node.name for node in snapshot.nodes)


# The commands

_NODE = Argument("node", "its name, as `midwatch node list` shows it", metavar="NODE", required=True, choices=_nodes)
_WITH_RANKS = states(
    building=NO_STEPS, starting=QUEUE, training=NOW, paused=NOW, recovering=QUEUE, released=NO_RANKS, failed=FAILED
)
_WITH_OR_WITHOUT_RANKS = states(
    building=NO_STEPS, starting=QUEUE, training=NOW, paused=NOW, recovering=SHAPE, released=SHAPE, failed=SHAPE
)
_OF_A_NODE = states(building=SHAPE, starting=QUEUE, training=NOW, paused=NOW, recovering=SHAPE, released=SHAPE, failed=SHAPE)

SPECS: tuple[CommandSpec, ...] = (
    CommandSpec(
        verb="pause",
        help="hold all ranks after the step under way",
        done="all ranks hold; the outcome names the step",
        states=states(
            building=QUEUE,
            starting=QUEUE,
            training=NOW,
            paused=no("it is paused already"),
            recovering=QUEUE,
            released=no("it is released already"),
            failed=FAILED,
        ),
        order="PAUSE",
        key=CommandKey("p", "pause, or resume: they undo each other", "pause"),
    ),
    CommandSpec(
        verb="release",
        words="pause",
        flag="--release",
        help="write a checkpoint, end the ranks and give the GPUs back",
        done="a checkpoint is committed and the ranks have ended",
        states=states(
            building=NO_STEPS,
            starting=QUEUE,
            training=NOW,
            paused=NOW,
            recovering=QUEUE,
            released=no("it is released already"),
            failed=FAILED,
        ),
        order="RELEASE",
    ),
    CommandSpec(
        verb="resume",
        help="continue, after a pause, a release, a stop or a failure",
        done="the ranks continue; without ranks: rank 0 of the next generation is connected. `failed` if the start fails",
        states=states(
            building=no("it is starting already"),
            starting=no("it is starting already"),
            training=no("it is not paused"),
            paused=NOW,
            recovering=no("it restarts by itself"),
            released=SHAPE,
            failed=SHAPE,
        ),
        order="RESUME",
        by_rule=False,  # a rule fires on a step's metrics, and the run trains then
        leaves_hold=True,
    ),
    CommandSpec(
        verb="checkpoint",
        help="write a checkpoint now",
        done="it is committed; the outcome names it",
        states=_WITH_RANKS,
        order="CHECKPOINT",
        key=CommandKey("c", "checkpoint now", "save"),
    ),
    CommandSpec(
        verb="golden",
        help="trust a checkpoint: it is never pruned",
        done="the mark is journaled",
        states=ALWAYS,
        arguments=(
            Argument(
                "checkpoint", "its id, a step, or `latest` (default: latest)", "text", "ID", default="latest", choices=_not_golden
            ),
        ),
        at_once=True,
        key=CommandKey("g", "mark the newest checkpoint golden (in checkpoints: the chosen one, or no longer)", "golden"),
    ),
    CommandSpec(
        verb="ungolden",
        help="remove the golden mark",
        done="its removal is journaled",
        states=ALWAYS,
        arguments=(
            Argument(
                "checkpoint", "its id, a step, or `latest` (default: latest)", "text", "ID", default="latest", choices=_golden
            ),
        ),
        at_once=True,
    ),
    CommandSpec(
        verb="acknowledge",
        help="mark an alarm as seen, until it is raised again",
        done="the alarm is marked as seen",
        states=ALWAYS,
        arguments=(
            Argument(
                "alarm",
                "its key, as `status` shows it (default: all alarms)",
                "text",
                "KEY",
                default="all",
                rest=True,
                choices=_alarms,
            ),
        ),
        at_once=True,
        by_rule=False,  # a rule's own alarm is for an operator
        key=CommandKey("a", "acknowledge the first alarm shown"),
    ),
    CommandSpec(
        verb="rollback",
        help="go back to a checkpoint, in place",
        done="it is loaded on all ranks; the outcome names lineage and step",
        states=_WITH_OR_WITHOUT_RANKS,
        arguments=(
            Argument(
                "checkpoint",
                "its id, a step, `latest`, `golden`, or `undone`: what the last rollback left",
                metavar="ID",
                required=True,
                choices=_targets,
            ),
            Argument(
                "skip", "pass over the next N steps of data", "whole number", "N", place=False, option=True, least=0, neutral=0
            ),
            Argument(
                "lr_scale",
                "multiply the learning rate by X",
                "number",
                "X",
                place=False,
                option=True,
                above=0,
                most=1000,
                neutral=1,
            ),
            Argument("shown", "the steps that a screen has said it would undo", "whole number", place=False),
        ),
        order="ROLLBACK",
        confirm=True,
        leaves_hold=True,
        key=CommandKey("R", "roll back, after asking", "roll back"),
    ),
    CommandSpec(
        verb="advance",
        help="end the stage here and begin a later one",
        done="the stage's checkpoint is committed and the later stage has begun",
        states=_WITH_RANKS,
        arguments=(Argument("to", "a later stage (default: the next one)", metavar="STAGE", option=True, choices=_later_stages),),
        order="ADVANCE",
        confirm=True,
        leaves_hold=True,
        key=CommandKey("A", "advance to a later stage, after asking", "advance"),
    ),
    CommandSpec(
        verb="set",
        help="change a live setting from the next step on",
        done="all ranks use the new value; the outcome has the old one",
        states=_WITH_OR_WITHOUT_RANKS,
        arguments=(
            Argument("key", "the setting, as `lr`; `KEY=VALUE` will do as well", metavar="KEY", required=True, choices=_settings),
            Argument("value", "its new value", "number", "VALUE", required=True),
        ),
        order="SET",
        pair=True,
        key=CommandKey("E", "change a live setting: opens the command line with `set`"),
    ),
    CommandSpec(
        verb="cancel",
        help="withdraw a command that waits in line",
        done="the other command was still waiting, and is withdrawn",
        states=ALWAYS,
        arguments=(Argument("id", "the command's number or id", metavar="NUMBER", required=True, choices=_queued),),
        at_once=True,
        by_rule=False,  # no number is known when a recipe is written
        key=CommandKey("C", "withdraw a command that waits: opens the command line with `cancel`"),
    ),
    CommandSpec(
        verb="stop",
        help="write a checkpoint, end the ranks and close the run",
        done="a checkpoint is committed, and ranks and agents have ended; silent agents are waited for, 15 seconds",
        states=states(building=NOW, starting=QUEUE, training=NOW, paused=NOW, recovering=NOW, released=NOW, failed=NOW),
        order="STOP",
        confirm=True,
        leaves_hold=True,
        key=CommandKey("S", "stop the run, after asking", "stop"),
    ),
    CommandSpec(
        verb="stop-now",
        words="stop",
        flag="--now",
        help="stop at once, without a checkpoint",
        done="ranks and agents have ended, without a checkpoint; after five seconds without an answer they are killed",
        states=states(building=NOW, starting=NOW, training=NOW, paused=NOW, recovering=NOW, released=NOW, failed=NOW),
        order="STOP_NOW",
        at_once=True,
        confirm=True,
        leaves_hold=True,
    ),
    CommandSpec(
        verb="regroup",
        help="write a checkpoint, end the ranks and start them again on the nodes that are there now",
        done="the ranks have saved a checkpoint, and start again with the nodes that are there now",
        states=states(
            building=NO_STEPS,
            starting=QUEUE,
            training=NOW,
            paused=NOW,
            recovering=no("the ranks are being gathered anew already"),
            released=NO_RANKS,
            failed=FAILED,
        ),
        order="REGROUP",
        confirm=True,
    ),
    CommandSpec(
        verb="node-drain",
        words="node drain",
        help="continue without the node, after a checkpoint",
        done="the node is out of use; if it was in use, the ranks have saved a checkpoint and start again without it",
        states=_OF_A_NODE,
        arguments=(_NODE,),
        order="REGROUP",
        confirm=True,
        key=CommandKey("D", "drain the node, after asking: it trains no more", "drain", view="nodes"),
    ),
    CommandSpec(
        verb="node-add",
        words="node add",
        help="use the node again and reset its failure count",
        done="it may be used again, and its failure count is reset; the ranks start again when it is there",
        states=_OF_A_NODE,
        arguments=(_NODE,),
        order="REGROUP",
        confirm=True,
        key=CommandKey("U", "use the node again, after asking", view="nodes"),
    ),
    CommandSpec(
        verb="node-quarantine",
        words="node quarantine",
        help="continue without the node, at once, from the newest checkpoint",
        done="all ranks have ended at once, and continue without the node from the newest checkpoint",
        states=states(building=SHAPE, starting=SHAPE, training=NOW, paused=NOW, recovering=SHAPE, released=SHAPE, failed=SHAPE),
        arguments=(_NODE,),
        confirm=True,
        key=CommandKey(
            "Q", "quarantine the node, after asking: nothing it had a share in since the checkpoint is kept", view="nodes"
        ),
    ),
)
BY_VERB: dict[str, CommandSpec] = {spec.verb: spec for spec in SPECS}
VERBS: tuple[str, ...] = tuple(BY_VERB)


def _by_name() -> dict[str, tuple[CommandSpec, ...]]:
    found: dict[str, tuple[CommandSpec, ...]] = {}
    for spec in SPECS:
        found[spec.name] = (*found.get(spec.name, ()), spec)
    return found


BY_NAME = _by_name()
"""By the words that are typed: the commands that share them."""


def check_arguments(verb: str, arguments: dict[str, object]) -> str:
    """Why the command cannot be carried out as it is; empty if it can."""
    spec = BY_VERB.get(verb)
    return spec.problem(arguments) if spec is not None else f"{verb}: there is no such command in this version"
