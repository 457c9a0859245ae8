"""A run's tokenizer as a Hugging Face directory has it: its files, and the chat format as a template."""

from __future__ import annotations

import json
from typing import Any

from shards.hf_tokenizer import from_sentencepiece, with_reserved
from shards.tokenizer import BOS, EOS, PAD, RESERVED, ROLES, UNK, Tokenizer, is_json

PROBES = (
    "def main(argv):\n    return [x**2 for x in range(10)]\n",
    "  Two  spaces,\ttabs\r\nand  lines.\n\n\nEnd ",
    "naïve café, Ελλάδα, 日本語, 🙂",
    "",
)
"""Texts on which the exported tokenizer is held against our own."""


class TokenizerError(Exception):
    """The tokenizer cannot be exported; the message says why and the way out."""


def names(tokenizer: Tokenizer) -> dict[str, str]:
    """What each reserved id is called in the tokenizer's own files, by our name."""
    found = {}
    for name in RESERVED:
        number = tokenizer.reserved[name]
        found[name] = tokenizer.own_name(number) or name
    return found


def chat_template(tokenizer: Tokenizer) -> str:
    """Jinja that renders a conversation as `shards.tokenizer.Tokenizer.chat` encodes it."""
    called = names(tokenizer)
    branches = ""
    for role, name in ROLES.items():
        end = f"{{{{- {json.dumps(called[EOS])} -}}}}" if role == "assistant" else ""
        branches += f"{{%- {'elif' if branches else 'if'} message['role'] == '{role}' -%}}"
        branches += f"{{{{- {json.dumps(called[name])} + message['content'] -}}}}{end}"
    unknown = "{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}"
    assistant = json.dumps(called[ROLES["assistant"]])
    return (
        f"{{%- for message in messages -%}}{branches}{{%- else -%}}{unknown}{{%- endif -%}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {assistant} -}}}}{{%- endif -%}}"
    )


def files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Names and contents. Raises TokenizerError where the ids would not be the same."""
    called = names(tokenizer)
    by_number = {tokenizer.reserved[name]: called[name] for name in RESERVED}
    found: dict[str, bytes] = {}
    if is_json(tokenizer.model):
        content = with_reserved(json.loads(tokenizer.model)["tokenizer"], by_number.items())
    else:
        content = from_sentencepiece(tokenizer.model, by_number)
        found["tokenizer.model"] = tokenizer.model
    _compare(tokenizer, content)
    template = chat_template(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": called[BOS],
        "eos_token": called[EOS],
        "pad_token": called[PAD],
        "unk_token": called[UNK],
        "add_bos_token": False,
        "add_eos_token": False,
        "additional_special_tokens": [called[name] for name in RESERVED if name not in (BOS, EOS, PAD, UNK)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": template,
    }
    found["tokenizer.json"] = json.dumps(content, ensure_ascii=False, indent=1).encode()
    found["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n"
    found["chat_template.jinja"] = template.encode()
    return found


def _compare(tokenizer: Tokenizer, content: dict[str, Any]) -> None:
    from tokenizers import Tokenizer as Fast

    try:
        fast: Any = Fast.from_str(json.dumps(content))
    except Exception as error:  # what the library raises is a bare Exception
        raise TokenizerError(f"the tokenizer cannot be written as a tokenizer.json: {error}") from None
    for text in PROBES:
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            way = "train with one that was built here, or with a tokenizer.json"
            raise TokenizerError(f"the tokenizer cannot be written as a tokenizer.json: it would encode {text!r} otherwise ({way})")
