"""`shards inspect`: what the manifests say."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from shards.commands.output import directories, print_table, size
from shards.common.terminal import write_json, write_out


def main(args: argparse.Namespace) -> int:
    from shards.format.manifest import load

    found = [(directory, load(directory)) for directory in directories(Path(args.path))]
    if args.json:
        write_json([{"path": str(directory), **msgspec.to_builtins(manifest)} for directory, manifest in found])
        return 0
    rows = []
    for _, manifest in found:
        on_disk = sum(column.bytes for shard in manifest.shards for column in shard.columns.values())
        rows.append([
            manifest.source, manifest.split, manifest.kind, f"{manifest.documents:,}", f"{manifest.tokens:,}",
            f"{len(manifest.shards):,}", size(on_disk), f"{sum(manifest.rejected.values()):,}", manifest.digest[:8],
        ])  # fmt: skip
    print_table(["source", "split", "kind", "documents>", "tokens>", "shards>", "size>", "left out>", "digest"], rows)
    origins = {manifest.source: manifest.origin for _, manifest in found}
    write_out()
    print_table(["source", "from"], [[name, origin] for name, origin in origins.items()])
    return 0
