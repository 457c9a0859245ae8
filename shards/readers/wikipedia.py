"""Wikipedia: MediaWiki's XML dumps, a page of the encyclopedia's own namespace a document, in clean text."""

from __future__ import annotations

from collections.abc import Iterator

from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, shown
from shards.readers.compressed import DAMAGE
from shards.readers.files import stream
from shards.readers.wikitext import Namespaces, plain
from shards.readers.xmlstream import Element, XMLDamage, elements
from shards.spec import Source
from shards.tokenization.records import Document

SUFFIXES = (".xml",)
KINDS = ("text",)
OPTIONS = ("suffixes",)
FILE, CATEGORY, MEDIA = "6", "14", "-2"  # numbers of namespaces, the same in every language's wiki


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """The pages of a dump; of one with their history the last revision."""
    for path in unit.paths:
        spaces = Namespaces()
        try:
            with stream(path, reading) as file:
                for element in elements(file, ("page", "namespace")):
                    if element.name == "namespace":
                        spaces = _with(spaces, element)
                    else:
                        yield _page(path, element, spaces)
        except (*DAMAGE, XMLDamage) as error:
            yield Rejected(path, DAMAGED, shown(str(error)), rest=True)


def _with(spaces: Namespaces, element: Element) -> Namespaces:
    """The dump's own names of namespaces, as they are in its language."""
    name, key = element.texts[""].strip(), element.attributes.get("key")
    if name and key in (FILE, MEDIA):
        return Namespaces(spaces.files | {name.lower()}, spaces.categories)
    if name and key == CATEGORY:
        return Namespaces(spaces.files, spaces.categories | {name.lower()})
    return spaces


def _page(path: str, page: Element, spaces: Namespaces) -> Record:
    title = page.texts.get("title", "").strip()
    where = f"{path}: {title}"
    if page.too_long:
        return Rejected(where, f"longer than {LONGEST_RECORD >> 20} MiB", title)
    if page.texts.get("ns", "0").strip() != "0":
        return Rejected(where, "not an article (another namespace)", title)
    if "redirect" in page.texts:
        return Rejected(where, "redirect", title)
    form = page.texts.get("revision/format", "text/x-wiki").strip()
    if form not in ("", "text/x-wiki"):
        return Rejected(where, "not wikitext", form)
    text = plain(page.texts.get("revision/text", ""), spaces)
    if not text:
        return Rejected(where, "empty", title)
    return Document(title, (f"# {title}\n\n{text}\n",), (), where)
