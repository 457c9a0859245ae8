"""The commands that an operator, a script or a watch rule may give: one table, and how they are typed."""

from midwatch.commands.spec import Argument, CommandKey, CommandSpec
from midwatch.commands.states import STATES, Doing
from midwatch.commands.table import BY_NAME, BY_VERB, SPECS, VERBS, check_arguments
from midwatch.commands.typed import (
    GROUPS,
    CommandError,
    TypedCommand,
    add_arguments,
    command_name,
    describe,
    parse_command,
    read,
    split,
    usage,
    usage_of,
)

__all__ = [
    "BY_NAME",
    "BY_VERB",
    "GROUPS",
    "SPECS",
    "STATES",
    "VERBS",
    "Argument",
    "CommandError",
    "CommandKey",
    "CommandSpec",
    "Doing",
    "TypedCommand",
    "add_arguments",
    "check_arguments",
    "command_name",
    "describe",
    "parse_command",
    "read",
    "split",
    "usage",
    "usage_of",
]
