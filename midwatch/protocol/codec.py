"""The union of all messages, and their encoding as msgpack frames."""

from __future__ import annotations

import msgspec

from midwatch.protocol.agents import (
    AgentHello,
    AgentWelcome,
    EndRanks,
    Gather,
    Gathered,
    Hung,
    Leave,
    NodeStats,
    RanksEnded,
    StacksTaken,
    TakeStacks,
)
from midwatch.protocol.base import MAX_FRAME
from midwatch.protocol.commands import ClientHello, ClientWelcome, Command, CommandReply, Refused
from midwatch.protocol.preferences import (
    PreferenceBegin,
    PreferenceLeave,
    PreferenceMade,
    PreferenceNext,
    PreferenceQuery,
    PreferenceState,
    PreferenceUndo,
)
from midwatch.protocol.probe import ProbeAsk, ProbeBegan, ProbeEnd, ProbeStop, ProbeToken
from midwatch.protocol.queries import (
    ChartQuery,
    ChartReply,
    JournalQuery,
    JournalReply,
    LogQuery,
    LogReply,
    MetricsQuery,
    MetricsReply,
    SampleQuery,
    SampleReply,
    TextQuery,
    TextReply,
    UndoQuery,
    UndoReply,
)
from midwatch.protocol.ranks import Ack, CommitRefused, Committed, Hold, Numbered, Order, RankHello, RankWelcome
from midwatch.protocol.snapshot import Snapshot
from shards.common.decoding import UNDECODABLE, brief

Message = (
    RankHello
    | Numbered
    | RankWelcome
    | Ack
    | Order
    | Committed
    | CommitRefused
    | Hold
    | AgentHello
    | AgentWelcome
    | Gather
    | Gathered
    | Hung
    | TakeStacks
    | StacksTaken
    | EndRanks
    | Leave
    | RanksEnded
    | NodeStats
    | ClientHello
    | ClientWelcome
    | Command
    | CommandReply
    | ChartQuery
    | ChartReply
    | MetricsQuery
    | MetricsReply
    | JournalQuery
    | JournalReply
    | LogQuery
    | LogReply
    | UndoQuery
    | UndoReply
    | TextQuery
    | TextReply
    | ProbeAsk
    | ProbeStop
    | ProbeBegan
    | ProbeToken
    | ProbeEnd
    | SampleQuery
    | SampleReply
    | PreferenceBegin
    | PreferenceNext
    | PreferenceMade
    | PreferenceUndo
    | PreferenceLeave
    | PreferenceQuery
    | PreferenceState
    | Refused
    | Snapshot
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class ProtocolError(Exception):
    """A frame is no message of this protocol."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes | str) -> Message:
    """Raises ProtocolError for anything that is not a message of this version."""
    if isinstance(frame, str):
        raise ProtocolError("a text frame where a binary one was expected")
    try:
        return _decoder.decode(frame)
    except UNDECODABLE as error:
        raise ProtocolError(brief(error)) from None


LENGTH_BYTES = 4
"""Of the length that stands before each message in a pipe, big-endian."""


def framed(message: Message) -> bytes:
    """For a pipe, which unlike WebSocket keeps no message apart from the next."""
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def frame_length(head: bytes) -> int:
    """Bytes of the message that follows. Raises ProtocolError where they are too many."""
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes, {MAX_FRAME} are allowed")
    return length
