"""XML in bounded memory: yields the requested elements as they end, and keeps nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from shards.readers.base import LONGEST_RECORD

BLOCK = 1 << 18  # bytes handed to the parser at a time
LONGEST_TAG = 8 << 20  # bytes of one tag with its attributes


class XMLDamage(ValueError):
    """The XML ends early, is malformed, or asks for more memory than a record may."""


@dataclass(slots=True)
class Element:
    """One element: its attributes, and the texts of those inside it by their path, such as "revision/text"."""

    name: str
    attributes: dict[str, str]
    texts: dict[str, str] = field(default_factory=dict)
    attributes_of: dict[str, dict[str, str]] = field(default_factory=dict)
    too_long: bool = False  # more than LONGEST_RECORD characters: cut there


def elements(stream: io.BufferedReader[Any], wanted: tuple[str, ...]) -> Iterator[Element]:
    """The elements of these names, in order; of a repeated text the last one. Raises XMLDamage, and what reading does."""
    parser = expat.ParserCreate(encoding="UTF-8")
    parser.buffer_text = True
    parser.buffer_size = 1 << 16
    done: list[Element] = []
    handler = _Handler(wanted, done.append)
    parser.StartElementHandler, parser.EndElementHandler = handler.start, handler.end
    parser.CharacterDataHandler = handler.text
    parser.EntityDeclHandler = handler.entity
    fed = 0
    try:
        while block := stream.read1(BLOCK):
            fed += len(block)
            parser.Parse(block, False)
            yield from done
            done.clear()
            # A tag that does not end is kept by the parser, which has no limit of its own.
            if fed - parser.CurrentByteIndex > LONGEST_TAG:
                raise XMLDamage(f"a tag longer than {LONGEST_TAG >> 20} MiB")
        parser.Parse(b"", True)
        yield from done
    except (expat.ExpatError, XMLDamage) as error:
        yield from done
        raise XMLDamage(str(error)) from None


class _Handler:
    def __init__(self, wanted: tuple[str, ...], give: Callable[[Element], None]) -> None:
        self._wanted, self._give = frozenset(wanted), give
        self._path: list[str] = []  # within the wanted element
        self._now: Element | None = None
        self._parts: list[str] = []
        self._size = 0

    def entity(self, *told: Any) -> None:
        raise XMLDamage("declares entities of its own, which dumps do not")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        if self._now is None:
            if name in self._wanted:
                self._now, self._size = Element(name, attributes), 0
                self._parts = []
        else:
            self._path.append(name)
            if attributes:
                self._now.attributes_of["/".join(self._path)] = attributes
            self._parts = []

    def text(self, data: str) -> None:
        if self._now is not None:
            self._size += len(data)
            if self._size > LONGEST_RECORD:
                self._now.too_long = True
            else:
                self._parts.append(data)

    def end(self, name: str) -> None:
        if self._now is None:
            return
        if self._path:
            before = self._now.texts.get(path := "/".join(self._path))
            self._now.texts[path] = "".join(self._parts)
            if before is not None:
                self._size -= len(before)
            self._path.pop()
        else:
            self._now.texts[""] = "".join(self._parts)
            done, self._now = self._now, None
            self._give(done)
        self._parts = []
