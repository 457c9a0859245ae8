"""A hook of MkDocs: README, CONTRIBUTING and CHANGELOG, which lie beside `docs/`, become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def adapted(text: str) -> str:
    """A page's text with links as they are from within `docs/`, and with bars in code as Python-Markdown reads them in tables."""

    def link(match: re.Match[str]) -> str:
        path, hash_sign, anchor = match[1].partition("#")
        path = PAGES.get(path.removeprefix("../"), path.removeprefix("docs/"))
        return f"]({path}{hash_sign}{anchor})"

    text = re.sub(r"\]\((?![a-z]+:)([^)\s]+)\)", link, text)
    return re.sub(r"(?m)^\|.*$", lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), row[0]), text)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages; mkdocs calls it once it has found those in `docs/`."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=adapted((ROOT / name).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pages of `docs/` may link to the three."""
    return adapted(markdown)
