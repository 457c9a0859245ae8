"""Chat templates: the named ones, a Jinja file of the user's, or the one that a tokenizer brought along has itself.

All are Jinja, with what `transformers` gives its templates: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shards.common.errors import ShardError, SpecError
from shards.spec import TEMPLATES, TokenizerSpec

ROLES = ("system", "user", "assistant")
FILE_NAME = "tokenizer.template"
"""Beside the tokenizer's model; not there for the template that is the default."""

_ROLES = "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
_ROLES += "{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}{%- endif -%}"

NAMED = {
    "midwatch": (
        "{%- for message in messages -%}" + _ROLES + "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
        "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    ),
    # Touvron et al. 2023, appendix A.3.3: the system's text is a part of the first user's.
    "llama2": (
        "{%- set found = namespace(system='', due='user') -%}{%- for message in messages -%}" + _ROLES + ""
        "{%- if message['role'] == 'system' -%}"
        "{%- if not loop.first -%}{{- raise_exception('Llama 2 has a system message only at the beginning') -}}{%- endif -%}"
        "{%- set found.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}"
        "{%- elif message['role'] != found.due -%}{{- raise_exception('in Llama 2 user and assistant take turns') -}}"
        "{%- elif message['role'] == 'user' -%}"
        "{{- bos_token + '[INST] ' + (found.system + message['content']).strip() + ' [/INST]' -}}"
        "{%- set found.system = '' -%}{%- set found.due = 'assistant' -%}"
        "{%- else -%}{{- ' ' + message['content'].strip() + ' ' + eos_token -}}{%- set found.due = 'user' -%}"
        "{%- endif -%}{%- endfor -%}"
    ),
    "llama3": (
        "{{- bos_token -}}{%- for message in messages -%}" + _ROLES + ""
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "chatml": (
        "{%- for message in messages -%}" + _ROLES + ""
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}" + _ROLES + ""
        "{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
    ),
}


@dataclass(frozen=True)
class Template:
    """One template. name: a named one's, "own" or "file"; where: what errors call it."""

    name: str
    jinja: str
    where: str

    @property
    def is_default(self) -> bool:
        return self == DEFAULT

    @property
    def is_named(self) -> bool:
        """Whether it is known to leave contents as they are."""
        return NAMED.get(self.name) == self.jinja

    def encoded(self) -> bytes:
        """What is kept of it, and decides shards; the place that it was read from does not."""
        return json.dumps({"name": self.name, "jinja": self.jinja}, ensure_ascii=False, indent=1).encode() + b"\n"


def named(name: str) -> Template:
    """One of NAMED."""
    return Template(name, NAMED[name], f'template "{name}"')


DEFAULT = named("midwatch")


def read(spec: TokenizerSpec) -> Template:
    """The template that `[tokenizer]` names. Raises SpecError."""
    if spec.template in NAMED:
        return named(spec.template)
    if spec.template == "own":
        if spec.path is None:
            raise SpecError('tokenizer: template "own" is one that a tokenizer brought along has (give path, or another template)')
        return _own(Path(spec.path).parent)
    path = Path(spec.template)
    try:
        return Template("file", path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise SpecError(f"tokenizer: template: {path}: is not UTF-8 (give a Jinja file)") from None
    except OSError as error:
        close = difflib.get_close_matches(path.name, TEMPLATES, 1)
        known = f'did you mean "{close[0]}"?' if close else f"give a Jinja file, or one of {', '.join(TEMPLATES)}"
        raise SpecError(f"tokenizer: template: {path}: {error.strerror} ({known})") from None


def _own(directory: Path) -> Template:
    """As `transformers` finds it: `chat_template.jinja`, else in `tokenizer_config.json`."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    try:
        if file.exists():
            return Template("own", file.read_text(encoding="utf-8"), str(file))
        found = json.loads(config.read_bytes()).get("chat_template") if config.exists() else None
    except OSError as error:
        raise SpecError(f"tokenizer: {error.filename}: {error.strerror} (make it readable)") from None
    except (ValueError, AttributeError, RecursionError):
        raise SpecError(f"tokenizer: {file} or {config}: cannot be read (fetch it again)") from None
    if isinstance(found, list):  # several, by name
        found = next((each.get("template") for each in found if isinstance(each, dict) and each.get("name") == "default"), None)
    if not isinstance(found, str):
        raise SpecError(f'tokenizer: {directory}: has no chat template of its own (set template to "chatml" or another)')
    return Template("own", found, str(config))


def kept(model: Path) -> Template:
    """The template of a tokenizer that a build has written. Raises ShardError."""
    path = model.with_name(FILE_NAME)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        return Template(found["name"], found["jinja"], str(path))
    except FileNotFoundError:
        return DEFAULT
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror} (restore the template, or build the shards again)") from None
    except (msgspec.MsgspecError, KeyError):
        raise ShardError(f"{path}: not a template (restore it, or build the shards again)") from None
