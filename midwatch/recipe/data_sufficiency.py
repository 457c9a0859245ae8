"""Whether what was built has what the stages are to read, and lasts for it where `max_epochs` limits it."""

from __future__ import annotations

from pathlib import Path

from midwatch.recipe.recipe import Recipe
from shards.common.errors import ShardError
from shards.sampling.mixing import covers, named


def shortages(recipe: Recipe, data: Path) -> list[str]:
    """What is not there or runs out, a line each, with the way out. Of sources that stages make nothing is known yet.

    Reads manifests, and makes plans for packing that are not there; raises ShardError.
    """
    from shards.format.corpus import sources
    from shards.sampling.batches import BatchFeed

    made = [source.name for source in recipe.data.source if source.origin == "stage"]
    built = sources(data)
    found = []
    for index, stage in enumerate(recipe.stage):
        if any(covers(source, name) for source in made for name in stage.sources):
            continue
        try:
            for mixture in (stage.mixture, *(change.mixture for change in stage.anneal)):
                named(mixture, built)
        except ShardError as error:
            found.append(f'stage "{stage.name}": {error} (a source that is split has only the parts that occurred)')
            continue
        if not stage.max_epochs:
            continue
        seed, schedule = recipe.run.seed + index, stage.schedule
        feed = BatchFeed(data, "train", stage.feed_kind, stage.context, stage.mixture, seed, mixing=stage.mixing, schedule=schedule)
        end, wanted = feed.order.end, stage.position_after(stage.steps)
        if end is not None and end < wanted:
            lasts = max(step for step in range(stage.steps) if stage.position_after(step) <= end)
            found.append(
                f'stage "{stage.name}": all its sources are used up after {end:,} samples, and {stage.steps} steps take {wanted:,}'
                f" (raise max_epochs, use at most {lasts} steps, or mix in a source without a limit)"
            )
    return found
