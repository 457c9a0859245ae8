"""The file of a user's reward function, as what a model was made from."""

from __future__ import annotations

from pathlib import Path

import xxhash

from midwatch.recipe import Stage


def scored_by(stage: Stage) -> dict[str, str]:
    """Stage to the digest of that file as it is now; empty where no function scores, or the file cannot be read yet."""
    place = stage.rollout_settings.function if stage.draws or stage.makes else None
    if place is None:
        return {}
    try:
        return {stage.name: xxhash.xxh3_128_hexdigest(Path(place.rpartition(":")[0]).read_bytes())}
    except OSError:
        return {}
