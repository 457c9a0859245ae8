"""A port that takes connections and closes them, so that a controller can tell a machine that is slow from one that is cut off."""

from __future__ import annotations

import contextlib
import socket
import threading


class ProbePort:
    """Listens at an address, on any free port, in a thread that ends with `close`."""

    def __init__(self, address: str) -> None:
        """Raises OSError where the address is not this machine's."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((address, 0))
        self._socket.listen(64)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._run, name="probe-port", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(timeout=5)
