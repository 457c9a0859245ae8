"""`[parallel]`: how a model is laid over the ranks; all that is left of them share the data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from midwatch.recipe.bounds import MOST_COUNT, bounded
from midwatch.recipe.model import Model


class Parallel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the mesh. Data-parallel ranks are what remains, and may come and go; the other sizes stay."""

    tensor: int = 1
    """Ranks that split each block's heads and MLP among them, and a row's tokens between the blocks."""
    pipeline: int = 1
    """Ranks that each hold a part of the layers."""
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """Of the pipeline. `interleaved`: every rank holds `virtual_stages` parts of the layers, so that it idles less."""
    virtual_stages: int = 2
    """Parts of the layers on a rank, where the schedule is `interleaved`."""
    hsdp_shard_size: int | None = None
    """Data-parallel ranks over which one copy of the state is spread (hybrid sharding); all, where left out."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in the host's memory: the optimizer's moments, or parameters and gradients as well."""

    reshard_after_forward: bool | int | Literal["auto"] = "auto"
    """Whether a block's parameters, gathered for its forward, are dropped until its backward gathers them again (ZeRO-3).

    false: they stay (ZeRO-2), which saves that all-gather and takes the memory of the blocks. A number: they stay sharded over so
    many neighbouring ranks, so that the second all-gather is within a node. "auto": as torch's `fully_shard` does: dropped."""

    @property
    def neighbours(self) -> int:
        """Of a block's parameters after its forward: ranks that they are sharded over; 0: over all that share the state."""
        kept = self.reshard_after_forward
        return 0 if kept == "auto" or kept is True else 1 if kept is False else int(kept)

    @property
    def parts(self) -> int:
        """Parts of the layers on one rank."""
        return self.virtual_stages if self.pipeline > 1 and self.schedule == "interleaved" else 1

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one copy of the model where nothing is sharded."""
        return self.tensor * self.pipeline

    def problems(self, model: Model) -> list[tuple[str, str]]:
        """(key, what is wrong and the way out), for a model whose own sizes are possible."""
        found = bounded(self, 1, MOST_COUNT, ("tensor", "pipeline", "hsdp_shard_size"))
        if self.virtual_stages > MOST_COUNT:
            found.append(("virtual_stages", f"must be at most {MOST_COUNT:,}"))
        if self.schedule == "interleaved" and self.virtual_stages < 2:
            found.append(("virtual_stages", 'must be at least 2 (or use schedule = "1f1b")'))
        kept = self.reshard_after_forward
        if not isinstance(kept, bool | str) and (kept < 2 or (self.hsdp_shard_size is not None and self.hsdp_shard_size % kept)):
            among = f"a divisor of hsdp_shard_size, {self.hsdp_shard_size}, " if self.hsdp_shard_size is not None else ""
            found.append(("reshard_after_forward", f'{kept} must be {among}at least 2 (or true, false or "auto")'))
        if found:
            return found
        sizes = {"num_heads": model.num_heads, "num_kv_heads": model.key_value_heads, "intermediate_size": model.hidden_width}
        for name, size in sizes.items():
            if size % self.tensor:
                ways = [str(n) for n in range(1, 65) if all(each % n == 0 for each in sizes.values())]
                found.append(("tensor", f"{self.tensor} does not divide the model's {name}, {size} (use one of {', '.join(ways)})"))
                break
        if self.pipeline * self.parts > model.num_layers:
            found.append(("pipeline", f"{self.pipeline * self.parts} parts need as many layers, the model has {model.num_layers}"))
        return found


def multiple_of(parallel: Parallel, contexts: Iterable[int]) -> int:
    """What the number of ranks must be a multiple of. contexts: the stages' `context_parallel`."""
    return parallel.model_ranks * math.lcm(parallel.hsdp_shard_size or 1, parallel.neighbours or 1, *contexts)
