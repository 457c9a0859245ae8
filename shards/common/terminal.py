"""What is printed: the one module that writes to standard output and standard error, and that makes text from others safe.

Names, settings, log lines, samples, documents and servers' messages may hold anything. A terminal obeys escape sequences (they
set its title, write its clipboard, delete lines), and bidirectional overrides or invisible characters make a name look like
another. `safe` shows such characters as escapes (`\\x1b`, `\\u202e`). Every function here applies it, and so does the console
that `make_console` returns; the console also never reads markup such as `[bold]` from a string.

JSON is printed with the same characters as `\\uXXXX`, which a reader decodes to the original text.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = "\x00-\x1f\x7f-\x9f"
_INVISIBLE = (
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Format characters: zero-width, bidirectional, tags, fillers. Variation selectors (FE00 to FE0F) choose a glyph and stay."""
_SEPARATORS_AND_SURROGATES = "\u2028\u2029\ud800-\udfff"
_JOINED = "\u0600-\u1fff\u2100-\u9fff\ufe0f\U0001f000-\U0001ffff"
"""Neighbours between which U+200C and U+200D have a meaning: letters of joining scripts, and emoji."""
_JOINER = f"(?<=[{_JOINED}])[\u200c\u200d](?=[{_JOINED}])"
_UNSAFE = re.compile(f"({_JOINER})|[{_CONTROLS}{_INVISIBLE}{_SEPARATORS_AND_SURROGATES}]")
_UNSAFE_LINES = re.compile(f"({_JOINER})|\r\n|[{_CONTROLS}{_INVISIBLE}{_SEPARATORS_AND_SURROGATES}]")
_UNSAFE_JSON = re.compile(f"[\x7f-\x9f{_INVISIBLE}{_SEPARATORS_AND_SURROGATES}]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NOT_ASCII = re.compile("[^\x00-\x7e]")


class OutputError(Exception):
    """Standard output takes no more; the message says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror or error}")
        self.reader_is_gone = isinstance(error, BrokenPipeError)


def safe(text: str, *, lines: bool = False) -> str:
    """The text with an escape for each character that a terminal obeys or does not show.

    lines: line ends and tabs stay; `\\r\\n` becomes `\\n`. A byte of a file name that is not UTF-8 is shown as `\\xNN`.
    """
    if text.isascii() and text.isprintable():
        return text
    return (_UNSAFE_LINES if lines else _UNSAFE).sub(_escape_lines if lines else _escape, text)


def _escape(match: re.Match[str]) -> str:
    char = match.group()
    if match.group(1) is not None:
        return char
    if char in _NAMED:
        return _NAMED[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escape_lines(match: re.Match[str]) -> str:
    char = match.group()
    return "\n" if char == "\r\n" else char if char in "\n\t" else _escape(match)


# Standard output and standard error


def open_streams() -> None:
    """Makes the standard streams usable whatever the caller left of them: closed ones, and encodings that lack characters."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened takes its place
            handle = os.open(os.devnull, mode)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def run_command(command: Callable[[], int]) -> int:
    """Runs a command with usable streams; the exit status. It is 1, with a plain reason, where the output cannot be written."""
    open_streams()
    try:
        try:
            with _unwinding():
                return command()
        finally:
            flush_out()
    except KeyboardInterrupt:
        return 130
    except OutputError as error:
        discard_out()
        if not error.reader_is_gone:
            write_error(f"midwatch: {error}")
        return 1


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as an exception does, so that bars show the cursor again and children end too."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_out(text: object = "", *, end: str = "\n", to: TextIO | None = None, flush: bool = False) -> None:
    """Prints text, made safe, on standard output. Raises OutputError."""
    _write(safe(str(text), lines=True) + end, sys.stdout if to is None else to, flush)


def write_path(path: object) -> None:
    """Prints a path that is the command's result: safe on a terminal, byte for byte in a pipe or a file. Raises OutputError."""
    if sys.stdout.isatty():
        write_out(path)
        return
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(str(path)) + b"\n")
    except OSError as error:
        raise OutputError(error) from None


def indented(text: str, indent: int = 4) -> str:
    """Text of several lines as an item of a list: no line of it can be taken for the next item."""
    return safe(text, lines=True).replace("\n", "\n" + " " * indent)


def write_json(value: Any, *, flush: bool = False) -> None:
    """Prints a value as one line of JSON. Raises OutputError."""
    _write(json_text(value, sys.stdout.encoding) + "\n", sys.stdout, flush)


def write_error(text: object) -> None:
    """Prints a message on standard error. Where that cannot be written there is nobody left to tell."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(safe(str(text), lines=True) + "\n")
        sys.stderr.flush()


def flush_out() -> None:
    """Writes what is still in the buffer, so that a full disk is reported and not lost at exit. Raises OutputError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more; it shows before the next line is written."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        mode = os.fstat(number).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            poller = select.poll()
            poller.register(number, 0)
            return any(events & select.POLLERR for _, events in poller.poll(0))
    return False


def discard_out() -> None:
    """Drops what is in the buffer and all that follows: standard output takes no more."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _write(text: str, stream: TextIO, flush: bool) -> None:
    try:
        stream.write(text)
        if flush:
            stream.flush()
    except OSError as error:
        raise OutputError(error) from None


def json_text(value: Any, encoding: str | None = "utf-8") -> str:
    """A value as JSON that is safe on a terminal and that a stream of this encoding can hold."""
    import msgspec

    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: JSON has only the escape of a lone surrogate for it
        import json

        text = json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
    plain = (encoding or "ascii").lower().replace("_", "-") not in ("utf-8", "utf8")
    return (_NOT_ASCII if plain else _UNSAFE_JSON).sub(_escape_json, text)


def _escape_json(match: re.Match[str]) -> str:
    units = match.group().encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


# What others print for us


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors quote them safely. Its subparsers are of the same class.

    Options may stand between words whose number is not fixed (`golden RUN --json ID`), which argparse allows on request only.
    """

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = self._get_positional_actions()
        if self._within or any(each.nargs in (argparse.PARSER, argparse.REMAINDER) for each in words):
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False

    def error(self, message: str) -> NoReturn:
        super().error(safe(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Replaces argparse's own, which says nothing where the help cannot be written."""
        if file is sys.stdout:
            write_out(message, end="")
        elif message:
            write_error(message.removesuffix("\n"))


class SafeFormatter(logging.Formatter):
    """Log lines hold text from others, and are read on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        return safe(super().format(record), lines=True)


def log_to_stderr(format: str) -> None:
    """Sends this process's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter(format))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def make_console(*, stderr: bool = False, file: TextIO | None = None, **options: Any) -> Console:
    """A rich console that reads no markup and prints no control character. On standard output its `print` raises OutputError."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class SafeConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(safe(text, lines=True), **settings)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(safe(segment.text, lines=True), segment.style)

        def print(self, *objects: Any, **settings: Any) -> None:
            try:
                super().print(*objects, **settings)
            except OSError as error:
                if not stderr:  # nobody is left to read messages, but the work goes on
                    raise OutputError(error) from None

        def on_broken_pipe(self) -> None:
            if not stderr:
                raise OutputError(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))

    return SafeConsole(stderr=stderr, file=file, markup=False, highlight=False, emoji=False, **options)
