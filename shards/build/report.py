"""OUT/report.json: from what was read to what is in the shards, by source, with what each step removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from shards.build.filter_stats import Count, Funnel, together
from shards.build.models import TOO_SHORT, described
from shards.build.workspace import Work
from shards.common.errors import ShardError
from shards.common.files import write_atomically
from shards.format import manifest as manifests
from shards.format.manifest import SPLITS

FILE_NAME = "report.json"
FORMAT = 1


class SourceReport(msgspec.Struct, frozen=True):
    """One source's."""

    name: str
    origin: str
    funnel: Funnel
    rejected: dict[str, int]  # records that could not be read, or encoded, by reason
    tokens: int  # in the shards, both splits
    documents: int
    text_bytes: int
    notes: dict[str, int] = {}  # of records that were kept: see shards.format.manifest


class BuildReport(msgspec.Struct, frozen=True):
    """A whole build's."""

    format: int
    sources: list[SourceReport]
    models: dict[str, str] = {}  # what judges learned, by their names

    def total(self) -> Funnel:
        """Of all sources; one that a step is not for counts there as it was before, and what was made from its making on."""
        total = together(source.funnel for source in self.sources)
        total.steps = _steps([source.funnel.steps for source in self.sources])
        return total


def _steps(each: Sequence[dict[str, Count]]) -> dict[str, Count]:
    order: list[str] = []
    for steps in sorted(each, key=len, reverse=True):
        before = len(order)
        for name in steps:
            if name not in order:
                order.insert(before, name)
            before = order.index(name) + 1
    total = {name: Count() for name in order}
    for steps in each:
        latest = Count()
        for name, count in total.items():
            latest = steps.get(name, latest)
            count.add(latest.documents, latest.bytes)
    return total


def save(work: Work, out: Path, names: list[str]) -> None:
    """Write it; `names`: the sources' directories."""
    found = []
    for number, source in enumerate(work.sources):
        own = [name for name in names if name == source.name or (source.split_by and name.startswith(f"{source.name}."))]
        found.append(_of_source(out, source.name, own, work.funnel(number)))
    write_atomically(
        out / FILE_NAME, msgspec.json.format(msgspec.json.encode(BuildReport(FORMAT, found, described(work))), indent=1) + b"\n"
    )


def _of_source(out: Path, name: str, directories: Sequence[str], funnel: Funnel) -> SourceReport:
    every = [manifests.load(out / directory / split) for directory in directories for split in SPLITS]
    rejected: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    for manifest in every[:: len(SPLITS)]:
        rejected.update(manifest.rejected)
        noted.update(manifest.notes)
    return SourceReport(
        name=name,
        origin=every[0].origin if every else "",
        funnel=funnel,
        rejected=dict(rejected),
        tokens=sum(manifest.tokens for manifest in every),
        documents=sum(manifest.documents for manifest in every),
        text_bytes=sum(manifest.text_bytes for manifest in every),
        notes=dict(noted),
    )


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons with the number of records of each, the most frequent first."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def left_out(out: Path) -> Iterator[str]:
    """What the shards of a build do not have of their sources, a line each: nothing is left out in silence. Raises ShardError."""
    report = load(out)
    for name, said in report.models.items():
        if TOO_SHORT in said:
            yield f"{name}: {said}"
    for source in report.sources:
        if source.rejected:
            yield f"{source.name}: left out: {counted(source.rejected)}"
        if source.notes:
            yield f"{source.name}: kept, but: {counted(source.notes)}"


class _Marker(msgspec.Struct):
    done: bool = True


def _is_done(out: Path) -> bool:
    """Whether a build has come to its end; what was merged of several need not have been one."""
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((out / "build.json").read_bytes(), type=_Marker).done
    return True


def load(out: Path) -> BuildReport:
    """A build's report; of one that does not clean, what its manifests say. Raises ShardError where there is neither."""
    path = out / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=BuildReport)
    except FileNotFoundError:
        names = sorted(place.parent.parent.name for place in out.glob(f"*/{SPLITS[-1]}/{manifests.FILE_NAME}"))
        if not names or not _is_done(out):
            why = "no report: a build writes it when it is done" if out.is_dir() else "No such file or directory"
            raise ShardError(f"{path}: {why}") from None
        return BuildReport(FORMAT, [_of_source(out, name, [name], Funnel({})) for name in names])
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ShardError(f"{path}: not a report: {error} (build the shards again)") from None
