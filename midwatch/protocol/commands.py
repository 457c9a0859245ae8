"""Clients and the controller: the greeting, commands, and refusals."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from midwatch.protocol.base import StrictMessage, Verb

# Screens, the command line and other clients.


class ClientHello(StrictMessage, frozen=True):
    version: int
    read_only: bool = False
    subscribe: bool = False
    """Send a Snapshot now and whenever something has changed."""


class ClientWelcome(StrictMessage, frozen=True):
    term: int
    run: str
    directory: str
    author: str
    """Who this client is, as commands will name them."""
    archived: bool = False
    """No controller is running: questions are answered from the run's files, and nothing can be asked to be done."""


class Command(StrictMessage, frozen=True):
    """What an operator asks for; `id` is the client's and makes a resend harmless."""

    id: str
    verb: Verb
    arguments: dict[str, Any] = {}
    wait: bool = True
    """Answer when it has ended, not already when it is accepted."""


class CommandView(msgspec.Struct, frozen=True, kw_only=True):
    """A command and what has come of it."""

    id: str
    number: int
    verb: str
    arguments: dict[str, Any]
    author: str
    time: float
    state: Literal["queued", "sent", "done", "refused", "failed", "cancelled"]
    step: int | None = None
    detail: dict[str, Any] = {}
    reason: str = ""


class CommandReply(StrictMessage, frozen=True):
    command: CommandView


class Refused(StrictMessage, frozen=True):
    """The request cannot be met. `id` is the request's, where it had one."""

    reason: str
    id: int = 0
