"""What annotators are asked about: prompts of a run's source, or of a file; which of them all get, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import xxhash

from launcher.controller.annotation.records import Prompt, PromptMessage, key_of
from launcher.controller.annotation.store import PreferenceError
from midwatch.recipe import Recipe
from shards.common.decoding import UNDECODABLE
from shards.common.errors import ShardError
from shards.readers.sources import ReadPosition, documents, is_held_out
from shards.sampling.mixing import covers
from shards.spec import Source
from shards.tokenization.records import Document

MOST_PROMPTS = 5000
"""Of a source: its first ones; an annotator decides some hundred a day."""
MOST_BYTES = 8 << 20
"""Of a file, which travels in one frame."""
PROMPT_KINDS = ("sft", "preference")
WAY = "give some with --prompts FILE"


def of_file(file: Path) -> list[Prompt]:
    """A prompt a line: an object with `prompt` (a text or messages) or `messages`, else the line itself. Raises PreferenceError."""
    try:
        size = file.stat().st_size
        content = file.read_text(encoding="utf-8-sig") if size <= MOST_BYTES else ""
    except OSError as error:
        raise PreferenceError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PreferenceError(f"{file}: is not UTF-8") from None
    if size > MOST_BYTES:
        raise PreferenceError(f"{file}: is larger than {MOST_BYTES >> 20} MiB (split it)")
    found: dict[Prompt, None] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            prompt = _of_line(line.strip())
            if isinstance(prompt, str):
                raise PreferenceError(f"{file}:{number}: {prompt}")
            found[prompt] = None
    if not found:
        raise PreferenceError(f"{file}: holds no prompts (write one a line, or JSON objects with prompt or messages)")
    return list(found)


def _of_line(line: str) -> Prompt | str:
    try:
        record = msgspec.json.decode(line) if line.startswith("{") else line
    except UNDECODABLE:
        return "begins as an object and is not JSON"
    said = record if isinstance(record, str) else record.get("prompt", record.get("messages"))
    if isinstance(said, str):
        return (PromptMessage("user", said),) if said.strip() else "the prompt is empty"
    try:
        turns = msgspec.convert(said, list[PromptMessage])
    except msgspec.ValidationError:
        return 'has neither "prompt" nor "messages": a text, or a list of messages with role and content'
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or turns[-1].role != "user" or not all(turn.content.strip() for turn in turns):
        return "the last message that is not the assistant's must be the user's, and none may be empty"
    return tuple(turns)


def of_run(recipe: Recipe, source: str, stage: str) -> list[Prompt]:
    """Held-in prompts of a source, or of those in the stage's mixture. Reads files, for seconds. Raises PreferenceError."""
    held_out, seed = recipe.data.held_out, recipe.run.seed
    found: dict[Prompt, None] = {}
    sources = _named(recipe, source) if source else _of_stage(recipe, stage)
    for each in sources:
        room = len(found) + MOST_PROMPTS // len(sources)
        try:
            for prompt in _prompts(each, lambda key: is_held_out(key, held_out, seed)):
                found[prompt] = None
                if len(found) >= room:
                    break
        except (ShardError, OSError) as error:
            raise PreferenceError(f"{error} ({WAY})") from None
    if not found:
        raise PreferenceError(f"{', '.join(each.name for each in sources)}: holds no prompts ({WAY})")
    return list(found)


def _named(recipe: Recipe, name: str) -> list[Source]:
    found = [each for each in recipe.data.source if each.name == name]
    able = ", ".join(each.name for each in recipe.data.source if _able(each)) or "none"
    if not found or not _able(found[0]):
        raise PreferenceError(f'there is no source "{name}" that has prompts (there are: {able}; or {WAY})')
    return found


def _of_stage(recipe: Recipe, stage: str) -> list[Source]:
    """Those of the stage, else of the nearest one that has any: before it first."""
    at = recipe.stage_index(stage) if stage else 0
    for each in (*reversed(recipe.stage[: at + 1]), *recipe.stage[at + 1 :]):
        names = each.sources
        found = [source for source in recipe.data.source if any(covers(source.name, name) for name in names) and _able(source)]
        if found:
            return found
    raise PreferenceError(f"the run has no source with prompts: none of kind sft or preference that is read from text ({WAY})")


def _able(source: Source) -> bool:
    """What a stage makes is no longer text."""
    return source.kind in PROMPT_KINDS and source.origin != "stage"


def _prompts(source: Source, held_out: Callable[[str], bool]) -> Iterator[Prompt]:
    for each in documents(source, ReadPosition(), held_out, lambda key: not held_out(key)):
        if isinstance(each, Document) and not held_out(each.key):
            prompt = _of_document(each, source)
            if prompt:
                yield prompt


def _of_document(document: Document, source: Source) -> Prompt:
    """All before the answers; none where the user does not speak last."""
    answers = 2 if source.kind == "preference" else 1
    said = document.parts[:-answers]
    roles = document.roles[: len(said)] or ("user",) * len(said)
    turns = tuple(PromptMessage(role, content) for role, content in zip(roles, said, strict=True))  # type: ignore[arg-type]
    return turns if turns and turns[-1].role == "user" else ()


def is_shared(key: str, share: float) -> bool:
    """Whether all annotators get the prompt: a larger share holds every prompt of a smaller one."""
    return xxhash.xxh3_64_intdigest(key.encode(), seed=1) < share * 2**64


def order(prompts: Iterable[Prompt], annotator: str, share: float) -> list[tuple[Prompt, bool]]:
    """Prompts, and whether they are shared. The shared ones come for all in the same order, evenly among the annotator's own."""
    keyed = {key_of(prompt): prompt for prompt in prompts}
    shared = sorted(key for key in keyed if is_shared(key, share))
    own = sorted(keyed.keys() - set(shared), key=lambda key: xxhash.xxh3_128_hexdigest(f"{annotator}/{key}".encode()))
    placed = [((at + 0.5) / len(shared), 0, key) for at, key in enumerate(shared)]
    placed += [((at + 0.5) / len(own), 1, key) for at, key in enumerate(own)]
    return [(keyed[key], kind == 0) for _, kind, key in sorted(placed)]
