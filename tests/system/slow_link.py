"""A slow and lossy link: carries packets between two network interfaces, each one late, some never.

    python slow_link.py IFACE IFACE MILLISECONDS LOSS_PERCENT

It stands in for the kernel's netem, which is not built into every kernel.
"""

from __future__ import annotations

import collections
import contextlib
import random
import select
import socket
import sys
import time

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15  # carries the checksum and segments still to be made, so that no offloading has to be turned off
PACKET_IGNORE_OUTGOING = 23
LARGEST = 1 << 17


def opened(interface: str) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    link.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        link.setsockopt(socket.SOL_SOCKET, option, 8 << 20)
    link.bind((interface, ETH_P_ALL))
    link.setblocking(False)
    return link


def main(one: str, other: str, milliseconds: float, loss_percent: float) -> None:
    links = {link.fileno(): link for link in (opened(one), opened(other))}
    a, b = links
    across = {a: links[b], b: links[a]}
    chance = random.Random(1)
    waiting: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    poll = select.poll()
    for number in links:
        poll.register(number, select.POLLIN)
    print("ready", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for number, _ in poll.poll(None if pause is None else pause * 1000):
            with contextlib.suppress(OSError):  # empty, or the link is down just now
                while True:
                    packet = links[number].recv(LARGEST)
                    if chance.random() * 100 >= loss_percent:
                        waiting.append((time.monotonic() + milliseconds / 1000, across[number], packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, link, packet = waiting.popleft()
            with contextlib.suppress(OSError):
                link.send(packet)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
