"""Jinja for chat templates, as `transformers` sets it up, in a sandbox: a template is somebody else's program.

The one difference is the day: it is always the same, because a document's ids must not depend on when it was encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from shards.errors import SpecError
from shards.templates import Template

TODAY = datetime(2024, 7, 26)
"""The date that Llama 3's own templates take where they are told none."""


class ChatError(ValueError):
    """A conversation that the template cannot tell; the message is the reason, without the place."""


class Renderer:
    """A template that is ready to be rendered. names: `bos_token` and so on."""

    def __init__(self, template: Template, names: Mapping[str, str]) -> None:
        """Raises SpecError for what is not Jinja."""
        import jinja2

        self.template = template
        self._names = dict(names)
        try:
            self._compiled = _environment().from_string(template.jinja)
        except jinja2.TemplateSyntaxError as error:
            way = "correct it, or name another template"
            raise SpecError(
                f"tokenizer: template: {template.where}:{error.lineno}: is not Jinja: {error.message} ({way})"
            ) from None
        except RecursionError:
            raise SpecError(f"tokenizer: template: {template.where}: is nested too deeply (name another template)") from None

    def __call__(self, messages: Sequence[Mapping[str, str]], prompt: bool, tags: tuple[str, str] = ("", "")) -> str:
        """The conversation's text. prompt: open a turn for the assistant; tags: put around `{% generation %}` blocks.

        Raises ChatError.
        """
        given: dict[str, Any] = {"tools": None, "documents": None, "generation_begins": tags[0], "generation_ends": tags[1]}
        try:
            text: str = self._compiled.render(
                messages=[dict(message) for message in messages], add_generation_prompt=prompt, **given, **self._names
            )
        except Exception as error:  # a template can fail in any way that a program can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"the template refuses it: {reason}") from None
        return text


@cache
def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

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

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = Namespace
    environment.globals["strftime_now"] = TODAY.strftime
    return environment
