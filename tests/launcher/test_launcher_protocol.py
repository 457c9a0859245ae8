"""Messages arrive as they were sent; what is no message is a ProtocolError and never anything else."""

from __future__ import annotations

import contextlib
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midwatch import protocol as p

MESSAGES: tuple[type[Any], ...] = typing.get_args(p.Message)
BODIES: tuple[type[Any], ...] = typing.get_args(p.RankBody)
STRICT = [m for m in MESSAGES if m.__struct_config__.forbid_unknown_fields]
LENIENT = [m for m in (*MESSAGES, *BODIES) if not m.__struct_config__.forbid_unknown_fields]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts
BASIC: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: texts,
}


def message_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """A struct with every field drawn from its type."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field: strategy_of(hints[field]) for field in kind.__struct_fields__})


def strategy_of(hint: Any) -> st.SearchStrategy[Any]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return message_of(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(strategy_of(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(strategy_of, arguments))
    if origin is dict:
        keys = texts if arguments[0] is str else strategy_of(arguments[0])
        return st.dictionaries(keys, scalars if arguments[1] is Any else strategy_of(arguments[1]), max_size=2)
    if origin is typing.Union or str(origin) == "<class 'types.UnionType'>":
        return st.one_of(*map(strategy_of, arguments))
    return BASIC[hint] if hint in BASIC else st.from_type(hint)


def sample(kind: type[Any]) -> Any:
    """Some message of a kind, always the same."""
    if kind is p.Numbered:
        return p.Numbered(number=1, body=p.Dropped(count=1))
    return msgspec.convert(minimal(kind), kind)


def minimal(kind: type[Any]) -> dict[str, Any]:
    config = kind.__struct_config__
    raw: dict[str, Any] = {config.tag_field: config.tag} if config.tag_field else {}
    for field in msgspec.structs.fields(kind):
        if field.required:
            raw[field.encode_name] = value_of(field.type)
    return raw


def value_of(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return minimal(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return arguments[0]
    if arguments and type(None) in arguments:
        return None
    return {int: 1, float: 1.0, str: "x", bool: True, bytes: b"x"}.get(hint, () if origin is tuple else {})


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda k: k.__name__)
def test_every_message_arrives_as_it_was_sent(kind: type[Any]) -> None:
    @settings(deadline=None, max_examples=5)
    @given(message_of(kind))
    def holds(message: Any) -> None:
        assert p.decode(p.encode(message)) == message

    holds()


@pytest.mark.parametrize("kind", STRICT, ids=lambda k: k.__name__)
def test_unknown_fields_are_refused_in_what_commands(kind: type[Any]) -> None:
    raw = msgspec.to_builtins(sample(kind), builtin_types=(bytes,)) | {"later": 1}
    with pytest.raises(p.ProtocolError, match="later"):
        p.decode(msgspec.msgpack.encode(raw))


def test_commands_and_hellos_are_among_the_strict() -> None:
    assert {p.Command, p.ClientHello, p.RankHello, p.AgentHello, p.Order, p.Gather} <= set(STRICT)
    assert {p.Metrics, p.Phase, p.NodeStats, p.Snapshot, p.Numbered} <= set(LENIENT)


@pytest.mark.parametrize("kind", LENIENT, ids=lambda k: k.__name__)
def test_unknown_fields_are_passed_over_in_telemetry(kind: type[Any]) -> None:
    message = sample(kind)
    raw = msgspec.to_builtins(message, builtin_types=(bytes,)) | {"later": {"deep": [1]}}
    if kind in BODIES:
        message, raw = p.Numbered(number=7, body=message), {"type": "Numbered", "number": 7, "body": raw, "more": 1}
    assert p.decode(msgspec.msgpack.encode(raw)) == message


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error(frame: bytes) -> None:
    with contextlib.suppress(p.ProtocolError):
        p.decode(frame)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from([p.encode(sample(kind)) for kind in MESSAGES]), st.data())
def test_a_damaged_message_is_a_protocol_error_or_another_message(frame: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(frame) - 1))
    damaged = frame[:place] + bytes([data.draw(st.integers(0, 255))]) + frame[place + 1 :]
    with contextlib.suppress(p.ProtocolError):
        p.decode(data.draw(st.sampled_from([damaged, frame[:place]])))


@settings(deadline=None, max_examples=200)
@given(st.recursive(scalars | st.binary(max_size=4), lambda s: st.lists(s, max_size=3) | st.dictionaries(texts, s, max_size=3)))
def test_whatever_else_msgpack_can_say_is_a_protocol_error(value: Any) -> None:
    with contextlib.suppress(p.ProtocolError):
        p.decode(msgspec.msgpack.encode(value))


@pytest.mark.parametrize("frame", ["text", b"\x91" * 100_000, b"\x81\xa4type\xa1\xff", b"\x81\xa4type\xa7Unknown"])
def test_text_depth_bad_letters_and_unknown_tags_are_protocol_errors(frame: bytes | str) -> None:
    with pytest.raises(p.ProtocolError):
        p.decode(frame)


def test_no_name_of_a_message_is_used_twice() -> None:
    tags = [kind.__struct_config__.tag for kind in (*MESSAGES, *BODIES)]
    assert len(tags) == len(set(tags))
