"""OUT/report.json: from what was read to what is in the shards, by source, with what each step removed."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shards import manifest as manifests
from shards.container import write_atomically
from shards.errors import ShardError
from shards.manifest import SPLITS
from shards.pipeline.funnel import Funnel, together
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
        return together(source.funnel for source in self.sources)


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
        why = "no report: only a build with [data.clean] has one" if path.parent.is_dir() else error.strerror
        raise ShardError(f"{path}: {why}") from None
    except msgspec.MsgspecError as error:
        raise ShardError(f"{path}: not a report: {error} (build the shards again)") from None
