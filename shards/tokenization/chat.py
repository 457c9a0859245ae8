"""A conversation as token ids and a loss mask: 1 for what the assistant says and for the token that ends its turn.

No message can forge a turn. Special tokens are recognised in the template's own text only, never in a message. Where a template's
marker is plain text to the tokenizer of an existing model (Llama 2's `[INST]`), a document that contains it is refused.

Text between two special tokens is encoded in one piece, messages and template text together, as `transformers` does; but it is
cut where the assistant begins, so that an answer follows exactly the ids of the prompt that it is generated from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from shards.tokenization.jinja import ChatError, Renderer
from shards.tokenization.template_spans import Layout, Layouts
from shards.tokenization.templates import ROLES, Template

Message = tuple[str, str] | Mapping[str, str]

_OWN = r"<\|[^|<>\s]+\|>"
_TEXT = r"\[/?[A-Z]+\]|<</?[A-Z]+>>|<(?:start|end)_of_turn>"
NOT_AS_ASKED = "earlier answers not learned: the template writes other text before them, or in them, than where they are asked for"
_PROBES = (("user", "assistant", "user", "assistant"), ("system", "user", "assistant"), ("user", "assistant"), ("user",))


class Encoder(Protocol):
    """The part of a tokenizer that a chat needs."""

    special: dict[str, int]  # ids that no text encodes to, by what a template calls them
    swallows: dict[str, tuple[bool, bool]]  # of these, those that absorb the blanks on their left or right

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def follow(self, text: str, after_special: bool) -> list[int]:
        """The ids of a text that does not begin a document."""


class Markers:
    """Text of a template that may be a special token."""

    def __init__(self, template: Template, names: Mapping[str, str], known: Collection[str]) -> None:
        """names: `bos_token` and so on; known: special tokens that the model has already. Raises SpecError."""
        self.render = Renderer(template, names)
        self._known = [*known, *names.values()]
        text = "".join(self._probe())
        found = dict.fromkeys(re.findall(self._pattern(f"{_OWN}|{_TEXT}"), text))
        fresh = template.name != "own"  # else a marker without a token was plain text to the model
        self.special = [name for name in found if name in known or (fresh and re.fullmatch(_OWN, name))]
        """Those that are a token, in the order in which they come up."""
        self.plain = [name for name in found if name not in self.special and name not in names.values()]
        """Those that are plain text to a model that does not know them."""

    def _pattern(self, more: str) -> str:
        return "|".join([*(re.escape(name) for name in sorted(self._known, key=len, reverse=True)), more])

    def _probe(self) -> Iterable[str]:
        for roles in _PROBES:
            try:
                yield self.render([{"role": role, "content": "x"} for role in roles], roles[-1] != "assistant")
            except ChatError:
                continue


def trained(template: Template, names: Mapping[str, str], reserved: Sequence[str]) -> list[str]:
    """The pieces of a template that a tokenizer to be trained has as control symbols beside the reserved ones. Raises SpecError for
    a template that cannot be used."""
    markers = Markers(template, names, reserved)
    found = [*markers.special, *markers.plain]
    pattern = re.compile("|".join(re.escape(name) for name in sorted({*found, *names.values(), *reserved}, key=len, reverse=True)))
    Layouts(markers.render, pattern).check()
    return [name for name in found if name not in reserved]


class Chat:
    """A template together with a tokenizer."""

    def __init__(self, encoder: Encoder, markers: Markers) -> None:
        """Raises SpecError for a template that cannot be used with it."""
        self._encoder = encoder
        self._template = markers.render.template
        self._special = re.compile("|".join(re.escape(name) for name in sorted(encoder.special, key=len, reverse=True)))
        self._layouts = Layouts(markers.render, self._special)
        if not self._template.is_named:
            self._layouts.check()
        told = [name for name in markers.special if encoder.special[name] in encoder.encode(name)]
        self._forgeable = [*markers.plain, *told]
        self.ends = frozenset(self._ends())

    def _ends(self) -> Iterable[int]:
        for roles in _PROBES:
            try:
                layout = self._layouts.of(roles)
            except ChatError:
                continue
            said = -1  # what stands before the content, such as the mark of a thought, ends no turn
            for piece in layout:
                said = piece.message if piece.message >= 0 else said
                if piece.turn >= 0 and piece.turn == said and piece.message < 0:
                    yield from (self._encoder.special[name] for name in self._special.findall(piece.text))

    def refusal(self, messages: Sequence[Message]) -> str:
        """Why a conversation cannot be trained on; empty where it can."""
        try:
            roles, contents = _told(messages)
            if not self._template.is_named:
                self._layouts.verify(roles, contents)
            self._layouts.of(roles)
        except ChatError as error:
            return str(error)
        forged = next((name for name in self._forgeable if any(name in content for content in contents)), None)
        return f"says {forged}, which would start a turn" if forged is not None else ""

    def notes(self, messages: Sequence[Message]) -> list[str]:
        """Notes on a conversation that is trained on, to be counted. Raises ChatError."""
        layout = self._layouts.of(_told(messages)[0])
        return [] if all(piece.as_asked for piece in layout if piece.turn >= 0) else [NOT_AS_ASKED]

    def encode(
        self, messages: Sequence[Message], masked: Collection[int] = (), *, ended: bool = True
    ) -> tuple[list[int], list[int]]:
        """Ids and mask. masked: numbers of the assistant's messages that are not learned; ended: whether the last message has
        what the template writes behind it. Raises ChatError."""
        roles, contents = _told(messages)
        layout = self._layouts.of(roles)
        if not ended:
            layout = layout[: 1 + max(at for at, piece in enumerate(layout) if piece.message >= 0)]
        left_out = {*masked, *(piece.turn for piece in layout if not piece.as_asked)}
        ids: list[int] = []
        mask: list[int] = []
        for turn, name, text, after in self._runs(layout, contents):
            if name:
                found = [self._encoder.special[name]]
            else:
                found = self._encoder.encode(text) if not ids else self._encoder.follow(text, after)
            ids += found
            mask += [int(turn >= 0 and turn not in left_out)] * len(found)
        return ids, mask

    def _runs(self, layout: Layout, contents: Sequence[str]) -> list[tuple[int, str, str, bool]]:
        """(the turn, a special token's name or "", else text, whether that follows a special token).

        Cut where an assistant's turn begins and ends, learned or not: it has the same ids wherever it stands.
        """
        runs: list[tuple[int, str, str, bool]] = []

        def add(text: str, turn: int) -> None:
            last = runs[-1] if runs else None
            if last is not None and self._encoder.swallows.get(last[1], (False, False))[1]:
                text = text.lstrip()
            if last is not None and not last[1] and last[0] == turn:
                runs[-1] = (turn, "", last[2] + text, last[3])
            elif text:
                runs.append((turn, "", text, last is not None and last[1] != ""))

        for piece in layout:
            text = piece.said(contents)
            if piece.message >= 0:
                add(text, piece.turn)
                continue
            at = 0
            for found in self._special.finditer(text):
                add(text[at : found.start()], piece.turn)
                if runs and not runs[-1][1] and self._encoder.swallows.get(found[0], (False, False))[0]:
                    runs[-1] = (*runs[-1][:2], runs[-1][2].rstrip(), runs[-1][3])
                runs.append((piece.turn, found[0], "", False))
                at = found.end()
            add(text[at:], piece.turn)
        return runs


def _told(messages: Sequence[Message]) -> tuple[tuple[str, ...], list[str]]:
    """Roles and contents."""
    told = [message if isinstance(message, tuple) else (message["role"], message["content"]) for message in messages]
    for role, _ in told:
        if role not in ROLES:
            raise ChatError(f'role "{role}" is none of {", ".join(ROLES)}')
    return tuple(role for role, _ in told), [content for _, content in told]
