"""What to build, as structs: the sources, the tokenizer, how shards are cut, what is removed."""

from shards.spec.build_spec import (
    NOT_READ,
    READERS,
    STDLIB_KINDS,
    TEMPLATES,
    Build,
    Clean,
    Data,
    Kind,
    ObjectiveKind,
    Origin,
    Slurm,
    Source,
    TokenizerSpec,
    check,
    decode_build,
)

__all__ = [
    "NOT_READ",
    "READERS",
    "STDLIB_KINDS",
    "TEMPLATES",
    "Build",
    "Clean",
    "Data",
    "Kind",
    "ObjectiveKind",
    "Origin",
    "Slurm",
    "Source",
    "TokenizerSpec",
    "check",
    "decode_build",
]
