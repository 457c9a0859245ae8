"""Stack Exchange: Posts.xml of a site's dump, questions with their answers.

A question's answers come anywhere after it, so the posts go into a temporary database first, a file of about the dump's size in
the system's directory for these (TMPDIR); then the questions follow in the order of their numbers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from typing import NamedTuple

from shards.common.errors import SpecError
from shards.readers.base import DAMAGED, ReadPosition, Record, Rejected, Unit, shown
from shards.readers.compressed import DAMAGE
from shards.readers.files import InputFile, stream
from shards.readers.markup import text_of
from shards.readers.xmlstream import Element, XMLDamage, elements
from shards.spec import Source
from shards.tokenization.records import Document

SUFFIXES = ("posts.xml",)
QUESTION, ANSWER = "1", "2"  # PostTypeId
_TABLE = "CREATE TABLE posts (question INTEGER, answer INTEGER, score INTEGER, accepted INTEGER, title TEXT, body TEXT)"
_ORDERED = "SELECT * FROM posts ORDER BY question, answer > 0, score DESC, answer"


class Post(NamedTuple):
    """A question, whose `answer` is 0, or one of its answers."""

    question: int
    answer: int
    score: int
    accepted: int  # number of the accepted answer; 0: none
    title: str
    body: str  # HTML

    def text(self) -> str:
        """Title and body in plain text."""
        return "\n\n".join(part for part in (self.title.strip(), text_of(self.body)) if part)


def units(source: Source, found: list[InputFile]) -> list[Unit]:
    """The dumps."""
    for each in found:
        if each.path.endswith(".7z"):
            raise SpecError(f'source "{source.name}": {each.path}: .7z is not read (unpack it with 7z x, then give its Posts.xml)')
    return [Unit(each.path, each.size, (each.path,)) for each in found]


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """A dump's questions."""
    for path in unit.paths:
        with closing(sqlite3.connect("")) as posts:  # "": in a temporary file, which goes with the connection
            posts.execute("PRAGMA journal_mode = OFF")
            posts.execute(_TABLE)
            damage: Rejected | None = None
            try:
                with stream(path, reading) as file:
                    for row in elements(file, ("row",)):
                        if row.attributes.get("PostTypeId") in (QUESTION, ANSWER):  # the others are wikis of tags, elections, ...
                            post = _post(path, row)
                            if isinstance(post, Rejected):
                                yield post
                            else:
                                posts.execute("INSERT INTO posts VALUES (?, ?, ?, ?, ?, ?)", post)
            except (*DAMAGE, XMLDamage) as error:
                damage = Rejected(path, DAMAGED, shown(str(error)), rest=True)
            for number, thread in groupby(map(Post._make, posts.execute(_ORDERED)), key=lambda post: post.question):
                yield from _documents(f"{path}: {number}", list(thread), source)
            if damage is not None:
                yield damage


def _post(path: str, row: Element) -> Post | Rejected:
    told = row.attributes
    try:
        number, score, accepted = int(told["Id"]), int(told.get("Score", 0)), int(told.get("AcceptedAnswerId", 0))
        question = number if told["PostTypeId"] == QUESTION else int(told["ParentId"])
    except (KeyError, ValueError) as error:
        return Rejected(f"{path}: {told.get('Id', '?')}", "a post without its numbers", shown(str(error)))
    return Post(question, 0 if question == number else number, score, accepted, told.get("Title", ""), told.get("Body", ""))


def _documents(where: str, thread: list[Post], source: Source) -> Iterator[Record]:
    """Of a question and its answers, the best first."""
    question, *answers = thread
    if question.answer:
        for answer in thread:
            yield Rejected(f"{where}: {answer.answer}", "an answer whose question is not in the dump", shown(answer.body))
        return
    asked = question.text()
    if not asked:
        yield Rejected(where, "empty", "")
    elif source.kind == "text":
        parts = [f"## Answer (score {answer.score})\n\n{text}" for answer in answers if (text := answer.text())]
        yield Document(asked, ("\n\n".join([asked, *parts]) + "\n",), (), where)
    elif not answers:
        yield Rejected(where, "a question without answers", shown(asked))
    elif source.kind == "sft":
        best = next((answer for answer in answers if answer.answer == question.accepted), answers[0])
        yield Document(asked, (asked, best.text()), ("user", "assistant"), where)
    elif answers[0].score - answers[-1].score < source.score_margin:
        yield Rejected(where, "no two answers whose scores are far enough apart", shown(asked))
    else:
        chosen, rejected = answers[0].text(), answers[-1].text()
        same = Rejected(where, "both answers are the same", shown(asked))
        yield Document(asked, (asked, chosen, rejected), ("user",), where) if chosen != rejected else same
