"""What the docs for developers name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`((?:shards|midwatch|trainer|tui|launcher)/[\w/.]*)`")


def test_every_path_on_the_page_of_the_architecture_exists() -> None:
    named = NAMED.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []
