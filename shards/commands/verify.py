"""`shards verify`: reads all of it, and names what is bad."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from shards.commands.output import directories, size, working
from shards.common.errors import ShardError
from shards.common.terminal import write_error, write_json, write_out


def main(args: argparse.Namespace) -> int:
    from shards.format.manifest import load, verify

    places = directories(Path(args.path))
    total = 0
    for place in places:
        with contextlib.suppress(ShardError):  # said below
            total += sum(column.bytes for shard in load(place).shards for column in shard.columns.values())
    bad: list[str] = []
    done = 0
    with working(args, "verify", args.path, "bytes", total) as meter:

        def tell(count: int) -> None:
            nonlocal done
            done += count
            meter.update(done, total)

        for place in places:
            for message in verify(place, full=not args.quick, tell=tell):
                bad.append(message)
                if not args.json:
                    write_error(message)
    if args.json:
        write_json({"checked": [str(place) for place in places], "bad": bad})
    elif bad:
        write_out(f"damaged: {len(bad)} faults in {len(places)} manifests and their shards, named above")
    else:
        how = "sizes and seek tables of" if args.quick else "every byte of"
        write_out(f"whole: {how} {len(places)} manifests and all their shards, {size(total)}")
    return 1 if bad else 0
