"""A run's tokenizer as a Hugging Face directory has it: its files, and the chat template."""

from __future__ import annotations

import json
from typing import Any

from shards.tokenization.huggingface import from_sentencepiece, with_reserved
from shards.tokenization.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, is_json

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
    for name, number in tokenizer.reserved.items():
        found[name] = tokenizer.own_name(number) or name
    return found


def files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Names and contents. Raises TokenizerError where the ids would not be the same."""
    called = names(tokenizer)
    by_number = {tokenizer.reserved[name]: called[name] for name in tokenizer.reserved}
    found: dict[str, bytes] = {}
    if is_json(tokenizer.model):
        content = with_reserved(json.loads(tokenizer.model)["tokenizer"], by_number.items())
    else:
        content = from_sentencepiece(tokenizer.model, by_number)
        found["tokenizer.model"] = tokenizer.model
    # Special in any file, special in this one: else another reader would find it in a text.
    for entry in content["added_tokens"]:
        entry["special"] = entry["special"] or entry["id"] in by_number or entry["id"] in tokenizer.stops
    content["post_processor"] = _post_processor(called.get(BOS), tokenizer.bos)
    _compare(tokenizer, content)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": called.get(BOS),
        "eos_token": called[EOS],
        "pad_token": called[PAD],
        "unk_token": called[UNK],
        "add_bos_token": tokenizer.bos is not None,
        "add_eos_token": False,
        "additional_special_tokens": [called[name] for name in tokenizer.reserved if name not in (BOS, EOS, PAD, UNK)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": tokenizer.template.jinja,
    }
    found["tokenizer.json"] = json.dumps(content, ensure_ascii=False, indent=1).encode()
    found["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n"
    found["chat_template.jinja"] = tokenizer.template.jinja.encode()
    return found


def _post_processor(name: str | None, number: int | None) -> dict[str, Any] | None:
    """Puts BOS before a text, as in training. A chat template's text is encoded without it, and has the BOS that it writes."""
    if name is None or number is None:
        return None
    begin, first, second = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        *({"Sequence": {"id": part, "type_id": 0}} for part in "AB"),
    )
    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": special,
    }


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
