"""This machine's addresses: which one others reach it at, and on which interface that is."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping

import psutil


class NetworkError(Exception):
    """There is no such interface, or it has no address; the message names those there are."""


def address_of(interface: str) -> str:
    """The interface's address, IPv4 first. Raises NetworkError."""
    known = psutil.net_if_addrs()
    found = [a.address for family in (socket.AF_INET, socket.AF_INET6) for a in known.get(interface, []) if a.family == family]
    usable = [a for a in found if not ipaddress.ip_address(a.partition("%")[0]).is_link_local]
    if not usable:
        what = "has no address" if interface in known else "is not there"
        raise NetworkError(f"the interface {interface} {what} (there are: {', '.join(sorted(known))})")
    return str(usable[0])


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to a host. Raises NetworkError."""
    try:
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
                probe.connect(place)
                return str(probe.getsockname()[0])
    except OSError as error:
        raise NetworkError(f"there is no way to {host}: {error.strerror or error}") from None
    raise NetworkError(f"there is no way to {host}")


def interface_of(address: str) -> str | None:
    """The interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return str(name)
    return None


def addresses() -> list[str]:
    """All of this machine's addresses that another one might reach, by interface."""
    found = []
    for _, each in sorted(psutil.net_if_addrs().items()):
        for family in (socket.AF_INET, socket.AF_INET6):
            for address in (a.address for a in each if a.family == family):
                known = ipaddress.ip_address(address.partition("%")[0])
                if not known.is_link_local and not known.is_loopback:
                    found.append(str(address))
    return found


def address_that_reaches(places: list[tuple[str, int]], timeout: float = 2.0) -> str:
    """This machine's address on the way to any of the places. Raises NetworkError where there is none.

    Only where the ways begin at several addresses is it tried which place takes a connection: at the other end a try looks like a
    stranger's.
    """
    ends = set()
    for place in places:
        with contextlib.suppress(NetworkError):
            ends.add(address_towards(*place))
    if len(ends) == 1:
        return ends.pop()
    why = ""
    for place in places:
        try:
            with socket.create_connection(place, timeout) as wire:
                return str(wire.getsockname()[0])
        except OSError as error:
            why = error.strerror or str(error)
    where = " or ".join(f"{host} port {port}" for host, port in places)
    raise NetworkError(f"there is no way to the controller at {where}: {why}")


def interface_problem(environment: Mapping[str, str], *, nccl: bool) -> str:
    """Which variable has the ranks' collectives use an interface that is not there, and what there is; empty where none does."""
    known = sorted(psutil.net_if_addrs())
    for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", *(("NCCL_SOCKET_IFNAME",) if nccl else ())):
        value = environment.get(name, "").strip()
        if value and not _matches(name, value, known):
            return (
                f"{name}={value} names no interface of this node (there are: {', '.join(known)}; see [cluster] interface and env)"
            )
    return ""


def _matches(name: str, value: str, known: list[str]) -> bool:
    """NCCL takes beginnings of names, names after `=`, and those to leave out after `^`; gloo takes names alone, and needs each."""
    if not name.startswith("NCCL"):
        return all(each.strip() in known for each in value.split(","))
    words = [each.strip() for each in value.lstrip("^=").split(",") if each.strip()]
    exact = value.lstrip("^").startswith("=")
    found = [each for each in known if each in words or (not exact and each.startswith(tuple(words)))]
    return len(found) < len(known) if value.startswith("^") else bool(found)
