"""Checks the nodes of a recipe before a run starts on them: visits all by ssh, side by side, and judges what they found."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from launcher.preflight.node_report import Findings, look
from midwatch.recipe import Cluster, Recipe
from midwatch.transport.ssh import Result, Ssh, SshError, remote_command
from midwatch.words import plural
from shards.common.decoding import DecodeError, json_as

VISIT_SECONDS = 45.0
MOST_SKEW, WARN_SKEW = 5.0, 1.0
LEAST_FREE, WARN_FREE = 1 << 30, 10 << 30

RUNTIME_WAY = "free some room there, or name another directory as XDG_RUNTIME_DIR"

Level = Literal["warning", "problem"]
What = Literal["reach", "python", "midwatch", "torch", "gpus", "storage", "clock", "way back", "node"]


class PreflightWarning(msgspec.Struct, frozen=True):
    """Something that is not as it should be."""

    level: Level
    what: What
    text: str
    way_out: str = ""


class NodeReport(msgspec.Struct, frozen=True):
    """One node: what it found and what is to be said of it."""

    host: str
    """As the recipe names it."""
    findings: Findings | None = None
    skew: float | None = None
    """Seconds by which its clock is ahead of this machine's."""
    out_of_reach: bool = False
    notes: tuple[PreflightWarning, ...] = ()

    @property
    def level(self) -> Level | None:
        """The worst of its notes; None where all is well."""
        levels = {note.level for note in self.notes}
        return "problem" if "problem" in levels else "warning" if levels else None


class Visit(msgspec.Struct, frozen=True):
    """What came back from a node, and what this machine was doing meanwhile."""

    host: str
    outcome: Findings | PreflightWarning
    out_of_reach: bool = False
    left: float = 0.0
    """This machine's clock when the visit began."""
    back: float = 0.0


async def check_nodes(recipe: Recipe, run_parent: Path) -> list[NodeReport]:
    """Visits every host of the recipe; `run_parent` is where the run directory will be made, and must exist.

    Raises OSError where nothing can be written there.
    """
    cluster = recipe.cluster
    here = await asyncio.to_thread(look)
    secret = secrets.token_hex(16)
    ssh = Ssh(cluster.ssh_options)
    with _nonce(run_parent.resolve(), secret) as nonce:
        async with _listening(cluster, secret) as (addresses, complaint):
            words = ["-P", "-m", "launcher.preflight.node_report", "--json", "--storage", str(nonce)]
            words += [word for address in addresses for word in ("--call", address)]
            visits = await asyncio.gather(*(_visit(ssh, host, cluster, words) for host in cluster.host_names))
        reports = [judge(visit, cluster, here, secret, nonce.parent) for visit in visits]
    extra = (complaint,) if complaint is not None else ()
    return [msgspec.structs.replace(r, notes=(*r.notes, *extra)) for r in compare(reports, cluster, here)]


def ready(reports: list[NodeReport], fewest: int) -> bool:
    """Whether a run can start: the fewest nodes are fine, and none is wrong but those that are only out of reach."""
    fine = sum(report.level != "problem" for report in reports)
    return fine >= fewest and all(r.out_of_reach or r.level != "problem" for r in reports)


async def _visit(ssh: Ssh, host: str, cluster: Cluster, words: list[str]) -> Visit:
    left = time.time()
    try:
        result = await ssh.run(host, remote_command(cluster, words), timeout=VISIT_SECONDS)
    except SshError as error:
        way = (
            'name the Python that Midwatch is installed for, as [cluster] python = "/…/bin/python"'
            if error.why == "command"
            else ""
        )
        what: What = "python" if error.why == "command" else "reach"
        return Visit(host, PreflightWarning("problem", what, str(error), way), error.out_of_reach)
    return Visit(host, understand(result), left=left, back=time.time())


def understand(result: Result) -> Findings | PreflightWarning:
    """What a node's preflight has said, between whatever its login scripts said; a note where that is nothing."""
    for line in reversed(result.stdout.splitlines()):
        with contextlib.suppress(DecodeError):
            return json_as(line, Findings)
    said = result.last_words
    if "No module named" in said:
        return PreflightWarning(
            "problem", "midwatch", f"Midwatch is not installed for its Python, or is another version ({said})", _INSTALL
        )
    if "nknown option" in said and "-P" in result.stderr:
        return PreflightWarning("problem", "python", "its Python is older than 3.11", _INSTALL)
    return PreflightWarning(
        "problem", "node", f"the check failed there with status {result.status} ({said})", "see [cluster] setup and python"
    )


