"""The commands over shards: build, inspect, verify, cat, stats; for `python -m shards` and for `midwatch shards`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from shards.errors import BusyError, ShardError, SpecError

BUSY = 75  # exit status: another build holds the directory; try again later
PARENT_LOOK = 0.5  # seconds between looks whether the parent still lives


class Stopped(BaseException):
    """The build was asked to end, or nobody is left to read its progress."""


def add_commands(subparsers: Any) -> None:
    """Add the commands to `parser.add_subparsers()`; each sets `shards_command` to its function."""

    def add(name: str, function: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(name, help=about, description=about)
        parser.set_defaults(shards_command=function)
        parser.add_argument("--json", action="store_true", help="JSON, for scripts")
        return parser

    build = add("build", _build, "build shards from a spec, or go on building them")
    build.add_argument("--spec", required=True, metavar="FILE", help="the spec, as JSON; - reads it from stdin")
    build.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: one a core, at most 8)")
    inspect = add("inspect", _inspect, "show what shards hold")
    inspect.add_argument("path", help="a directory of shards")
    verify = add("verify", _verify, "check every byte of shards")
    verify.add_argument("path", help="a directory of shards")
    verify.add_argument("--quick", action="store_true", help="look only at sizes and seek tables")
    cat = add("cat", _cat, "print the text of a document or of a range of tokens")
    cat.add_argument("path", help="a directory of shards")
    cat.add_argument("--source", help="the source (default: the only or first one)")
    cat.add_argument("--split", choices=("train", "held_out"), default="train")
    what = cat.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, metavar="N", help="document N, from 0")
    what.add_argument("--tokens", metavar="A:B", help="tokens A to B, B not included")
    cat.add_argument("--ids", action="store_true", help="token ids instead of text")
    stats = add("stats", _stats, "count tokens, documents, lengths and sizes")
    stats.add_argument("path", help="a directory of shards")


def run(args: argparse.Namespace) -> int:
    """Run a parsed command. Exit status: 0 well, 1 failed, damaged or stopped, 2 asked wrongly, 75 busy."""
    try:
        command: Callable[[argparse.Namespace], int] = args.shards_command
        return command(args)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return BUSY
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the interpreter flushes it once more at exit
        return 1


def _build(args: argparse.Namespace) -> int:
    from shards.build import build
    from shards.progress import Report, Screen, json_lines
    from shards.spec import decode_build

    try:
        raw = sys.stdin.buffer.read() if args.spec == "-" else Path(args.spec).read_bytes()
    except OSError as error:
        raise SpecError(f"{args.spec}: {error.strerror} (correct the path)") from None
    if args.workers is not None and args.workers < 0:
        raise SpecError(f"--workers is {args.workers} (use 0 or more)")
    spec = decode_build(raw, args.spec)
    try:
        with _stoppable(watch_parent=args.json):
            if args.json:
                lines = json_lines(sys.stdout)

                def report(progress: Any) -> None:
                    try:
                        lines(progress)
                    except BrokenPipeError:
                        raise Stopped from None

                build(spec, report, args.workers)
            else:
                with Screen() as screen:
                    shown: Report = screen
                    build(spec, shown, args.workers)
    except (Stopped, KeyboardInterrupt):
        print(f"stopped; the same command goes on from what {spec.out} has", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _stoppable(*, watch_parent: bool) -> Iterator[None]:
    """SIGTERM, and with `watch_parent` the parent's end, raise Stopped in the main thread."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    over = threading.Event()
    parent = os.getppid()

    def watch() -> None:
        while not over.wait(PARENT_LOOK):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="shards-parent-watch", daemon=True)
    if watch_parent:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if watch_parent:
            thread.join()
        signal.signal(signal.SIGTERM, before)


