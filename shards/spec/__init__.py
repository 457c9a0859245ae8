"""What to build, as structs: the sources, the tokenizer, how shards are cut, what is removed."""

from shards.spec.build_spec import (
    STDLIB_KINDS,
    TEMPLATES,
    Build,
    Clean,
    Data,
    Kind,
    Origin,
    Slurm,
    Source,
    TokenizerSpec,
    check,
    decode_build,
)

__all__ = [
    "STDLIB_KINDS",
    "TEMPLATES",
    "Build",
    "Clean",
    "Data",
    "Kind",
    "Origin",
    "Slurm",
    "Source",
    "TokenizerSpec",
    "check",
    "decode_build",
]
