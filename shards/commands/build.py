"""`shards build`: from a spec, or from what midwatch made of a recipe; stopped at any time, it goes on later."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.common.errors import SpecError
from shards.common.terminal import OutputError, write_error, write_path
from shards.spec import Build, decode_build

PARENT_LOOK = 0.5  # seconds between looks whether the parent still lives


class Stopped(BaseException):
    """The build was asked to end, or nobody is left to read its progress."""


def main(args: argparse.Namespace) -> int:
    from shards.build.build import build
    from shards.build.report import left_out
    from shards.common.progress import ProgressReport, Report, Screen, print_progress

    if args.workers is not None and args.workers < 0:
        raise SpecError(f"--workers is {args.workers} (use 0 or more)")
    spec = _spec(args)
    try:
        with _stoppable(watch_parent=args.json):
            if args.json:

                def report(progress: ProgressReport) -> None:
                    try:
                        print_progress(progress)
                    except OutputError:
                        raise Stopped from None

                build(spec, report, args.workers)
            else:
                with Screen() as screen:
                    shown: Report = screen
                    build(spec, shown, args.workers)
                for said in left_out(Path(spec.out)):
                    write_error(said)
                if args.recipe is not None:
                    write_path(spec.out)
    except (Stopped, KeyboardInterrupt):
        write_error(f"stopped; the same command goes on from what {spec.out} has")
        return 1
    return 0


def _spec(args: argparse.Namespace) -> Build:
    """`args.build`, where midwatch has read a recipe: this package knows nothing of them."""
    if (args.recipe is None) == (args.spec is None):
        raise SpecError("build takes a recipe, or --spec FILE (give one of the two)")
    if args.recipe is not None:
        made: Build | None = getattr(args, "build", None)
        if made is None:
            raise SpecError(f"{args.recipe}: recipes are read by `midwatch shards build` (use that, or give --spec FILE)")
        return made
    try:
        raw = sys.stdin.buffer.read() if args.spec == "-" else Path(args.spec).read_bytes()
    except OSError as error:
        raise SpecError(f"{args.spec}: {error.strerror} (correct the path)") from None
    return decode_build(raw, args.spec)


@contextmanager
def _stoppable(*, watch_parent: bool) -> Iterator[None]:
    """SIGTERM, and with `watch_parent` the parent's end, raise Stopped in the main thread."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    over = threading.Event()
    parent = os.getppid()

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # the main thread's, when it does not block them
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
