"""Whether a run's recipe.toml says something else than the journal has of it, and what, with the values of secrets left out."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from typing import Any

from launcher.agent.environment import MASK, SECRET, mask_url
from launcher.controller.core.context import ControllerContext
from midwatch.journal import entries as j
from midwatch.journal.run_state import differences
from midwatch.recipe import Recipe

MOST_TOLD = 12
"""Changed keys that the warning names; the journal's entry has them all."""
_SECRET_KEY = re.compile(r"(^|_)(key|secret|password|token|credentials?)$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(\b\w+)=(\"[^\"]*\"|'[^']*'|\S+)")
_ENVIRONMENT = "cluster.env."


def stated(text: str) -> dict[str, str]:
    """Every key of a recipe by its dotted name, `stage.sft.lr`, with its value as JSON; secrets are masked."""
    return {name: json.dumps(_presentable(name, value), ensure_ascii=False) for name, value in _leaves("", tomllib.loads(text))}


def fingerprint(text: str) -> str:
    """Of what a recipe says, secrets included, whatever its layout and comments."""
    leaves = sorted((name, json.dumps(value, default=str)) for name, value in _leaves("", tomllib.loads(text)))
    return hashlib.blake2b(json.dumps(leaves).encode(), digest_size=16).hexdigest()


def run_began(name: str, recipe: Recipe, text: str, now: float, id: str) -> j.RunBegan:
    return j.RunBegan(time=now, name=name, recipe=recipe.digest(), id=id, file=fingerprint(text), stated=stated(text))


def note_change(context: ControllerContext) -> None:
    """Journals and tells that recipe.toml was edited since the journal last had it, if it was."""
    before = context.ledger.recipe
    try:
        text = context.paths.recipe.read_text(encoding="utf-8-sig")
        file, now = fingerprint(text), stated(text)
    except (OSError, ValueError):
        return  # whoever reads it next says what is wrong
    if before is None or file == before.file:
        return
    if isinstance(before, j.RunBegan) and not before.file and before.recipe == context.recipe.digest():
        return  # the journal of an earlier version, and nothing has changed
    changes = differences(before.stated, now)
    context.record(j.RecipeChanged(time=context.clock(), file=file, stated=now, changes=changes))
    if changes:
        more = f" and {len(changes) - MOST_TOLD} more" if len(changes) > MOST_TOLD else ""
        told = f"{'; '.join(changes[:MOST_TOLD])}{more}"
    elif before.stated:
        told = "secret values"
    else:
        told = "the journal, written by an earlier version, does not have its previous content"
    context.note("warning", f"recipe.toml was edited since the run last read it: {told}")


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, each in value.items() for leaf in _leaves(f"{prefix}{key}.", each)]
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        names = [str(each.get("name", place)) for place, each in enumerate(value)]
        names = names if len(set(names)) == len(names) else [str(place) for place in range(len(value))]
        return [leaf for name, each in zip(names, value, strict=True) for leaf in _leaves(f"{prefix}{name}.", each)]
    return [(prefix.removesuffix("."), value)]


def _presentable(name: str, value: Any) -> Any:
    leaf = name.rpartition(".")[2]
    if _SECRET_KEY.search(leaf) or (name.startswith(_ENVIRONMENT) and SECRET.search(leaf)):
        return MASK
    if isinstance(value, list):
        return [_presentable(name, each) for each in value]
    if isinstance(value, str):
        shown = mask_url(value)
        return _ASSIGNMENT.sub(lambda found: f"{found[1]}={MASK}" if SECRET.search(found[1]) else found[0], shown)
    return value if isinstance(value, bool | int | float | dict) else str(value)
