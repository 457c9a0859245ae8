"""Where a template puts what the messages of a conversation say, and which of it the assistant is to learn.

It is found by rendering marks in the contents' places. Where they come out depends on the roles alone, so it is kept by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from shards.common.errors import SpecError
from shards.tokenization.jinja import ChatError, Renderer

KEPT = 4096  # sequences of roles

# Blanks, so that a template's `trim` takes them away: that is how it is seen.
_LEFT, _RIGHT = "\u2003\u2004", "\u2004\u2003"
_BEGINS, _ENDS = "\ue002", "\ue003"
_SLOT = re.compile(f"(?P<left>{_LEFT})?\ue000(?P<message>[0-9]+)\ue001(?P<right>{_RIGHT})?")

_PROBES = (("user", "assistant"), ("user", "assistant", "user", "assistant"), ("system", "user", "assistant"))
_SAYINGS = ("What is <b>2 & 2</b>?", '"Four" {{ 4 }},\n\tI\'d Say: naïve 日本 \\n', "Oh,\nIS  it?", "Yes.")


@dataclass(frozen=True, slots=True)
class TemplateSpan:
    """A part of a conversation: the template's own text, or what a message says, trimmed on the sides that the template trims."""

    text: str
    message: int  # the message's number; -1: the template's own text
    trims: tuple[bool, bool]
    turn: int  # number of the assistant's message that it belongs to, which the assistant has to write itself; -1: none
    as_asked: bool  # of a turn: it is rendered here as it is where it is the newest, so that it can be learned

    def said(self, contents: Sequence[str]) -> str:
        """Its text, given what the messages say."""
        if self.message < 0:
            return self.text
        content = contents[self.message]
        content = content.lstrip() if self.trims[0] else content
        return content.rstrip() if self.trims[1] else content


Layout = tuple[TemplateSpan, ...]


