"""The whole recipe, as a struct."""

from __future__ import annotations

import hashlib
import math

import msgspec

from midwatch.recipe.cluster import Cluster
from midwatch.recipe.generate import Generate
from midwatch.recipe.model import Model
from midwatch.recipe.parallel import Parallel, multiple_of
from midwatch.recipe.probe import Probe
from midwatch.recipe.run import Checkpoint, Report, Run
from midwatch.recipe.stage import Stage
from midwatch.recipe.watch import Watch
from shards.spec import Build, Data, TokenizerSpec


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole recipe: the TOML file that describes a run."""

    run: Run
    model: Model
    data: Data
    stage: tuple[Stage, ...]
    tokenizer: TokenizerSpec = TokenizerSpec()
    cluster: Cluster = Cluster()
    parallel: Parallel = Parallel()
    generate: Generate = Generate()
    checkpoint: Checkpoint = Checkpoint()
    report: Report = Report()
    probe: Probe = Probe()
    watch: tuple[Watch, ...] = ()

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stage)

    def build(self, out: str) -> Build:
        """All shards but those that stages make."""
        kept = tuple(source for source in self.data.source if source.origin != "stage")
        return Build(data=msgspec.structs.replace(self.data, source=kept), tokenizer=self.tokenizer, out=out, seed=self.run.seed)

    @property
    def ranks_multiple(self) -> int:
        """What the number of ranks that train must be a multiple of."""
        return multiple_of(self.parallel, (stage.context_parallel for stage in self.stage))

    @property
    def nodes_multiple(self) -> int:
        """The same of the number of nodes."""
        return self.ranks_multiple // math.gcd(self.ranks_multiple, self.cluster.ranks_per_node)

    @property
    def fewest_nodes(self) -> int:
        """`[cluster] nodes` rounded up to what can train."""
        return -(-self.cluster.fewest_nodes // self.nodes_multiple) * self.nodes_multiple

    @property
    def most_nodes(self) -> int:
        """The same rounded down."""
        return self.training_nodes(self.cluster.most_nodes)

    def training_nodes(self, available: int) -> int:
        """How many of so many nodes can train at once; fewer than `fewest_nodes` may not."""
        return min(available, self.cluster.most_nodes) // self.nodes_multiple * self.nodes_multiple

    def stage_index(self, name: str) -> int:
        """Raises KeyError for a stage that is not there."""
        for index, stage in enumerate(self.stage):
            if stage.name == name:
                return index
        raise KeyError(name)

    def digest(self) -> str:
        """Hash of everything in the recipe, defaults included."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()
