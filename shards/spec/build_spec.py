"""What to build: sources of text, a tokenizer, and how shards are cut; the `[data]` part of a recipe, and `build --spec`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from shards.common.decoding import shown
from shards.common.errors import SpecError
from shards.common.extensions import ExtensionError, Registry
from shards.filters.heuristics.settings import C4, FineWeb, GopherQuality, GopherRepetition, UniqueWords
from shards.filters.settings import Contamination, Language, Perplexity, Pii, Quality, Toxicity

Kind = Literal["text", "sft", "preference", "unpaired"]
ObjectiveKind = Literal["text", "sft", "preference", "labelled", "scored", "prompt"]
"""How an objective reads a source: see `shards.sampling.rows`."""
Origin = str
"""One of STDLIB_KINDS, `stage`, `made`, or a reader of files."""
Layout = Literal["auto", "plain", "messages", "alpaca", "sharegpt", "dolly", "oasst", "lima", "flan", "hh"]

Made = Literal["related", "conversations", "tasks"]

STDLIB_KINDS: dict[str, Kind] = {
    "stdlib-code": "text",
    "stdlib-docs": "text",
    "stdlib-topics": "text",
    "stdlib-sft": "sft",
    "stdlib-preference": "preference",
}
READERS = Registry(
    "midwatch.readers",
    "reader",
    {
        name: f"shards.readers.{name}"
        for name in (
            "jsonl", "csv", "parquet", "text", "code", "warc", "wet", "wikipedia", "stackexchange", "latex", "gutenberg",
        )
    },
)  # fmt: skip
"""Modules that read files of one format; `shards.readers.base` says what such a module has."""
NOT_READ = (*STDLIB_KINDS, "stage", "made")
"""Origins that are no readers of files."""
LAYOUT_KINDS: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(("auto", "plain"), ("text", "sft", "preference", "unpaired")),
    **dict.fromkeys(("messages", "alpaca", "sharegpt", "dolly", "lima", "flan"), ("sft",)),
    "oasst": ("sft", "preference"),
    "hh": ("preference",),
}
OPTIONS: dict[str, tuple[str, ...]] = {"made": ("made", "of", "characters")}
"""By origin that is no reader: keys that not every origin takes, and it does."""
NOT_FOR_ALL = ("layout", "suffixes", "repository", "score_margin", "made", "of", "characters")
"""Keys that a source may have only where its origin takes them."""
TEMPLATES = ("midwatch", "llama2", "llama3", "chatml", "zephyr", "own")
"""Chat templates that have a name; any other is a Jinja file's path."""
RESERVED = ("build.json", "models", "report.json", "tokenizer.model", "tokenizer.template", "work")
"""Names in the directory of a build that are not sources."""
SMALLEST_VOCAB = 320  # 8 reserved ids, 256 bytes, the newline, and room for an alphabet


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One source of documents. `origin` says where they come from: this Python's standard library, or a path."""

    name: str  # letters, digits, `_`, `-`, `.`; names the directory of its shards and the source in mixtures
    kind: Kind  # text: documents; sft: conversations; preference: prompt, chosen, rejected; unpaired: labelled conversations
    origin: Origin
    stage: str | None = None  # stage: the run's stage that makes it
    part: str | None = None  # stage: which of the things that it makes
    path: str | None = None  # a file, a directory, a glob, or a URL of these; files also .gz, .zst, .bz2 or .xz
    text_field: str = "text"  # jsonl, parquet: the field that holds a document
    prompt_field: str = "prompt"
    response_field: str = "response"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    messages_field: str = "messages"  # sft, unpaired: a conversation, where there is no response
    completion_field: str = "completion"  # unpaired: the response
    label_field: str = "label"  # unpaired: true where the last response is a good example, false where it is a bad one
    max_documents: int | None = None  # documents, held-out ones included
    max_tokens: int | None = None  # tokens, held-out ones included
    split_by: Literal["language", "quality", "length", "label"] | None = None  # clean: a separate source for each label, NAME.LABEL
    lengths: tuple[int, ...] = (8192, 32_768, 131_072)  # split_by "length": tokens up to which each part's documents go
    layout: Layout = "auto"  # jsonl, parquet: how instruction data is laid out; auto: detected from a file's first record
    suffixes: tuple[str, ...] = ()  # endings of the files read in a directory, such as ".py"; (): the origin's own
    repository: bool = False  # code: each directory directly beneath the path is one document
    score_margin: int = 2  # stackexchange, preference: by how many votes the chosen answer is ahead, at least
    made: Made | None = None  # made: long documents of related ones, long conversations, or tasks that need all their length
    of: tuple[str, ...] = ()  # made: the sources whose clean documents it is made of
    characters: int = 131_072  # made: length to reach
    broken_files: float = 0.05  # share of the files that may be broken, 0 to 1; with more the build stops


class TokenizerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tokenizer: a SentencePiece model trained on a sample of the sources' training documents, or an existing one."""

    vocab: int = 32_000  # ids, the reserved ones and the 256 bytes included
    kind: Literal["bpe", "unigram"] = "bpe"
    path: str | None = None  # a trained .model to use instead; `vocab` and `kind` are then ignored
    sample_bytes: int = 20_000_000  # bytes of text to train on, in equal parts from all sources
    template: str = "midwatch"  # of TEMPLATES, or a Jinja file; "own": the one that comes with `path`


class Clean(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is removed before documents are encoded. Without this table sources are used as they are."""

    exact: bool = True  # remove documents that equal an earlier one of any source, except for case and white space
    near_dup_threshold: float = 0.8  # texts whose word 5-grams are this similar (Jaccard) to an earlier one's; 0: not looked for
    language: Language | None = None
    gopher_repetition: GopherRepetition | None = None
    gopher_quality: GopherQuality | None = None
    unique_words: UniqueWords | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    perplexity: Perplexity | None = None
    quality: Quality | None = None
    pii: Pii | None = None
    toxicity: Toxicity | None = None
    contamination: Contamination | None = None
    chunk_bytes: int = 16_777_216  # of text in a task; the memory of a step grows with it

    def check(self, where: str) -> None:
        """Raise SpecError for values that are well-formed but cannot work."""
        near = self.near_dup_threshold
        if not (near == 0 or 0.5 <= near <= 1):
            raise SpecError(f"{where}: near_dup_threshold is {near} (use a similarity from 0.5 to 1, such as 0.8, or 0 for none)")
        if not 1 << 10 <= self.chunk_bytes <= 1 << 30:
            raise SpecError(f"{where}: chunk_bytes is {self.chunk_bytes} (use 1024 to 1073741824)")
        for name in self.__struct_fields__:
            if isinstance(settings := getattr(self, name), msgspec.Struct):
                settings.check(f"{where}.{name}")  # type: ignore[attr-defined]  # each family of settings has one
        for key, path in self.references().items():
            if not path:
                raise SpecError(f"{where}.{key} is not set (name a file or directory of text)")

    def references(self) -> dict[str, str]:
        """Paths by their keys: reference texts that decide which documents are kept."""
        found: dict[str, str] = {}
        if self.perplexity is not None:
            found["perplexity.reference"] = self.perplexity.reference
        if self.quality is not None:
            found |= {"quality.good": self.quality.good, "quality.bad": self.quality.bad}
        if self.contamination is not None:
            found |= {f"contamination.sets.{name}": path for name, path in self.contamination.sets.items()}
        return found

    def placed(self, place: Callable[[str], str]) -> Clean:
        """A copy with each of those paths replaced by what `place` returns for it; paths that are not set stay empty."""

        def moved(path: str) -> str:
            return place(path) if path else ""

        clean = self
        if clean.perplexity is not None:
            perplexity = msgspec.structs.replace(clean.perplexity, reference=moved(clean.perplexity.reference))
            clean = msgspec.structs.replace(clean, perplexity=perplexity)
        if clean.quality is not None:
            quality = msgspec.structs.replace(clean.quality, good=moved(clean.quality.good), bad=moved(clean.quality.bad))
            clean = msgspec.structs.replace(clean, quality=quality)
        if clean.contamination is not None:
            sets = {name: moved(path) for name, path in clean.contamination.sets.items()}
            clean = msgspec.structs.replace(clean, contamination=msgspec.structs.replace(clean.contamination, sets=sets))
        return clean


class Slurm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How jobs are sent where `executor` is "slurm"."""

    partition: str = "cpu"
    time: str = "24:00:00"  # limit of a job
    memory_gb: int = 4  # of a job, which takes one core
    qos: str = ""
    sbatch: dict[str, str] = {}  # further arguments of sbatch, without their dashes


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sources and how their shards are cut."""

    source: tuple[Source, ...]
    dir: str | None = None  # where the shards lie; None: the launcher's choice
    frame_tokens: int = 16_384  # tokens in a zstd frame, the unit of random access
    level: int = 9  # zstd compression level, 1 to 19
    held_out: float = 0.01  # share of each source's documents that is never trained on, 0 to 0.5
    shard_tokens: int = 67_108_864  # tokens after which a shard ends (with its document); also the unit of resuming
    clean: Clean | None = None
    executor: Literal["local", "slurm", "ray"] = "local"  # where the steps of `clean` run
    executor_tasks: int = 64  # jobs that a step is split into with another executor than local
    slurm: Slurm = Slurm()


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that `python -m shards build` needs."""

    data: Data
    tokenizer: TokenizerSpec = TokenizerSpec()
    out: str  # directory to build in
    seed: int = 0  # chooses the held-out documents


def decode_build(raw: bytes, where: str) -> Build:
    """A Build from JSON; `where` names the file in the SpecError that a bad one raises."""
    try:
        build = msgspec.json.decode(raw, type=Build)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SpecError(f"{where}: {error}") from None
    check(build, where)
    return build


def check(build: Build, where: str = "data") -> None:
    """Raise SpecError for values that are well-formed but cannot work."""
    data, tokenizer = build.data, build.tokenizer
    if not data.source:
        raise SpecError(f"{where}: no sources (give at least one)")
    names = [source.name for source in data.source]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f'{where}: two sources are named "{name}" (rename one)')
    for source in data.source:
        if source.split_by is not None and (alike := [name for name in names if name.startswith(f"{source.name}.")]):
            raise SpecError(f'{where}: source "{alike[0]}" is named like a part of "{source.name}", which is split (rename one)')
    for source in data.source:
        _check_source(source, f'{where}: source "{source.name}"')
    if not (math.isfinite(data.held_out) and 0 <= data.held_out <= 0.5):
        raise SpecError(f"{where}: held_out is {data.held_out} (use a share from 0 to 0.5, such as 0.01)")
    if not 64 <= data.frame_tokens <= 1 << 24:
        raise SpecError(f"{where}: frame_tokens is {data.frame_tokens} (use 64 to 16777216; 16384 suits most)")
    if not 1 <= data.level <= 19:
        raise SpecError(f"{where}: level is {data.level} (use a zstd level from 1 to 19)")
    if data.shard_tokens < data.frame_tokens:
        raise SpecError(f"{where}: shard_tokens is less than frame_tokens (use at least {data.frame_tokens})")
    if data.clean is None and data.executor != "local":
        why = "runs the steps of cleaning, but there is no [data.clean]"
        raise SpecError(f'{where}: executor "{data.executor}" {why} (add it, or drop executor)')
    if data.clean is not None:
        data.clean.check(f"{where}.clean")
    _check_made_of(data, where)
    if data.executor_tasks < 1:
        raise SpecError(f"{where}: executor_tasks is {data.executor_tasks} (use at least 1)")
    if tokenizer.path is None and tokenizer.vocab < SMALLEST_VOCAB:
        raise SpecError(f"{where}: tokenizer vocab is {tokenizer.vocab} (use at least {SMALLEST_VOCAB})")
    if tokenizer.template == "own" and tokenizer.path is None:
        raise SpecError(
            f'{where}: tokenizer template is "own", but [tokenizer] path is not set (set it, or choose another template)'
        )
    if tokenizer.sample_bytes < 1:
        raise SpecError(f"{where}: tokenizer sample_bytes is {tokenizer.sample_bytes} (use at least 1)")
    if not 0 <= build.seed < 1 << 63:
        raise SpecError(f"{where}: seed is {build.seed} (use 0 or more, below 2^63)")