class Layouts:
    """The layouts of a template. special: finds the names of tokens that text cannot spell; the first of them behind what an
    assistant says ends its turn, and is learned."""

    def __init__(self, render: Renderer, special: re.Pattern[str]) -> None:
        self._render = render
        self._special = special
        self._tagged = re.search(r"\{%[-+]?\s*generation\b", render.template.jinja) is not None
        self._opened: Callable[[tuple[str, ...]], str] = lru_cache(KEPT)(self._open)
        self.of: Callable[[tuple[str, ...]], Layout] = lru_cache(KEPT)(self._of)

    def check(self) -> None:
        """Raise SpecError for a template that nothing could be learned from, or that does not give back what it is given."""
        where, way = f"tokenizer: template: {self._render.template.where}", "correct it, or name another template"
        for roles in _PROBES:
            try:
                if roles is _PROBES[0] and _mark(1) not in self._marked(roles, False):
                    raise SpecError(f"{where}: has no assistant turn: it leaves out what the assistant says ({way})")
                self.of(roles[:-1])
                self.of(roles)
                self.verify(roles, _SAYINGS[: len(roles)])
            except ChatError as error:
                # That it refuses a system's message, or a second turn, is its right: such conversations are left out.
                if roles is _PROBES[0] or not str(error).startswith("the template refuses it"):
                    said = f"{' and '.join(roles)}: {error}" if roles is not _PROBES[0] else error
                    raise SpecError(f"{where}: {said} ({way})") from None

    def verify(self, roles: tuple[str, ...], contents: Sequence[str]) -> None:
        """Raise ChatError where the template, given the real contents, changes them or its own text."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        if roles[-1:] == ("assistant",) and self._render(messages, False) != self.text(roles, contents):
            raise ChatError("the template changes what a message says")

    def text(self, roles: tuple[str, ...], contents: Sequence[str]) -> str:
        """The whole conversation."""
        return "".join(piece.said(contents) for piece in self.of(roles))

    def _marked(self, roles: Sequence[str], prompt: bool) -> str:
        messages = [{"role": role, "content": _LEFT + _mark(number) + _RIGHT} for number, role in enumerate(roles)]
        return self._render(messages, prompt, (_BEGINS, _ENDS))

    def _open(self, roles: tuple[str, ...]) -> str:
        """A prompt: up to where an assistant's answer begins."""
        text, closed = self._marked(roles, True), self._marked(roles, False)
        if text != closed:
            return text
        # A template without a generation prompt: what it writes before an answer, where that is more than a space, is one.
        try:
            answered = _plain(self._marked((*roles, "assistant"), False))
        except ChatError:
            return text
        slot = next((found for found in _SLOT.finditer(answered) if int(found["message"]) == len(roles)), None)
        plain = _plain(text)
        if slot is None or not answered.startswith(plain) or not answered[len(plain) : slot.start()].strip():
            return text
        return answered[: slot.start()]

    def _of(self, roles: tuple[str, ...]) -> Layout:
        marked = self._marked(roles, False) if roles[-1:] == ("assistant",) else self._opened(roles)
        text = _plain(marked)
        slots = {int(slot["message"]): slot for slot in _SLOT.finditer(text)}
        self._complete([int(slot["message"]) for slot in _SLOT.finditer(text)], roles)
        spans = self._tags(marked, slots, roles) if self._tagged else {}
        for number in _assistants(roles):
            spans[number] = self._turn(text, number, slots, roles, spans.get(number))
        as_asked = {number: self._as_asked(text[:stop], number, roles) for number, (_, stop) in spans.items()}
        cuts = {0, len(text), *(at for span in spans.values() for at in span)}
        cuts |= {at for slot in slots.values() for at in slot.span()}
        starts = {slot.start(): slot for slot in slots.values()}
        pieces = []
        for start, stop in pairwise(sorted(cuts)):
            turn = next((number for number, (first, last) in spans.items() if first <= start < last), -1)
            slot = starts.get(start)
            if slot is None:
                pieces.append(TemplateSpan(text[start:stop], -1, (False, False), turn, as_asked.get(turn, False)))
            else:
                trims = slot["left"] is None, slot["right"] is None
                pieces.append(TemplateSpan("", int(slot["message"]), trims, turn, as_asked.get(turn, False)))
        return tuple(pieces)

    def _as_asked(self, text: str, number: int, roles: tuple[str, ...]) -> bool:
        """Whether the conversation up to the end of a turn is what it is without what follows.

        Templates that think strip the thoughts from earlier turns, and some move the system's text to the newest question: there an
        earlier answer follows text that it is never asked for with.
        """
        if number == len(roles) - 1:
            return True
        try:
            return _plain(self._marked(roles[: number + 1], False)).startswith(text)
        except ChatError:
            return True

    def _complete(self, found: list[int], roles: Sequence[str]) -> None:
        missing = [roles[number] for number in range(len(roles)) if number not in found]
        if missing:
            raise ChatError(f"the template leaves out what the {missing[0]} says")
        if len(found) > len(roles):
            raise ChatError("the template repeats what a message says")
        if found != sorted(found):
            raise ChatError("the template changes the order of messages")

    def _turn(
        self, text: str, number: int, slots: dict[int, re.Match[str]], roles: tuple[str, ...], tagged: tuple[int, int] | None
    ) -> tuple[int, int]:
        """What the assistant has to write itself: from the end of the prompt, over the content, to the end of its turn.

        Where the template has tags they say so, if they fit the prompt. Raises ChatError where an answer would be learned behind
        text that it is never asked for with.
        """
        start, stop = tagged or (slots[number].start(), self._end(text, number, slots))
        try:
            prompt = _plain(self._opened(roles[:number])) if number else ""
        except ChatError:
            prompt = ""
        if not prompt:
            return start, stop
        newest = number == len(roles) - 1
        if not text.startswith(prompt):
            if newest:
                raise ChatError(f"asks for an answer behind {_end_of(prompt, text)}, but writes other text before one")
            return start, stop
        if tagged is None:
            return len(prompt), stop
        if newest and text[len(prompt) : start].strip():
            between = text[len(prompt) : start]
            raise ChatError(f"writes {between!r} before an answer, outside of {{% generation %}} and of the prompt")
        return start, stop

    def _end(self, text: str, number: int, slots: dict[int, re.Match[str]]) -> int:
        after = slots[number + 1].start() if number + 1 in slots else len(text)
        ending = self._special.search(text, slots[number].end(), after)
        if ending is None:
            raise ChatError("no token of its own ends what the assistant says (write eos_token after it)")
        return ending.end()

    def _tags(self, marked: str, slots: dict[int, re.Match[str]], roles: tuple[str, ...]) -> dict[int, tuple[int, int]]:
        """What `{% generation %}` says is to be learned, by the assistant's message that it holds."""
        spans, start = [], 0
        for before, mark in enumerate(re.finditer(f"[{_BEGINS}{_ENDS}]", marked)):
            if mark[0] == _BEGINS:
                start = mark.start() - before
            else:
                spans.append((start, mark.start() - before))
        found = {}
        for number in _assistants(roles):
            end = self._end(_plain(marked), number, slots)
            held = next(((first, last) for first, last in spans if first <= slots[number].start() and end <= last), None)
            if held is None:
                reason = "{% generation %} does not hold all that the assistant says and the token that ends it"
                raise ChatError(f"{reason}: it would never be learned")
            found[number] = held
        return found


def _end_of(prompt: str, text: str) -> str:
    """What the end of a prompt has that the text does not have there."""
    same = next((at for at, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), len(text))
    return repr(_SLOT.sub("...", prompt[max(0, same - 20) :]))


def _assistants(roles: Sequence[str]) -> list[int]:
    return [number for number, role in enumerate(roles) if role == "assistant"]


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _plain(marked: str) -> str:
    return marked.replace(_BEGINS, "").replace(_ENDS, "")
