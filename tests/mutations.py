"""Mutations of bytes, JSON, MessagePack and TOML for the fuzz engine.

Structure is kept as trees: maps are `Pairs`, so that a key can stand twice, and `Raw` is a token written as it is.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

import msgspec

DEEP = 100_000
LONG = 100_000


class Pairs(list[tuple[Any, Any]]):
    """A map, in order."""


class Raw(bytes):
    """A token as it is to be written."""


WORDS = (
    "", "\0", "a\nb", "x" * LONG, "../../etc/passwd", "/", ".", "é\u202e日本", "1", "-1", "nan", "\x1b]52;c;AAAA\x07", "[bold]",
    "true", "null", "%s{0}{x!r}", "hf:", "::", "a:b", "__class__", "0" * 5000, "9" * 5000,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 255, 65_536, 65_537, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63),
    0.0, -0.0, 0.5, 1.5, -1.5, 1e308, 5e-324, 1e23,
)  # fmt: skip
JSON_RAW = tuple(
    Raw(token)
    for token in (
        b"9" * 5000, b"-" + b"9" * 4301, b"1" + b"0" * 23, b"1e400", b"NaN", b"Infinity", b"-Infinity", b'"\\ud800"',
        b'"\\udc00\\ud800"',         b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"[" * 500 + b"]" * 500,
        b'"\xff\xfe"',
        b"18446744073709551616",         b"tru", b"01", b'"\\u0000"', b'{"a":1,"a":2}', b"", b"'a'", b"/* */ 1",
    )
)  # fmt: skip
MSGPACK_RAW = tuple(
    Raw(token)
    for token in (
        b"\x91" * DEEP + b"\xc0", b"\x81\xa1a" * DEEP + b"\xc0", b"\x91" * 500 + b"\xc0", b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80",
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc1",
        b"\xd4\x05\x00",
        b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", b"\xc4\x03\x00\xff\x01", b"",
    )
)  # fmt: skip
TOML_VALUES = (
    *(repr(number) for number in NUMBERS), "9" * 5000, "1" + "0" * 23, "nan", "inf", "-inf", "1e400", "true", "[]", "{}", '""',
    '"x"', "1979-05-27T07:32:00Z", "07:32:00", "[" * 200 + "]" * 200, "[" * DEEP + "]" * DEEP, '"""a\nb"""', '"\\u0000"',
    f'"{"x" * LONG}"', '"\\ud800"', "[1, 'a', 2.5]", "{ a = { b = 1 } }", '["x", "x"]', '"../../../x"', '"1:9999999999"',
    f'"1:{"9" * 5000}"', '["a[0-99999999999]"]', f'["a[0-{"9" * 5000}]"]', '"\\u0661"',
)  # fmt: skip


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Some bits, runs and ends changed."""
    data = bytearray(raw or b"\0")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data))
        match rng.randrange(9):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.choice((1, 4, 50, 1000))]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 4:
                tokens = (b"\xff", b"\0", b"{", b"}", b"[", b'"', b"\n", b"\\", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"-", b"9" * 30)
                data[at:at] = rng.choice(tokens)
            case 5:
                data = data[:at]
            case 6:
                start = rng.randrange(len(data))
                data[at:at] = data[start : start + rng.choice((1, 8, 100, 1000))]
            case 7:
                data[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, struct.pack("<I", 2**31), struct.pack("<i", -2)))
            case _:
                whole = bytes(data)
                ways = (b"\xef\xbb\xbf" + whole, whole.decode("latin-1").encode("utf-16"), whole + whole, b"")
                data = bytearray(rng.choice((*ways, whole + b"\0" * 100)))
        if not data:
            return b""
    return bytes(data)


def mutate_tree(node: Any, rng: random.Random, raws: tuple[Raw, ...]) -> Any:
    """A copy with one place changed; what is not on the way there is shared."""
    if isinstance(node, list) and node and rng.random() < 0.85:
        copy = type(node)(node)
        at = rng.randrange(len(copy))
        child = copy[at][1] if isinstance(copy, Pairs) else copy[at]
        if rng.random() < (0.8 if isinstance(child, list) else 0.55):
            changed = mutate_tree(child, rng, raws)
            copy[at] = (copy[at][0], changed) if isinstance(copy, Pairs) else changed
            return copy
        match rng.randrange(5):
            case 0:
                del copy[at]
            case 1:
                copy.insert(rng.randrange(len(copy) + 1), copy[at])
            case 2:
                other = rng.randrange(len(copy))
                copy[at], copy[other] = copy[other], copy[at]
            case 3 if isinstance(copy, Pairs):
                key = rng.choice((*WORDS, f"{copy[at][0]}_", str(copy[at][0]).upper(), copy[rng.randrange(len(copy))][0]))
                copy[at] = (key, copy[at][1])
            case 3:
                copy[at : at + 1] = [copy[at]] * rng.choice((2, 3, 100))
            case _ if isinstance(copy, Pairs):
                copy.append((rng.choice(WORDS), _other(child, rng, raws)))
            case _:
                copy.append(_other(child, rng, raws))
        return copy
    return _other(node, rng, raws)