_INSTALL = "install the same Midwatch there, for the same Python; [cluster] python names which"


def judge(visit: Visit, cluster: Cluster, here: Findings, secret: str, seen: Path) -> NodeReport:
    """Judges one node by itself, against this machine and the recipe; `seen` is where nodes left their word."""
    if isinstance(visit.outcome, PreflightWarning):
        return NodeReport(visit.host, out_of_reach=visit.out_of_reach, notes=(visit.outcome,))
    found = visit.outcome
    low, high = skew_bounds(found, visit)
    nearest = 0.0 if low <= 0 <= high else min(low, high, key=abs)
    notes = [*_software(found, here), *_storage(found, secret, seen), *_way_back(found, secret)]
    if abs(nearest) > WARN_SKEW:
        level: Level = "problem" if abs(nearest) > MOST_SKEW else "warning"
        text = f"its clock is {abs(nearest):.1f} s {'ahead of' if nearest > 0 else 'behind'} this machine's"
        notes.append(PreflightWarning(level, "clock", text, "have chrony or ntpd run on all nodes"))
    if found.runtime:
        notes.append(PreflightWarning("problem", "node", f"its directory for sockets: {found.runtime}", RUNTIME_WAY))
    if cluster.interface is not None and cluster.interface not in found.interfaces:
        known = ", ".join(found.interfaces) or "none"
        notes.append(
            PreflightWarning(
                "problem", "node", f"there is no interface {cluster.interface} (there are: {known})", "see [cluster] interface"
            )
        )
    return NodeReport(visit.host, found, (low + high) / 2, notes=tuple(notes))


def skew_bounds(found: Findings, visit: Visit) -> tuple[float, float]:
    """By how much its clock can be ahead of ours, least and most: as wide as a question and its answer took."""
    if found.call.theirs:
        return found.call.before - found.call.theirs, found.call.after - found.call.theirs
    return found.clock - visit.back, found.clock - visit.left


def _software(found: Findings, here: Findings) -> Iterator[PreflightWarning]:
    if found.python.split(".")[:2] != here.python.split(".")[:2]:
        yield PreflightWarning(
            "problem", "python", f"Python {found.python} there, {here.python} here", "use the same; [cluster] python names it"
        )
    elif found.python != here.python:
        yield PreflightWarning("warning", "python", f"Python {found.python} there, {here.python} here")
    if found.lacking:
        yield PreflightWarning("problem", "midwatch", f"packages are missing: {', '.join(found.lacking)}", _INSTALL)
    if found.midwatch != here.midwatch:
        text = f"Midwatch {found.midwatch or 'not installed'} there, {here.midwatch or 'not installed'} here"
        yield PreflightWarning("problem", "midwatch", text, _INSTALL)
    elif found.code != here.code:
        yield PreflightWarning("problem", "midwatch", "the same version of Midwatch, but other code", _INSTALL)
    if not found.torch:
        yield PreflightWarning(
            "problem", "torch", "there is no torch", "install Midwatch there with what ranks need: midwatch[train]"
        )
    if found.uid != here.uid:
        text = f"you are {found.user} (uid {found.uid}) there and {here.user} (uid {here.uid}) here"
        yield PreflightWarning("warning", "node", text, "files of the run may be closed to the nodes; log in as the same user")


def _storage(found: Findings, secret: str, seen: Path) -> Iterator[PreflightWarning]:
    storage, shared = found.storage, "the run directory must be on storage that all nodes share, at the same path; see --dir"
    if storage.problem:
        yield PreflightWarning("problem", "storage", storage.problem, shared)
    elif storage.read != secret:
        yield PreflightWarning(
            "problem", "storage", f"{seen.parent} is not the checking machine's: a file there reads otherwise", shared
        )
    else:
        try:
            came_back = (seen / Path(storage.wrote).name).read_text() == secret
        except OSError:
            came_back = False
        if not came_back:
            yield PreflightWarning("problem", "storage", f"what it writes to {seen.parent} is not seen on this machine", shared)
    if storage.free is not None and storage.free < WARN_FREE:
        level: Level = "problem" if storage.free < LEAST_FREE else "warning"
        yield PreflightWarning(
            level, "storage", f"only {storage.free / (1 << 30):.1f} GiB are free for the run", "free some, or see --dir"
        )


