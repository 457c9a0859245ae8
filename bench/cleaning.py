"""What a whole build that cleans costs, beside datatrove doing the same steps, and beside SentencePiece's encoding alone.

python -m bench.cleaning [--megabytes 20] [--rounds 3] [--ours]

The steps: read JSON lines, exact duplicates, near duplicates by MinHash, Gopher's two families of rules, C4's and FineWeb's,
encode, write. Two processes each, the same text (bench/_prose.py), and one tokenizer, trained before and brought along to
both: as a SentencePiece model here, as the tokenizer.json that gives the same ids there. datatrove is installed into an
environment of the bench's own (bench/requirements-cleaning.txt) and splits words with spaCy, its default; it writes bare
tokens, where shards are compressed, checksummed and read back. SentencePiece's own speed is that of encoding the text that was
kept into lists of ids, with two threads and as two processes. Rounds are run in turn, their medians shown; MB are of UTF-8.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import msgspec
import sentencepiece
from rich.console import Console
from rich.table import Table

from bench import _prose
from bench._peers import HERE, environment
from shards.filters.heuristics.families import C4, FineWeb, GopherQuality, GopherRepetition
from shards.format.corpus import Corpus
from shards.spec import Build, Clean, Data, Source
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.huggingface import from_sentencepiece
from shards.tokenization.tokenizer import Tokenizer, train

WORKERS = 2
FILES = 8
VOCAB = 32_000
STEPS = Clean(gopher_repetition=GopherRepetition(), gopher_quality=GopherQuality(), c4=C4(), fineweb=FineWeb(), chunk_bytes=1 << 21)


class Cost(msgspec.Struct):
    """Of one run, all of its processes."""

    wall: float  # seconds
    cpu: float
    steps: dict[str, float]  # wall seconds by step


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(spec: Path) -> Cost:
    """`midwatch shards build` from nothing; its steps as it reports them."""
    command = [sys.executable, "-m", "shards", "build", "--spec", str(spec), "--workers", str(WORKERS), "--json"]
    before, started = _children(), time.perf_counter()
    steps: dict[str, float] = {}
    step, since = "starting", started
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said, now = json.loads(line), time.perf_counter()
            steps[step] = steps.get(step, 0) + now - since
            step, since = said["message"] if said["phase"] == "clean" else said["phase"], now
    ended = time.perf_counter()
    steps["ending"] = ended - since
    if process.returncode:
        raise RuntimeError("the build failed")
    return Cost(ended - started, _children() - before, steps)


def theirs(texts: Path, out: Path, tokenizer: Path, python: Path) -> tuple[Cost, int, int]:
    """datatrove's run, and the documents and tokens that it kept."""
    command = [str(python), str(HERE / "_datatrove.py"), str(texts), str(out), str(tokenizer), str(WORKERS)]
    before, started = _children(), time.perf_counter()
    with (out.parent / "datatrove.log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=out.parent)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"datatrove failed:\n{(out.parent / 'datatrove.log').read_text()[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Cost(wall, _children() - before, said["seconds"]), said["documents"], said["tokens"]


def _encode(model: bytes, texts: list[str], begin: Barrier) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    begin.wait()
    processor.encode(texts)
    begin.wait()


def as_threads(model: bytes, texts: list[str]) -> Cost:
    """SentencePiece encoding the texts with a thread a core."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    started, before = time.perf_counter(), time.process_time()
    processor.encode(texts, num_threads=WORKERS)
    return Cost(time.perf_counter() - started, time.process_time() - before, {})


def as_processes(model: bytes, texts: list[str]) -> Cost:
    """The same as a process a core; the seconds do not count their beginning."""
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(WORKERS + 1)
    processes = [context.Process(target=_encode, args=(model, texts[number::WORKERS], begin)) for number in range(WORKERS)]
    for process in processes:
        process.start()
    begin.wait()
    started, before = time.perf_counter(), _children()
    begin.wait()
    wall = time.perf_counter() - started
    for process in processes:
        process.join()
    return Cost(wall, _children() - before, {})


def kept(out: Path) -> tuple[list[str], int]:
    """The texts of a build's shards, and their tokens."""
    tokenizer = Tokenizer.load(out / "tokenizer.model")
    corpora = [Corpus(out, "prose", split) for split in ("train", "held_out")]
    found = [tokenizer.decode(corpus.read(*corpus.span(number))) for corpus in corpora for number in range(corpus.documents)]
    return found, sum(corpus.tokens for corpus in corpora)


def prose(megabytes: float) -> list[str]:
    """Kept below .bench, as finding it takes a minute or two."""
    path = HERE.parent / ".bench" / f"prose-{megabytes:g}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(_prose.texts(int(megabytes * 1e6))))
    found: list[str] = json.loads(path.read_text())
    return found


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cleaning")
    parser.add_argument("--megabytes", type=float, default=20, help="of text, before duplicates are planted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="without datatrove")
    options = parser.parse_args()
    python = None if options.ours else environment(HERE / "requirements-cleaning.txt")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        single = prose(options.megabytes)
        documents = _prose.planted(single)
        size = _prose.write(documents, place / "texts", FILES) / 1e6
        model = train(single, vocab=VOCAB)
        (place / "brought.model").write_bytes(model)
        reserved = {number: called for called, number in Tokenizer(model).reserved.items()}
        (place / "tokenizer.json").write_text(json.dumps(from_sentencepiece(model, reserved)))
        source = Source(name="prose", kind="text", origin="jsonl", path=str(place / "texts"))
        data = Data(source=(source,), clean=STEPS)
        tokenizer = TokenizerSpec(path=str(place / "brought.model"))
        (place / "spec.json").write_bytes(msgspec.json.encode(Build(data=data, tokenizer=tokenizer, out=str(place / "shards"))))

        costs: dict[str, list[Cost]] = {who: [] for who in ("ours", "threads", "processes", "datatrove")}
        documents_left, tokens_left = 0, 0
        for _ in range(options.rounds):
            shutil.rmtree(place / "shards", ignore_errors=True)
            costs["ours"].append(ours(place / "spec.json"))
            texts, tokens = kept(place / "shards")
            costs["threads"].append(as_threads(model, texts))
            costs["processes"].append(as_processes(model, texts))
            if python is not None:
                shutil.rmtree(place / "datatrove", ignore_errors=True)
                cost, documents_left, tokens_left = theirs(place / "texts", place / "datatrove", place / "tokenizer.json", python)
                costs["datatrove"].append(cost)

    remained = sum(len(text.encode()) for text in texts) / 1e6
    about = f"{size:.1f} MB in {len(documents)} documents, {remained:.1f} MB in {len(texts)} kept, {WORKERS} workers"
    table = Table(title=f"A whole build: {about}; medians of {options.rounds} rounds in turn")
    for column in ("what", "wall s", "CPU s", "MB/s", "beside", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    middle = {who: Cost(*(statistics.median(values) for values in zip(*((c.wall, c.cpu) for c in of), strict=True)), {})
              for who, of in costs.items() if of}  # fmt: skip
    build = middle["ours"]
    table.add_row(f"shards, {tokens:,} tokens", f"{build.wall:.2f}", f"{build.cpu:.2f}", f"{size / build.wall:.2f}", "", "")
    for step in costs["ours"][0].steps:
        wall = statistics.median(cost.steps.get(step, 0.0) for cost in costs["ours"])
        table.add_row(f"  {step}", f"{wall:.2f}", "", f"{size / wall:.1f}", "", "")
    for way in ("threads", "processes"):
        cost = middle[way]
        ratios = f"build {size / build.wall / (remained / cost.wall):.2f} x, CPU {size / build.cpu / (remained / cost.cpu):.2f} x"
        speed = f"{remained / cost.wall:.2f}"
        fastest = cost.wall == min(middle["threads"].wall, middle["processes"].wall)
        label = f"SentencePiece alone, {WORKERS} {way}"
        table.add_row(label, f"{cost.wall:.2f}", f"{cost.cpu:.2f}", speed, ratios, "0.6" if fastest else "")
    if "datatrove" in middle:
        peer = middle["datatrove"]
        label = f"datatrove, {tokens_left:,} tokens in {documents_left} documents"
        beside = f"build {peer.wall / build.wall:.1f} x, CPU {peer.cpu / build.cpu:.1f} x"
        table.add_row(label, f"{peer.wall:.2f}", f"{peer.cpu:.2f}", f"{size / peer.wall:.2f}", beside, "4")
        for step in costs["datatrove"][0].steps:
            wall = statistics.median(cost.steps[step] for cost in costs["datatrove"])
            table.add_row(f"  {step}", f"{wall:.2f}", "", f"{size / wall:.1f}", "", "")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