def _directories(path: Path) -> list[Path]:
    """The manifests' directories at or under `path`; ShardError if there are none."""
    from shards.manifest import FILE_NAME

    if (path / FILE_NAME).is_file():
        return [path]
    found = sorted(file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{FILE_NAME}"))
    if not found:
        raise SpecError(f"{path}: no shards here (give the directory that was built, or one of a source in it)")
    return found


def _inspect(args: argparse.Namespace) -> int:
    from shards.manifest import load

    found = [(directory, load(directory)) for directory in _directories(Path(args.path))]
    if args.json:
        _print_json([{"path": str(directory), **msgspec.to_builtins(manifest)} for directory, manifest in found])
        return 0
    rows = []
    for _, manifest in found:
        size = sum(column.bytes for shard in manifest.shards for column in shard.columns.values())
        rejected = sum(manifest.rejected.values())
        rows.append([
            manifest.source, manifest.split, manifest.kind, f"{manifest.documents:,}", f"{manifest.tokens:,}",
            f"{len(manifest.shards):,}", _size(size), f"{rejected:,}", manifest.digest[:12], manifest.origin,
        ])  # fmt: skip
    columns = ["source", "split", "kind", "documents>", "tokens>", "shards>", "size>", "left out>", "digest", "from"]
    _print_table(columns, rows)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from shards.manifest import verify

    bad = []
    directories = _directories(Path(args.path))
    for directory in directories:
        for message in verify(directory, full=not args.quick):
            bad.append(message)
            if not args.json:
                print(message, file=sys.stderr)
    if args.json:
        _print_json({"checked": [str(directory) for directory in directories], "bad": bad})
    elif not bad:
        print(f"whole: {len(directories)} manifests and all their shards")
    return 1 if bad else 0


def _cat(args: argparse.Namespace) -> int:
    from shards.corpus import Corpus, sources
    from shards.tokenizer import FILE_NAME, Tokenizer

    root = Path(args.path)
    known = sources(root, args.split)
    if not known:
        raise SpecError(f"{root}: no shards here (give the directory that was built)")
    name = args.source or known[0]
    if name not in known:
        raise SpecError(f'{root}: there is no source "{name}" (there are: {", ".join(known)})')
    corpus = Corpus(root, name, args.split)
    if args.document is not None:
        if not 0 <= args.document < corpus.documents:
            raise SpecError(f"{name} has documents 0 to {corpus.documents - 1}, not {args.document}")
        start, stop = corpus.span(args.document)
    else:
        start, stop = _range(args.tokens, corpus.tokens)
    ids = corpus.read(start, stop)
    tokenizer = Tokenizer.load(root / FILE_NAME)
    if args.json:
        text = tokenizer.decode(ids, reserved=True)
        _print_json({"source": name, "split": args.split, "start": start, "ids": ids.tolist(), "text": text})
    elif args.ids:
        print(*ids.tolist())
    else:
        print(tokenizer.decode(ids, reserved=True))
    return 0


def _range(text: str, tokens: int) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        start, stop = int(first or 0), int(last or tokens)
    except ValueError:
        raise SpecError(f"--tokens {text}: not a range (such as 1000:1200)") from None
    if not 0 <= start <= stop <= tokens:
        raise SpecError(f"--tokens {text}: outside 0:{tokens}")
    return start, stop


def _stats(args: argparse.Namespace) -> int:
    import numpy as np

    from shards.corpus import Corpus

    found: list[dict[str, Any]] = []
    for directory in _directories(Path(args.path)):
        corpus = Corpus(directory.parent.parent, directory.parent.name, directory.name)
        manifest = corpus.manifest
        size = sum(shard.columns["tokens"].bytes for shard in manifest.shards)
        lengths = corpus.lengths()
        quantiles = np.quantile(lengths, [0, 0.5, 0.9, 1]).astype(int).tolist() if len(lengths) else [0] * 4
        found.append({
            "source": manifest.source,
            "split": manifest.split,
            "tokens": manifest.tokens,
            "documents": manifest.documents,
            "text_bytes": manifest.text_bytes,
            "bytes_per_token": round(manifest.text_bytes / max(manifest.tokens, 1), 3),
            "compressed_bits_per_token": round(8 * size / max(manifest.tokens, 1), 2),
            "length_min_median_p90_max": quantiles,
            "rejected": manifest.rejected,
        })  # fmt: skip
    if args.json:
        _print_json(found)
        return 0
    rows = [
        [
            entry["source"], entry["split"], f"{entry['tokens']:,}", f"{entry['documents']:,}", _size(entry["text_bytes"]),
            f"{entry['bytes_per_token']:.2f}", f"{entry['compressed_bits_per_token']:.1f}",
            " ".join(f"{length:,}" for length in entry["length_min_median_p90_max"]),
            ", ".join(f"{reason}: {count:,}" for reason, count in entry["rejected"].items()) or "none",
        ]
        for entry in found
    ]  # fmt: skip
    columns = ["source", "split", "tokens>", "documents>", "text>", "bytes/token>", "bits/token on disk>"]
    _print_table([*columns, "document tokens: min, median, 90 %, max>", "left out"], rows)
    return 0


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _print_json(value: Any) -> None:
    print(msgspec.json.encode(value).decode())


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table; a column whose name ends in > is aligned right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # In a pipe there is no width to fit: a row stays one line.
    Console(width=None if console.is_terminal else 250).print(table)
