"""Jinja for chat templates, as `transformers` sets it up, in a sandbox: a template is somebody else's program.

The one difference is the day: it is always the same, because a document's ids must not depend on when it was encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from shards.common.decoding import brief
from shards.common.errors import SpecError
from shards.tokenization.templates import Template

LONGEST_TEMPLATE = 1 << 20
"""Characters; the longest in use have some ten thousand."""
TODAY = datetime(2024, 7, 26)
"""The date that Llama 3's own templates take where they are told none."""


class ChatError(ValueError):
    """A conversation that the template cannot tell; the message is the reason, without the place."""


class Renderer:
    """A template that is ready to be rendered. names: `bos_token` and so on."""

    def __init__(self, template: Template, names: Mapping[str, str]) -> None:
        """Raises SpecError for what is not Jinja."""
        import jinja2

        from shards.tokenization.jinja_sandbox import bounded

        self._bounded = bounded
        self.template = template
        self._names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "") | dict(names)
        where = f"tokenizer: template: {template.where}"
        if len(template.jinja) > LONGEST_TEMPLATE:
            raise SpecError(f"{where}: is longer than {LONGEST_TEMPLATE:,} characters (name another template)")
        try:
            self._compiled = _environment().from_string(template.jinja)
        except jinja2.TemplateSyntaxError as error:
            way = "correct it, or name another template"
            raise SpecError(
                f"tokenizer: template: {template.where}:{error.lineno}: is not Jinja: {error.message} ({way})"
            ) from None
        except (RecursionError, MemoryError):
            raise SpecError(f"{where}: is nested too deeply (name another template)") from None
        except Exception as error:  # of Python's compiler, which Jinja gives its own code, or of a filter that is not there
            raise SpecError(f"{where}: cannot be used: {brief(error)} (name another template)") from None

    def __call__(self, messages: Sequence[Mapping[str, str]], prompt: bool, tags: tuple[str, str] = ("", "")) -> str:
        """The conversation's text. prompt: open a turn for the assistant; tags: put around `{% generation %}` blocks.

        Raises ChatError.
        """
        given: dict[str, Any] = {"tools": None, "documents": None, "generation_begins": tags[0], "generation_ends": tags[1]}
        given |= self._names
        try:
            copies = [dict(message) for message in messages]
            characters = sum(len(part) for message in copies for part in message.values())
            text: str = self._bounded(
                lambda: self._compiled.render(messages=copies, add_generation_prompt=prompt, **given), characters
            )
        except Exception as error:  # a template can fail in any way that a program can
            reason = " ".join(brief(error).split()) or type(error).__name__
            raise ChatError(f"the template refuses it: {reason}") from None
        return text


@cache
def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    from shards.tokenization.jinja_sandbox import BoundedEnvironment

    class Generation(Extension):
        """`{% generation %}`: what the assistant says, marked by whoever wrote the template."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begins, ends = (nodes.Output([nodes.Name(f"generation_{what}", "load")]) for what in ("begins", "ends"))
            return [begins.set_lineno(line), *body, ends.set_lineno(line)]

    def checked(names: dict[str, Any]) -> dict[str, Any]:
        if any(name.startswith("_") for name in names):
            raise jinja2.exceptions.SecurityError("a namespace's names do not begin with _")
        return names

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with `_`, which lead to what the sandbox hides."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(checked(dict(*args, **kwargs)))

        def __setitem__(self, name: str, value: Any) -> None:
            checked({name: value})
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.add_filter("tojson", tojson)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = Namespace
    environment.globals["strftime_now"] = TODAY.strftime
    return environment