def _other(node: Any, rng: random.Random, raws: tuple[Raw, ...]) -> Any:
    """Something else in a value's place: like it, of another type, or extreme."""
    ways: list[Any] = [
        rng.choice(NUMBERS),
        rng.choice(WORDS),
        rng.choice(raws),
        None,
        True,
        [],
        Pairs(),
        [node],
        Pairs([("a", node)]),
    ]
    if isinstance(node, int | float) and not isinstance(node, bool):
        ways += [node + 1, node - 1, -node, node * 2, str(node)] * 2
        ways += [rng.choice(NUMBERS)] * 6
    if isinstance(node, str):
        ways += [node + "x", node[:-1], node.upper(), node * 2, node + "\0", 0] + [rng.choice(WORDS)] * 4
    if isinstance(node, list):
        ways += [type(node)(), type(node)(node[:1]), [pair[-1] for pair in node] if isinstance(node, Pairs) else node * 2, "x"]
    return rng.choice(ways)


def json_tree(raw: bytes) -> Any:
    return json.loads(raw, object_pairs_hook=Pairs)


def emit_json(node: Any) -> bytes:
    if isinstance(node, Raw):
        return bytes(node)
    if isinstance(node, Pairs):
        return b"{" + b",".join(emit_json(str(key)) + b":" + emit_json(value) for key, value in node) + b"}"
    if isinstance(node, list):
        return b"[" + b",".join(map(emit_json, node)) + b"]"
    return json.dumps(node).encode()


def msgpack_tree(raw: bytes) -> Any:
    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return Pairs((key, plain(value)) for key, value in node.items())
        return [plain(each) for each in node] if isinstance(node, list) else node

    return plain(msgspec.msgpack.decode(raw))


def emit_msgpack(node: Any) -> bytes:
    if isinstance(node, Raw):
        return bytes(node)
    if isinstance(node, Pairs):
        return b"\xdf" + struct.pack(">I", len(node)) + b"".join(emit_msgpack(key) + emit_msgpack(value) for key, value in node)
    if isinstance(node, list):
        return b"\xdd" + struct.pack(">I", len(node)) + b"".join(map(emit_msgpack, node))
    try:
        return msgspec.msgpack.encode(node)
    except OverflowError:
        return msgspec.msgpack.encode(float(node))


def _structured(tree: Callable[[bytes], Any], emit: Callable[[Any], bytes], raws: tuple[Raw, ...]) -> Callable[..., bytes]:
    known: dict[bytes, Any] = {}

    def mutate(raw: bytes, rng: random.Random) -> bytes:
        if raw not in known:
            known[raw] = tree(raw)
        node = known[raw]
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            node = mutate_tree(node, rng, raws)
        return emit(node)

    return mutate


def mutate_json_lines(raw: bytes, rng: random.Random) -> bytes:
    """Of JSON lines: one line's structure, or the lines' order."""
    lines = raw.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    match rng.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case _:
            try:
                lines[at] = CODECS["json"](lines[at], rng)
            except ValueError:
                lines[at] = mutate_bytes(lines[at], rng)
    return b"\n".join(lines)


_TOML_LINE = re.compile(r"^(\s*)([A-Za-z0-9_.\"-]+)(\s*=\s*)(.*)$")
_INLINE = re.compile(r"(?<=[=,\[ ])-?\d[\d_.e+-]*|\"[^\"]*\"")


def mutate_toml(raw: bytes, rng: random.Random) -> bytes:
    """Lines dropped, doubled and moved, keys renamed, values replaced."""
    lines = raw.decode().split("\n")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        while not lines[at].strip() or lines[at].lstrip().startswith("#"):
            at = rng.randrange(len(lines))
        found = _TOML_LINE.match(lines[at])
        match rng.randrange(10):
            case 0:
                del lines[at]
            case 1:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case 2 if found:
                lines[at] = rng.choice((f"{found[2]}x", f'"{found[2]}\\u0000"', f"{found[2]}.a", '""')) + found[3] + found[4]
            case 2:
                lines[at] = rng.choice(
                    (f"[{lines[at]}]", lines[at].strip("[]").join("[]"), "[" + "a." * 2000 + "a]", "[]", "[[x]]")
                )
            case 3 if found and _INLINE.search(lines[at]):
                place = rng.choice(list(_INLINE.finditer(lines[at])))
                lines[at] = lines[at][: place.start()] + rng.choice(TOML_VALUES) + lines[at][place.end() :]
            case _ if found:
                lines[at] = f"{found[1]}{found[2]}{found[3]}{rng.choice(TOML_VALUES)}"
            case _:
                lines.insert(at + 1, f"{rng.choice(('seed', 'name', 'x', 'nodes', 'repeat'))} = {rng.choice(TOML_VALUES)}")
        if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
            break
    return "\n".join(lines).encode(errors="surrogatepass")


CODECS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": mutate_bytes,
    "json": _structured(json_tree, emit_json, JSON_RAW),
    "json lines": mutate_json_lines,
    "msgpack": _structured(msgpack_tree, emit_msgpack, MSGPACK_RAW),
    "toml": mutate_toml,
}
