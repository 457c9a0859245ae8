"""English prose of whatever machine this is, as JSON lines: docstrings, manuals and documents of installed packages.

Lines that were broken to fit a page are put together again, as a web page's text has them: the rules of C4 and FineWeb look at
whether lines end sentences. Of what comes out 5 % is planted again as it is, and 5 % with one word in three hundred changed.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SMALLEST, LARGEST = 400, 200_000  # characters of a document
PLANTED = 0.05
DOCUMENTS = ("README", "copyright", "NEWS.Debian", "TODO")
SUFFIXES = (".rst", ".md", ".txt")
LICENCES = re.compile(r"licen[cs]e|copying|notice|authors|metadata$", re.IGNORECASE)
_OWN_LINE = re.compile(r"[-*+•>|=#:@~^.]|\d+[.)]|\w+\(|\S+:$")  # lists, tables, code, headings
_ROFF = re.compile(r"\\f(\[[^]]*]|\(..|.)|\\s[-+]?\d|\\[&|^/,%:]|\\\*\(..")
_ROFF_NAMES = {r"\-": "-", r"\(bu": "•", r"\(aq": "'", r"\(dq": '"', r"\(em": "--", r"\(en": "-", r"\ ": " ", r"\e": "\\"}


def unwrapped(text: str) -> str:
    """Paragraphs as one line each; what looks like a list, a table or code keeps its lines."""
    found: list[str] = []
    ended = True
    for line in text.splitlines():
        plain = line.strip()
        own = not plain or line.startswith(" " * 8) or "   " in plain or _OWN_LINE.match(plain) is not None
        if own or ended:
            found.append(plain)
        else:
            found[-1] = f"{found[-1]} {plain}"
        ended = not plain
    return re.sub("\n{3,}", "\n\n", "\n".join(found)).strip()


def docstrings(source: bytes) -> str:
    """All docstrings of a module, in its order; nothing for one that does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(said for said in found if said)


def manual(raw: str) -> str:
    """The words of a manual page, without its roff."""
    lines = []
    for line in raw.split("\n"):
        if line.startswith(('.\\"', "'\\\"", ".de", ".ds", ".nr", ".if", ".ie", ".el", ".TH", ".so")):
            continue
        if line.startswith((".SH", ".SS", ".PP", ".P", ".TP", ".IP", ".sp", ".LP", ".br", ".Pp", ".It", ".Sh")):
            lines.append("\n" + line.partition(" ")[2].strip('"') if line.startswith((".SH", ".SS", ".Sh")) else "\n")
        elif line.startswith((".", "'")):
            lines.append(line.partition(" ")[2].strip('"'))
        else:
            lines.append(line)
    text = _ROFF.sub("", "\n".join(line for line in lines if line))
    for name, plain in _ROFF_NAMES.items():
        text = text.replace(name, plain)
    return text


def _texts() -> Iterator[str]:
    """What takes the least time to find comes first."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path("/usr/share/man").glob("man*/*.gz")):
        if not path.is_symlink():
            yield manual(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        plain = path.name.removesuffix(".gz")
        if (plain.endswith(SUFFIXES) or plain in DOCUMENTS) and _is_small(path):
            raw = path.read_bytes()
            yield (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")
    packages, library = (Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib"))
    installed = sorted(path for path in packages.rglob("*") if _is_small(path))
    for path in installed:
        if path.suffix != ".py" and (path.name.endswith(SUFFIXES) or LICENCES.search(path.name)):
            yield path.read_bytes().decode("utf-8", "replace")
    for path in [*sorted(library.rglob("*.py")), *(path for path in installed if path.suffix == ".py")]:
        yield docstrings(path.read_bytes())


def _is_small(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < LARGEST


def is_prose(paragraph: str) -> bool:
    """Whether it is sentences: technical text is mostly thrown away by the rules otherwise, for symbols are words to them."""
    words = paragraph.split(" ")
    ends = paragraph.endswith((".", "!", "?")) and "{" not in paragraph
    return ends and len(words) >= 12 and sum(map(str.isalpha, words)) >= 0.75 * len(words)


def texts(limit: int) -> list[str]:
    """Documents, `limit` characters of them at most: the prose of what is there, no paragraph of it twice."""
    found: list[str] = []
    seen: set[str] = set()
    size = 0
    for text in _texts():
        kept = []
        for line in unwrapped(text).split("\n"):
            if is_prose(line) and line not in seen:
                seen.add(line)
                kept.append(line)
        plain = "\n\n".join(kept)
        if SMALLEST <= len(plain) <= LARGEST:
            found.append(plain)
            size += len(plain)
        if size >= limit:
            break
    return found


def planted(documents: list[str], seed: int = 0) -> list[str]:
    """The documents, out of order, with exact and near duplicates of some among them."""
    rnd = random.Random(seed)
    count = round(PLANTED * len(documents))
    again = rnd.sample(documents, 2 * count)
    found = documents + again[:count] + [_changed(text, rnd) for text in again[count:]]
    rnd.shuffle(found)
    return found


def _changed(text: str, rnd: random.Random) -> str:
    words = text.split(" ")
    for place in rnd.sample(range(len(words)), max(1, len(words) // 300)):
        words[place] = f"other{rnd.randrange(10**6)}"
    return " ".join(words)


def write(documents: list[str], directory: Path, files: int) -> int:
    """JSON lines, in so many files; the bytes of text."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        records = (json.dumps({"id": str(place), "text": documents[place]}) for place in range(number, len(documents), files))
        (directory / f"{number:02d}.jsonl").write_text("".join(f"{record}\n" for record in records))
    return sum(len(document.encode("utf-8", "replace")) for document in documents)
