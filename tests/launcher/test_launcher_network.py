"""The address by which others reach this machine."""

from __future__ import annotations

import socket

import pytest

from midwatch.transport.addresses import NetworkError, address_that_reaches


def test_where_all_ways_begin_at_one_address_nobody_is_called() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        assert address_that_reaches([place, ("127.0.0.1", 1)]) == "127.0.0.1"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_where_there_is_no_way_the_places_are_named() -> None:
    with pytest.raises(NetworkError, match=r"192\.0\.2\.256 port 9"):
        address_that_reaches([("192.0.2.256", 9)], timeout=0.5)
