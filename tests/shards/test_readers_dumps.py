"""Dumps: MediaWiki's pages, Stack Exchange's posts and Project Gutenberg's books, as they are published, to exact text."""

from __future__ import annotations

import bz2
import json
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import pytest

from shards.common.errors import SpecError
from shards.readers.base import DAMAGED
from shards.readers.markup import text_of
from shards.readers.sources import Rejected, read_unit, units
from shards.readers.wikitext import plain
from shards.spec import Source
from shards.tokenization.records import Document


def read(path: Path, origin: str, **more: Any) -> tuple[list[Document], list[Rejected]]:
    source = Source(**{"name": "own", "kind": "text", "origin": origin, "path": str(path), **more})
    records = [record for unit in units(source) for record in read_unit(source, unit)]
    return [each for each in records if isinstance(each, Document)], [each for each in records if isinstance(each, Rejected)]


ARTICLE = """{{short description|River in Europe}}
{{Infobox river
| name = Aare
| image = [[File:Aare.jpg|thumb|{{lang|de|Bern}}]]
| length = {{convert|288|km|mi}}
}}
[[File:Aare in Bern.jpg|thumb|right|The Aare in [[Bern]], seen from the [[Nydegg]] bridge]]
The '''Aare''' ({{IPA|de|ˈaːrə}}) or ''Aar'' is a [[tributary]] of the [[High Rhine|Rhine]].<ref name="a">{{cite web|url=http://x.y}}</ref>
It is the longest river<!-- wholly --> within [[Switzerland]].<ref name="a" />

== Course ==
It rises in the [[Aare Glaciers]]&nbsp;of the [[Bernese Alps]]:
* [[Lake Brienz]]
* ''[[Lake Thun]]''
# first &amp; last

=== Towns ===
{| class="wikitable"
! Town !! Canton
|-
| Thun || {{flag|Bern}}
|}
Its flow is <math>Q = v \\cdot A</math> in <code>m³/s</code>.<br />See [http://www.example.org the gauge] or [https://bare.example].

== See also ==
=== Empty ===
{{Portal|Rivers}}

== References ==
{{Reflist}}
<references />

[[Category:Rivers of Switzerland]]
[[de:Aare]]
[[:Category:Rivers]]
"""
PLAIN = """The Aare or Aar is a tributary of the Rhine.
It is the longest river within Switzerland.

## Course

It rises in the Aare Glaciers of the Bernese Alps:
- Lake Brienz
- Lake Thun
- first & last

### Towns

Its flow is $Q = v \\cdot A$ in m³/s.
See the gauge or .

## References

Category:Rivers"""


def test_an_article_comes_out_as_its_text() -> None:
    assert plain(ARTICLE) == PLAIN


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("{{a|{{b|{{c}}}}}}x", "x"),
        ("open {{template\n\nand on", "open {{template\n\nand on"),
        ("stray }} and |} and ]]", "stray }} and |} and ]]"),
        ("an [[open link", "an open link"),
        ("{|\n| {{cell\n|}\nafter", "after"),
        ("<ref>never closed. Text.", "never closed. Text."),
        ("<nowiki>'''not bold''' [[x]]</nowiki>", "'''not bold''' [[x]]"),
        ("<pre>\n# {{a}}\n## b\n</pre>", "```\n# {{a}}\n## b\n```"),
        ("<source lang='c'>a = b[[0]];</source>", "`a = b[[0]];`"),
        ("[[Datei:x.jpg|mini|Ein Bild]]Text", "Text"),
        ("A [[Fail: A Story|fail story]] of [[Medium: Rare|medium]] length", "A fail story of medium length"),
        (
            "[[Bild:x.jpg|thumb|Ein [[Haus]]]] [[圖像:x.png|縮圖|橋]] [[Изображение:x.jpg|Мост]] [[Tập_tin:x.jpg|Cầu]]Text",
            "Text",
        ),
        ("[[ image:x.jpg|thumb|A bridge]] [[\u200eملف:x.jpg|تصغير|جسر]] [[Média:x.ogg|un son]]Text", "Text"),
        ("[[分類:橋]] [[Kategorie:Brücke]]Text", "Text"),
        ("[[Star Wars: Bild|a film]] [[:File:x.jpg|its page]] [[Image (mathematics)|image]]", "a film its page image"),
        ("'''''both''''' it''s", "both its"),
        ("== = ==\ntext", "text"),
        ("<gallery>\nFile:a.jpg|A\n</gallery>end", "end"),
        ("a<!-- b", "a"),
        ("; term\n: definition", "term\ndefinition"),
        ("&lt;tag&gt; &amp;amp;", "<tag> &amp;"),
        ("-{zh-hans:软件;zh-hant:軟體}-", "软件"),
        ("[[a|b|c]] [[Help:x|]]", "c Help:x"),
        ("", ""),
    ],
)
def test_markup_that_is_nested_broken_or_protected(markup: str, text: str) -> None:
    assert plain(markup) == text


