"""The real terminal under the screen: what comes from it may be anything, and it is left as it was found, also by a signal."""

from __future__ import annotations

import codecs
import contextlib
import functools
import os
import signal
import termios
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from textual.drivers import linux_driver
from textual.events import Paste
from textual.message import Message

from midwatch.signals import EndingSignals
from midwatch.terminal import safe
from tui.chart.formatting import UNICODE

if TYPE_CHECKING:
    from tui.core.operator_app import OperatorApp

EXIT_SECONDS = 3.0
"""For a screen that a signal ends to leave by itself: it may be held up by a terminal that is gone or does not read."""

RESTORE = (
    "\x1b[?2004l\x1b[?7h\x1b[?2048l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l\x1b[<u\x1b[?1049l\x1b[?25h\x1b[?1004l"
)
"""Turns off paste and mouse reports and the keyboard protocol, leaves the alternate screen, shows the cursor."""


def _decoder(encoding: str) -> Callable[[], codecs.IncrementalDecoder]:
    """A byte that is not UTF-8, as a terminal set to Latin-1 sends, becomes U+FFFD; a strict decoder would end the screen."""
    return functools.partial(codecs.getincrementaldecoder(encoding), errors="replace")


setattr(linux_driver, "getincrementaldecoder", _decoder)  # noqa: B010  # the driver offers no other way to choose the handler


def _terminal() -> int:
    """Standard error, or standard output where messages go to a file."""
    return 2 if os.isatty(2) else 1


class ScreenDriver(linux_driver.LinuxDriver):
    """Textual's own, with the encoding of the terminal and with what is pasted made safe."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        encoding = "utf-8" if UNICODE else "ascii"  # the terminal's, whatever PYTHONIOENCODING says of files
        self._file = open(_terminal(), "w", encoding=encoding, errors="replace", closefd=False)  # noqa: SIM115

    def process_message(self, message: Message) -> None:
        if isinstance(message, Paste):
            message.text = safe(message.text, lines=True)
        super().process_message(message)


class ScreenExit:
    """Ends the screen on a signal, with the terminal restored: by the app where it can, else directly after EXIT_SECONDS."""

    def __init__(self, app: OperatorApp) -> None:
        self.number: signal.Signals | None = None
        """The signal that came."""
        self._app = app
        self._signals = EndingSignals()
        self._watchdog: threading.Timer | None = None
        with contextlib.suppress(termios.error, ValueError):
            self._attributes = termios.tcgetattr(0)

    def __enter__(self) -> ScreenExit:
        self._signals.call(self._arrives)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog.join()

    def _arrives(self, number: signal.Signals) -> None:
        """Runs in the main thread between two of its instructions, also while the event loop is busy."""
        if self.number is not None:
            return
        self.number = number
        self._watchdog = threading.Timer(EXIT_SECONDS, self._leave_at_once)
        self._watchdog.name, self._watchdog.daemon = "screen-exit", True
        self._watchdog.start()
        self._app.end_soon(128 + number)

    def _leave_at_once(self) -> None:
        with contextlib.suppress(OSError, termios.error, AttributeError):
            os.set_blocking(_terminal(), False)
            os.write(_terminal(), RESTORE.encode())
            termios.tcsetattr(0, termios.TCSANOW, self._attributes)
        with contextlib.suppress(OSError):
            os.set_blocking(_terminal(), True)  # the shell has the same open file
        os._exit(128 + (self.number or 0))
