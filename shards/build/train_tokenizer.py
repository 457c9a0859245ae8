"""The tokenizer of a build: trained on a sample of its documents, or copied from the file that the spec names."""

from __future__ import annotations

from pathlib import Path

from shards.build.marker import read_marker, write_marker
from shards.build.streams import documents
from shards.build.workspace import Work
from shards.common.errors import ShardError
from shards.common.files import write_atomically
from shards.common.progress import ProgressMeter
from shards.readers.splits import divide
from shards.tokenization.encode import Workers
from shards.tokenization.records import Document
from shards.tokenization.templates import FILE_NAME as TEMPLATE_FILE
from shards.tokenization.templates import kept, read
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer, read_model


def make_tokenizer(work: Work, pool: Workers, meter: ProgressMeter) -> Tokenizer:
    """Make OUT/tokenizer.model if it is not there yet, and hand it to the workers.

    Raises ShardError where the file is not the one that this build made.
    """
    spec, out = work.build, Path(work.build.out)
    path = out / TOKENIZER_FILE
    is_new = not path.exists()
    if is_new:
        template = read(spec.tokenizer)
        if spec.tokenizer.path is not None:
            model = read_model(Path(spec.tokenizer.path))
            Tokenizer(model, spec.tokenizer.path, template)
        else:
            sample = _sample(work, meter)
            meter.begin("tokenizer", f"training on {sum(map(len, sample)) / 1e6:.1f} MB of text")
            model = pool.train(sample, spec.tokenizer.vocab, spec.tokenizer.kind, template)
        if not template.is_default:
            write_atomically(path.with_name(TEMPLATE_FILE), template.encoded())
        write_atomically(path, model)
    tokenizer = Tokenizer.load(path)
    marker = read_marker(out)
    known = "" if marker is None or is_new else marker.tokenizer
    if known not in ("", tokenizer.hash):
        raise ShardError(f"{path}: not the tokenizer that this build made (put it back, or delete {out} and check this disk)")
    if not known:
        write_marker(spec, out, tokenizer=tokenizer.hash)
    pool.use(path.read_bytes(), kept(path))
    meter.begin("tokenizer", f"{tokenizer.vocab} ids", "ids", tokenizer.vocab, tokenizer.vocab)
    return tokenizer


def _sample(work: Work, meter: ProgressMeter) -> list[str]:
    """Text to train the tokenizer on: an equal part from each source, of its training documents only."""
    spec = work.build
    sample: list[str] = []
    part = -(-spec.tokenizer.sample_bytes // len(spec.data.source))
    for number, source in enumerate(spec.data.source):
        meter.begin("read", source.name, "bytes", part)
        size = 0
        for _, record, held_out in divide(source, spec.data.held_out, spec.seed, documents(work, number)):
            if isinstance(record, Document) and held_out is False:
                sample += record.parts
                size += sum(map(len, record.parts))
                meter.update(size, part)
                if size >= part:
                    break
    return sample