def _reader(source: Source, where: str) -> Any:
    """The module that reads it. Raises SpecError."""
    try:
        return READERS.load(source.origin)
    except ExtensionError as error:
        raise SpecError(f"{where}: origin: {error}") from None


def _origins_with(key: str) -> list[str]:
    """Origins that take a key: built-in ones, since of others a broken one must not stop what does not ask for it."""
    read = [name for name in READERS.built_in if key in READERS.load(name).OPTIONS]
    return read + [name for name, keys in OPTIONS.items() if key in keys]


def _check_source(source: Source, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", source.name):
        raise SpecError(f"{where}: a name is up to 100 letters, digits, `_`, `-` or `.`, and does not begin with `.`")
    if source.name.lower() in RESERVED or source.name.lower().endswith(".tmp"):
        raise SpecError(f"{where}: a build has a file of its own with that name (rename the source)")
    if source.origin in STDLIB_KINDS:
        if source.kind != STDLIB_KINDS[source.origin]:
            raise SpecError(f'{where}: origin {source.origin} is of kind "{STDLIB_KINDS[source.origin]}"')
        if source.path is not None:
            raise SpecError(f"{where}: origin {source.origin} takes no path (drop it, or use jsonl or text)")
    elif source.origin == "stage":
        if source.stage is None or source.part is None or source.path is not None:
            raise SpecError(f"{where}: origin stage needs stage (a stage's name) and part (which of its outputs), and no path")
    elif source.origin == "made":
        _check_made(source, where)
    elif not READERS.knows(source.origin):
        origins = ", ".join((*NOT_READ, *READERS.names()))
        raise SpecError(f"{where}: origin must be one of {origins}, but it is {shown(source.origin)}")
    elif source.path is None:
        raise SpecError(f"{where}: origin {source.origin} needs a path (a file, a directory, a glob or a URL)")
    if source.origin not in NOT_READ:
        kinds = _reader(source, where).KINDS
        if source.kind not in kinds:
            fitting = " or ".join(f'"{kind}"' for kind in kinds)
            raise SpecError(f"{where}: origin {source.origin} is of kind {fitting} (use jsonl or parquet for {source.kind})")
    _check_fitting(source, where)
    if source.origin != "stage" and (source.stage is not None or source.part is not None):
        raise SpecError(f"{where}: stage and part are for origin stage (drop them)")
    if list(source.lengths) != sorted(set(source.lengths)) or not source.lengths or source.lengths[0] < 1:
        raise SpecError(f"{where}: lengths are {list(source.lengths)} (use numbers of tokens in ascending order)")
    for limit in (source.max_documents, source.max_tokens):
        if limit is not None and limit < 1:
            raise SpecError(f"{where}: max_documents and max_tokens must be at least 1, or left out")


def _check_made(source: Source, where: str) -> None:
    if source.made is None or not source.of or source.path is not None:
        raise SpecError(f"{where}: origin made needs made (related, conversations or tasks) and of (names of sources), and no path")
    if (source.made == "conversations") != (source.kind == "sft"):
        raise SpecError(f'{where}: made conversations are of kind "sft", related documents and tasks of kind "text"')
    if source.kind == "preference":
        raise SpecError(f'{where}: origin made is of kind "text" or "sft"')
    if source.characters < 1000:
        raise SpecError(f"{where}: characters is {source.characters} (use at least 1000)")


def _check_made_of(data: Data, where: str) -> None:
    """Check that sources of origin `made` are made of existing sources of the same kind."""
    known = {source.name: source for source in data.source}
    for source in data.source:
        for name in source.of:
            place = f'{where}: source "{source.name}"'
            if name not in known or known[name].origin in ("made", "stage"):
                fit = [each.name for each in data.source if each.origin not in ("made", "stage") and each.kind == source.kind]
                raise SpecError(f'{place}: it cannot be made of "{name}" (it can be of: {", ".join(fit) or "none"})')
            if known[name].kind != source.kind:
                raise SpecError(f'{place}: "{name}" is of kind {known[name].kind}, not {source.kind}')
        if source.origin == "made" and data.clean is None:
            raise SpecError(f'{where}: source "{source.name}" is made of cleaned documents: add [data.clean]')


def _check_fitting(source: Source, where: str) -> None:
    defaults = Source(name="", kind="text", origin="text")
    taken: tuple[str, ...] = OPTIONS.get(source.origin, ()) if source.origin in NOT_READ else _reader(source, where).OPTIONS
    for key in NOT_FOR_ALL:
        if getattr(source, key) != getattr(defaults, key) and key not in taken:
            raise SpecError(f"{where}: {key} is for origin {', '.join(_origins_with(key))} (drop it)")
    kinds = LAYOUT_KINDS[source.layout]
    if source.kind not in kinds:
        raise SpecError(f'{where}: layout "{source.layout}" is of kind {" or ".join(kinds)}, not {source.kind}')
    for suffix in source.suffixes:
        if not suffix.strip("."):
            raise SpecError(f'{where}: suffixes holds "{suffix}" (use endings of names, such as ".py")')
    if source.score_margin < 1:
        raise SpecError(f"{where}: score_margin is {source.score_margin} (use at least 1)")
    if not (math.isfinite(source.broken_files) and 0 <= source.broken_files <= 1):
        raise SpecError(f"{where}: broken_files is {source.broken_files} (use a share from 0 to 1, such as 0.05)")
