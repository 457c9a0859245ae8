"""What tests of shards share: small real builds, and the zstd program."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from shards.build.build import build
from shards.spec import Build, Data, Source, TokenizerSpec

settings.register_profile("shards", deadline=None, max_examples=40)
settings.load_profile("shards")


@pytest.fixture(scope="session")
def zstd() -> str:
    """The zstd program: an independent reader. In CI its absence is a failure."""
    found = shutil.which("zstd")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the zstd program is missing (apt-get install zstd)")
        pytest.skip("the zstd program is not installed (apt-get install zstd)")
    return found


SOURCES = (
    Source(name="code", kind="text", origin="stdlib-code", max_documents=60),
    Source(name="topics", kind="text", origin="stdlib-topics", max_documents=40),
    Source(name="chat", kind="sft", origin="stdlib-sft", max_documents=300),
    Source(name="pairs", kind="preference", origin="stdlib-preference", max_documents=200),
)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., Build]:
    """A small build: `make_spec(out, source=..., tokenizer=..., seed=..., and any field of Data)`."""

    def make(out: Path, *, seed: int = 0, tokenizer: TokenizerSpec | None = None, **data: Any) -> Build:
        data = {"source": SOURCES, "frame_tokens": 1024, "shard_tokens": 65_536, "held_out": 0.1, "level": 3, **data}
        tokenizer = tokenizer or TokenizerSpec(vocab=600, sample_bytes=200_000)
        return Build(data=Data(**data), tokenizer=tokenizer, out=str(out), seed=seed)

    return make


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, make_spec: Callable[..., Build]) -> Path:
    """Shards of all kinds, several of them for code. Read-only: copy it to change it."""
    return build(make_spec(tmp_path_factory.mktemp("built") / "shards"), workers=0)


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` to damage."""
    return Path(shutil.copytree(built, tmp_path / "shards"))
