"""`torchrun … -m bench._stock RUN`: the trainer without a controller, its collectives given a timeout, as stock torchrun needs.

The trainer's own have none: under a controller a rank that is gone is noticed elsewhere. Ranks have a minute to come. The restart
count, by which the trainer tells one gathering from the next, is left out: agents that came at different times disagree on it, and
their ranks would never meet; each gathering has a store of its own here.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from bench._ranks import leave_after

COLLECTIVE_SECONDS = 10
COMING_SECONDS = 60


def main() -> None:
    import torch.distributed as dist
    from torch.distributed import Store  # type: ignore[attr-defined]  # is public; its stubs leave it out
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from midwatch.recipe import Cluster, Parallel
    from trainer.distributed import mesh as parallel
    from trainer.process import rank

    join = rank.join  # type: ignore[attr-defined]  # imported there

    def joined(store: Store, prefix: str, cluster: Cluster, mesh: Parallel) -> parallel.World:
        world = join(store, prefix, cluster, mesh)
        for group in (dist.group.WORLD, world.control, world.checkpoint, world.mesh.get_group()):
            _set_pg_timeout(timedelta(seconds=COLLECTIVE_SECONDS), group)
        return world

    parallel.FOREVER = timedelta(seconds=COMING_SECONDS)
    rank.join = joined  # type: ignore[attr-defined]  # the bench puts its own in the place
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    sys.exit(rank.main(sys.argv[1:]))


if __name__ == "__main__":
    leave_after(main)
