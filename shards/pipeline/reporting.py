"""OUT/report.json: from what was read to what is in the shards, by source, with what each step removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from shards import manifest as manifests
from shards.container import write_atomically
from shards.errors import ShardError
from shards.manifest import SPLITS
from shards.pipeline.funnel import Count, Funnel, together
from shards.pipeline.models import described
from shards.pipeline.work import Work

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


class Report(msgspec.Struct, frozen=True):
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
        every = [manifests.load(out / name / split) for name in own for split in SPLITS]
        rejected: dict[str, int] = {}
        for manifest in every[:: len(SPLITS)]:
            for reason, count in manifest.rejected.items():
                rejected[reason] = rejected.get(reason, 0) + count
        found.append(
            SourceReport(
                name=source.name,
                origin=every[0].origin if every else "",
                funnel=work.funnel(number),
                rejected=rejected,
                tokens=sum(manifest.tokens for manifest in every),
                documents=sum(manifest.documents for manifest in every),
                text_bytes=sum(manifest.text_bytes for manifest in every),
            )
        )
    write_atomically(
        out / FILE_NAME, msgspec.json.format(msgspec.json.encode(Report(FORMAT, found, described(work))), indent=1) + b"\n"
    )


def load(out: Path) -> Report:
    """Raises ShardError where there is none."""
    path = out / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        why = "no report: a build with [data.clean] writes it when it is done" if path.parent.is_dir() else error.strerror
        raise ShardError(f"{path}: {why}") from None
    except msgspec.MsgspecError as error:
        raise ShardError(f"{path}: not a report: {error} (build the shards again)") from None