def test_broken_markup_takes_time_in_proportion_to_its_length() -> None:
    for unit in ("{{", "[[a|", "<ref>", "<!--", "{|\n", "== a ==\n", "''", "(, ", "]]", "<math>", "-{", "[http://a "):
        started = time.perf_counter()
        plain(unit * (1_000_000 // len(unit)))
        assert time.perf_counter() - started < 8, unit


def page(title: str, text: str, ns: int = 0, more: str = "", revisions: tuple[str, ...] = ()) -> str:
    said = "".join(
        f"<revision><id>1</id><timestamp>2024-01-01T00:00:00Z</timestamp><model>wikitext</model><format>text/x-wiki</format>"
        f'<text bytes="{len(each)}" xml:space="preserve">{escape(each)}</text></revision>'
        for each in (*revisions, text)
    )
    return f"<page><title>{escape(title)}</title><ns>{ns}</ns><id>5</id>{more}{said}</page>\n"


HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
<siteinfo><sitename>Wikipedia</sitename><namespaces><namespace key="0" case="first-letter" />
<namespace key="6" case="first-letter">Datei</namespace><namespace key="14" case="first-letter">Kategorie</namespace>
</namespaces></siteinfo>
"""


def dump(*pages: str) -> bytes:
    return (HEAD + "".join(pages) + "</mediawiki>").encode()


def test_a_dump_gives_its_articles_and_counts_the_rest(tmp_path: Path) -> None:
    pages = [
        page("Aare & Rhein", "[[Datei:a.jpg|mini|Bild]]'''Die Aare'''.[[Kategorie:Fluss]]", revisions=("alt, [[falsch]]",)),
        page("Aar", "#REDIRECT [[Aare]]", more='<redirect title="Aare" />'),
        page("Diskussion:Aare", "Wie lang?", ns=1),
        page("Leer", "{{Vorlage}}"),
        page("日本", "日本は[[島国]]である。"),
    ]
    whole = dump(*pages)
    # As published: a multistream file, of several bz2 streams.
    (tmp_path / "dewiki.xml.bz2").write_bytes(bz2.compress(whole[:900]) + bz2.compress(whole[900:]))
    found, rejected = read(tmp_path, "wikipedia")
    assert [(each.key, each.parts[0]) for each in found] == [
        ("Aare & Rhein", "# Aare & Rhein\n\nDie Aare.\n"),
        ("日本", "# 日本\n\n日本は島国である。\n"),
    ]
    assert [each.reason for each in rejected] == ["redirect", "not an article (another namespace)", "empty"]


def test_a_dump_that_ends_early_gives_what_it_has(tmp_path: Path) -> None:
    whole = dump(page("One", "First."), page("Two", "Second."))
    (tmp_path / "w.xml").write_bytes(whole[: whole.index(b"Second")])
    found, rejected = read(tmp_path / "w.xml", "wikipedia")
    assert [each.key for each in found] == ["One"] and [(each.reason, each.rest) for each in rejected] == [(DAMAGED, True)]


def test_a_dump_that_declares_entities_is_refused(tmp_path: Path) -> None:
    """Else a few lines of it could become gigabytes."""
    (tmp_path / "w.xml").write_text(
        '<!DOCTYPE m [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><mediawiki>' + page("A", "x") + "</mediawiki>"
    )
    found, rejected = read(tmp_path / "w.xml", "wikipedia")
    assert not found and "declares entities" in rejected[0].record and rejected[0].rest


PEAK = """
import json, sys
from shards.readers.sources import read_unit, units
from shards.spec import Source
source = Source(name="a", kind="text", origin=sys.argv[2], path=sys.argv[1])
unit, = units(source)
reasons = [getattr(record, "reason", "") for record in read_unit(source, unit)]
# Not by getrusage, which counts what the process that started this one held.
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) >> 10
print(json.dumps([reasons, peak()]))
"""


PAGE = b"<mediawiki><page><title>A</title><revision><text>", b"</text></revision></page></mediawiki>"
ROW = b'<posts><row Id="1" PostTypeId="1" Body="', b'"/></posts>'


@pytest.mark.parametrize(
    ("origin", "around", "reason"), [("wikipedia", PAGE, "longer than 64 MiB"), ("stackexchange", ROW, DAMAGED)]
)
def test_a_dump_that_is_a_bomb_takes_bounded_memory(tmp_path: Path, origin: str, around: tuple[bytes, bytes], reason: str) -> None:
    path = tmp_path / "Posts.xml.bz2"
    path.write_bytes(bz2.compress(around[0]) + bz2.compress(b"a" * (60 << 20)) * 8 + bz2.compress(around[1]))
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), origin], capture_output=True, text=True, check=True)
    told, memory = json.loads(done.stdout)
    assert told == [reason] and memory < 450


def post(number: int, kind: int, body: str, score: int = 0, **more: Any) -> str:
    told = {"Id": number, "PostTypeId": kind, "Score": score, "Body": body, **more}
    packed = {key: escape(str(value)).replace("\n", "&#xA;") for key, value in told.items()}
    return "  <row " + " ".join(f'{key}="{value}"' for key, value in packed.items()) + " />\n"


QUESTION = "<p>How do I <em>reverse</em> a list?</p>\n\n<pre><code>a = [1, 2]\n</code></pre>\n"
POSTS = [
    post(
        1,
        1,
        "<p>How do I <em>reverse</em> a list?</p>\n\n<pre><code>a = [1, 2]\n</code></pre>\n",
        9,
        Title="Reversing",
        AcceptedAnswerId=3,
    ),
    post(2, 2, "<p>Use <code>a[::-1]</code> &amp; be done.</p>", 12, ParentId=1),
    post(4, 1, "<p>Nobody knows?</p>", 1, Title="Alone"),
    post(3, 2, "<p>Call:</p>\n<pre class='lang-py'><code>a.reverse()\n\n\nprint(a &lt; b)</code></pre>", 5, ParentId=1),
    post(5, 2, "<p>Why?</p>", -3, ParentId=1),
    post(6, 5, "<p>A tag's wiki</p>"),
    post(7, 2, "<p>Lost</p>", 1, ParentId=999),
]
ASKED = "Reversing\n\nHow do I reverse a list?\n\n```\na = [1, 2]\n```"
FIRST, SECOND = "Use `a[::-1]` & be done.", "Call:\n\n```\na.reverse()\n\n\nprint(a < b)\n```"


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    path = tmp_path / "Posts.xml"
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "".join(POSTS) + "</posts>", encoding="utf-8")
    return path


def test_questions_come_with_their_answers_by_score(posts: Path) -> None:
    found, rejected = read(posts.parent, "stackexchange")
    assert [each.parts[0] for each in found] == [
        f"{ASKED}\n\n## Answer (score 12)\n\n{FIRST}\n\n## Answer (score 5)\n\n{SECOND}\n\n## Answer (score -3)\n\nWhy?\n",
        "Alone\n\nNobody knows?\n",
    ]
    assert [each.reason for each in rejected] == ["an answer whose question is not in the dump"]


def test_the_accepted_answer_is_learned_from_and_the_best_is_preferred_to_the_worst(posts: Path) -> None:
    (chat,), rejected = read(posts, "stackexchange", kind="sft")
    assert chat.parts == (ASKED, SECOND) and chat.roles == ("user", "assistant")
    assert sorted(each.reason for each in rejected)[0] == "a question without answers"
    (pair,), _ = read(posts, "stackexchange", kind="preference", score_margin=15)
    assert pair.parts == (ASKED, FIRST, "Why?") and pair.roles == ("user",) and pair.key == chat.key
    none, rejected = read(posts, "stackexchange", kind="preference", score_margin=16)
    assert not none and "no two answers whose scores are far enough apart" in {each.reason for each in rejected}


def test_a_packed_dump_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "site.7z").write_bytes(b"7z\xbc\xaf")
    with pytest.raises(SpecError, match="unpack it with 7z x"):
        read(tmp_path / "site.7z", "stackexchange")


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<ul><li>a<ul><li>b</li></ul></li><li><p>c</p></li></ul>", "- a\n  - b\n- c"),
        ("<ol><li>one</li><li>two</li></ol>", "1. one\n2. two"),
        ("<blockquote><p>said</p>\n<p>so</p></blockquote><p>x</p>", "> said\n>\n> so\n\nx"),
        ("<h2>T</h2>a<br>b", "## T\n\na\nb"),
        ("<p>a <a href='x'>link</a> <img src='y'> end</p>", "a link end"),
        ("<p>unclosed <b>bold<p>next &nbsp; &#128512;", "unclosed bold\n\nnext \xa0 😀"),
        ("a < b && c > d", "a < b && c > d"),
    ],
)
def test_html_of_posts_becomes_text(markup: str, text: str) -> None:
    assert text_of(markup) == text


BOOK = "CHAPTER I\n\nIt was the best of times.\n\n[Illustration: A coach]\n\nThe end of the Project was near."
START, END = "*** START OF THE PROJECT GUTENBERG EBOOK A TALE", "*** END OF THE PROJECT GUTENBERG EBOOK A TALE"
SMALL_PRINT = "THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*"
MARKERS = {  # as in files of the time
    "since 2000": (
        f"The Project Gutenberg EBook of A Tale\n\nTitle: A Tale\n\nLanguage: English\n\n{START} ***\n\n\n\n"
        "Produced by Judith Boss and\nDavid Widger\n\n\n",
        f"\n\n\nEnd of the Project Gutenberg EBook of A Tale, by X\n\n{END} ***\n\nUpdated editions",
    ),
    "this, no blanks": (
        "Project Gutenberg's A Tale, by X\n\nTitle: A Tale\n\n***START OF THIS PROJECT GUTENBERG EBOOK A TALE***\n\n\n"
        "E-text prepared by Y\n\n\n",
        "\n\n***END OF THIS PROJECT GUTENBERG EBOOK A TALE***\n\n\n******* This file should be named",
    ),
    "a title of two lines": (
        f"The Project Gutenberg eBook\n\nTitle: A Tale\n\n{START} OF\nTWO CITIES AND MORE ***\n\n",
        f"\n\n{END} OF\nTWO CITIES AND MORE ***\nlicence",
    ),
    "1994": (
        "***The Project Gutenberg Etext of A Tale***\n\nTitle: A Tale\n\n*SMALL PRINT!*\nWhy is this here\n"
        f"*END*{SMALL_PRINT}\n\n\n",
        "\n\nEnd of The Project Gutenberg Etext of A Tale\n",
    ),
    "1997": (
        f"Project Gutenberg's Etext of A Tale\n\nTitle: A Tale\n\n*END {SMALL_PRINT}\n\n",
        "\n\nEnd of Project Gutenberg's A Tale, by X\n\n***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nmore",
    ),
}
NOTES = [
    "[Transcriber's Note: Spelling was kept,\nand so were errors.]\n",
    "Transcriber's note: The original had plates.\nThey are left out.\n",
    "+---------------------+\n| Transcriber's Note: |\n|                     |\n| Kept as it was.     |\n+---------------------+\n",
]


@pytest.mark.parametrize("era", MARKERS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_book_is_left_of_every_eras_header_and_licence(tmp_path: Path, era: str, ends: str) -> None:
    head, tail = MARKERS[era]
    (tmp_path / "1.txt").write_bytes((head + BOOK + tail).replace("\n", ends).encode())
    (book,), rejected = read(tmp_path, "gutenberg")
    assert book.parts[0] == BOOK + "\n" and book.key == "A Tale" and rejected == []
    assert book.label == ("English" if era == "since 2000" else "")


@pytest.mark.parametrize("note", NOTES)
def test_a_transcribers_notes_are_left_out(tmp_path: Path, note: str) -> None:
    head, tail = MARKERS["since 2000"]
    (tmp_path / "1.txt").write_text(head + note + "\n\n" + BOOK + tail)
    (book,), _ = read(tmp_path, "gutenberg")
    assert re.sub(r"\A\s+", "", book.parts[0]) == BOOK + "\n"


def test_the_encoding_that_a_header_names_is_believed_and_a_header_without_end_is_told(tmp_path: Path) -> None:
    head, tail = MARKERS["since 2000"]
    named = head.replace("Language", "Character set encoding: ISO-8859-1\n\nLanguage")
    (tmp_path / "a.txt").write_bytes((named + "Ein schöner Käse." + tail).encode("latin-1"))
    (tmp_path / "b.txt").write_bytes((head + "Ein schöner Käse." + tail).encode("latin-1"))
    (tmp_path / "c.txt").write_text("The Project Gutenberg EBook of Nothing\n\nand then it stops")
    (tmp_path / "d.txt").write_text("A book from elsewhere.\n")
    found, rejected = read(tmp_path, "gutenberg")
    assert [each.parts[0] for each in found] == ["Ein schöner Käse.\n", "A book from elsewhere.\n"]
    assert [each.reason for each in rejected] == ["not UTF-8", "a Project Gutenberg header that has no end"]