def _way_back(found: Findings, secret: str) -> Iterator[PreflightWarning]:
    out = "let nodes reach this machine; [cluster] interface and port say where the controller listens"
    if found.call.problem:
        yield PreflightWarning("problem", "way back", f"it cannot reach this machine: {found.call.problem}", out)
    elif found.call.answer != secret:
        yield PreflightWarning("problem", "way back", f"another machine answers for this one at {found.call.address}", out)


def compare(reports: list[NodeReport], cluster: Cluster, here: Findings) -> list[NodeReport]:
    """Judges the nodes against each other: torch, GPUs, and names that mean the same machine."""
    present = [report.findings for report in reports if report.findings is not None]
    torches = Counter([*(f.torch for f in present if f.torch), *([here.torch] if here.torch else [])])
    torch = max(torches, key=lambda t: (torches[t], t == here.torch), default="")
    gpus = Counter(len(f.gpus) for f in present)
    most = max(gpus, key=lambda n: (gpus[n], n), default=0)
    wanted = cluster.ranks_per_node if cluster.device == "cuda" or (cluster.device == "auto" and most) else 0
    first: dict[str, str] = {}
    result = []
    for report in reports:
        found, notes = report.findings, list(report.notes)
        if found is not None:
            if found.torch and found.torch != torch:
                notes.append(
                    PreflightWarning(
                        "problem", "torch", f"torch {found.torch} there, {torch} elsewhere", "install the same on all nodes"
                    )
                )
            notes += _gpu_notes(found, cluster, wanted, most)
            twin = first.setdefault(found.machine, report.host)
            if twin != report.host:
                text = f"it is the same machine as {twin} ({found.host})"
                notes.append(PreflightWarning("problem", "node", text, "name each machine once in [cluster] hosts"))
        result.append(msgspec.structs.replace(report, notes=tuple(notes)))
    return result


def _gpu_notes(found: Findings, cluster: Cluster, wanted: int, most: int) -> Iterator[PreflightWarning]:
    if cluster.device == "cpu":
        return
    why = f" ({found.gpu_note})" if found.gpu_note else ""
    if len(found.gpus) < wanted:
        text = f"{plural(len(found.gpus), 'GPU')}{why}, and {plural(wanted, 'rank')} want one each"
        yield PreflightWarning("problem", "gpus", text, "see nvidia-smi there; [cluster] ranks_per_node says how many are wanted")
    elif len(found.gpus) != most:
        yield PreflightWarning(
            "warning", "gpus", f"{len(found.gpus)} GPUs{why}, and most nodes have {most}", "see nvidia-smi there"
        )


@contextlib.contextmanager
def _nonce(run_parent: Path, secret: str) -> Iterator[Path]:
    """A file with the secret, in a directory of its own that nodes may write to, for as long as the check lasts."""
    directory = run_parent / f".midwatch-check-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o700)
    try:
        file = directory / "nonce"
        file.write_text(secret)
        yield file
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.asynccontextmanager
async def _listening(cluster: Cluster, secret: str) -> AsyncIterator[tuple[list[str], PreflightWarning | None]]:
    """Answers who connects with the secret and the time; yields where, and a note where the recipe's port could not be had."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            await asyncio.wait_for(reader.readline(), 10)
            writer.write(f"{secret} {time.time()}\n".encode())
            await writer.drain()
        writer.close()

    note = None
    try:
        server = await asyncio.start_server(answer, port=cluster.port)
    except OSError:
        text = f"port {cluster.port} of this machine is in use, so the nodes were asked to try another"
        note = PreflightWarning("warning", "way back", text, "end what listens there, or name another as [cluster] port")
        server = await asyncio.start_server(answer, port=0)
    async with server:
        family = {s.family: s.getsockname()[1] for s in server.sockets}
        yield [f"[{a}]:{family[f]}" if ":" in a else f"{a}:{family[f]}" for f, a in _addresses(cluster) if f in family], note


def _addresses(cluster: Cluster) -> list[tuple[socket.AddressFamily, str]]:
    """This machine's addresses as others may know it: the interface's, where it is named and there, else all."""
    known = psutil.net_if_addrs()
    names = [cluster.interface] if cluster.interface in known else list(known)
    found = [(a.family, str(a.address)) for n in names for a in known[n] if a.family in (socket.AF_INET, socket.AF_INET6)]
    return [(f, a) for f, a in found if not a.startswith(("127.", "::1", "fe80:"))]
