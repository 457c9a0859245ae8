"""Step `make`: long documents of the clean ones of other sources, a chunk of those at a time, each marked as made.

What is held out and what is trained on are never put together: what is made of held-out documents is held out itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from shards.build.checksummed_files import save_bytes
from shards.build.chunks import DocumentChunk, DocumentChunkWriter, StoredDocument, size_of
from shards.build.encode import MADE
from shards.build.filter_stats import Count, Funnel
from shards.build.workspace import Name, ReadUnit, Work
from shards.spec import Source

Task = tuple[int, int, int, int, int]  # made source, place of its chunk, and the chunk that it is made of


class Make:
    """One task a made source and a chunk that it is made of; it ends with the marker that makes its own chunk known."""

    name = "make"
    about = "making long documents"

    def tasks(self, work: Work) -> list[Task]:
        found: list[Task] = []
        for number, source in enumerate(work.sources):
            if source.origin == "made":
                of = [name for name in work.chunks if work.sources[name.source].name in source.of]
                found += [(number, place, *name) for place, name in enumerate(of)]
        return found

    def weight(self, work: Work, task: Task) -> int:
        return work.all_sizes[Name(*task[2:])]

    def output(self, work: Work, task: Task) -> Path:
        return work.path("read", f"{task[0]:03d}-{task[1]:06d}", ".json")

    def do(self, work: Work, task: Task) -> None:
        source, own, of = work.sources[task[0]], Name(task[0], task[1], 0), Name(*task[2:])
        documents = list(DocumentChunk(work.path("clean", of, ".docs")))
        share = work.build.data.held_out * 2**64
        held = [each.document().hashed(work.build.seed) < share for each in documents]
        funnel = Funnel({"made": Count()})
        with DocumentChunkWriter(work.path("clean", own, ".docs")) as writer:
            for key in MADE:
                parts = [each for each, apart in zip(documents, held, strict=True) if apart == (key == "held out")]
                seed = xxhash.xxh3_64_intdigest(f"{source.name} {own} {key}".encode(), seed=work.build.seed)
                for made in _make(source, parts, key, seed):
                    size = size_of(made)
                    writer.add(made, size)
                    funnel.passed("made", size)
                    funnel.tell("made", made.label, size)
            writer.close()
        save_bytes(work.path("clean", own, ".json"), msgspec.json.encode(funnel))
        save_bytes(work.path("read", f"{task[0]:03d}-{task[1]:06d}", ".rejected.jsonl"), b"")
        chunks = [(writer.documents, writer.text_bytes)] if writer.documents else []
        save_bytes(self.output(work, task), msgspec.json.encode(ReadUnit(chunks, {})))


def _make(source: Source, documents: list[StoredDocument], key: str, seed: int) -> Iterator[StoredDocument]:
    from shards.filters import long_documents

    def where(parts: tuple[int, ...]) -> str:
        shown = [documents[part].where or "?" for part in parts[:4]]
        return f"made of {', '.join(shown)}" + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")

    if source.made == "conversations":
        chats = [list(zip(each.roles or ("user", "assistant"), each.parts, strict=True)) for each in documents]
        for joined in long_documents.join_conversations(chats, source.characters):
            roles, said = zip(*joined.messages, strict=True)
            masked, start = [], 0
            for part in joined.parts:
                masked += [start + at for at in documents[part].masked]
                start += len(documents[part].parts)
                if any(not ended for _, ended in documents[part].sampled):  # something follows it now: its end is not its own
                    masked.append(start - 1)
            yield StoredDocument(key, said, roles, where(joined.parts), joined.label, tuple(masked))
        return
    texts = [each.parts[0] for each in documents]
    if source.made == "related":
        found = long_documents.join_related(texts, source.characters)
    else:
        found = long_documents.make_tasks(texts, source.characters, len(texts), seed)
    for made in found:
        yield StoredDocument(key, (made.text,), (), where(made.parts), made.label)
