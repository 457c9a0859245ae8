"""The networks of a stage: which one learns, what it is held against, what judges it; and where each one's weights come from.

The one that learns is a language model, or the reward model while that is trained. PPO has a second learner beside it, the value
model. The reference and the reward model that judges are frozen, and are named by the checkpoints that they were saved in, so
that these hold them once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.recipe import Recipe, Stage
from trainer.checkpoint import storage
from trainer.distributed.mesh import World, first_problem, together
from trainer.huggingface import load
from trainer.model.sharded_model import Network
from trainer.optimizer import Optimizer

INITIAL = "initial"
"""Instead of a checkpoint's id: the weights that the run began with."""


class Standing(Protocol):
    """What of a checkpoint's state says which frozen networks there are."""

    reference: str | None
    has_reference: bool
    judge: str | None


@dataclass(frozen=True)
class Learner:
    network: Network
    optimizer: Optimizer

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Of a checkpoint, by name, live."""
        found = model_tensors(self.network) | self.optimizer.tensors()
        return {prefix + name: tensor for name, tensor in found.items()}


@dataclass(frozen=True)
class Cast:
    policy: Learner
    """Or the reward model that is being trained."""
    critic: Learner | None = None
    """The value model."""
    reference: Network | None = None
    reference_key: str = ""
    """Checkpoint that it is of, or INITIAL."""
    judge: Network | None = None
    """The reward model that scores responses."""
    judge_key: str = ""

    @property
    def networks(self) -> list[Network]:
        others = (self.critic.network if self.critic else None, self.reference, self.judge)
        return [self.policy.network, *(each for each in others if each is not None)]

    @property
    def learners(self) -> list[Learner]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def tensors(self) -> dict[str, Tensor]:
        """All of a checkpoint's, by name, live; what is frozen lies in another."""
        return self.policy.tensors() | (self.critic.tensors("critic.") if self.critic else {})


class Studio:
    """Makes casts: for the beginning, for a stage, for a checkpoint. By all ranks alike."""

    def __init__(self, recipe: Recipe, vocabulary: int, world: World, checkpoints: Path) -> None:
        self._recipe, self._vocabulary, self._world, self._checkpoints = recipe, vocabulary, world, checkpoints

    def first(self, *, initial: bool) -> Cast:
        """With the weights that the run begins with, or with unset ones."""
        return Cast(self._learner(self._initial() if initial else self._unset()))

    def for_stage(self, stage: Stage, cast: Cast, base: str | None, judge: str | None, *, at_hand: bool) -> Cast:
        """As a stage begins. Raises CheckpointError.

        base: checkpoint whose weights it begins with; None: those that the run began with. at_hand: the cast has them already.
        judge: checkpoint of the reward model.
        """
        policy = cast.policy
        source = policy.network if at_hand else None
        if policy.network.scalar != stage.scalar:
            policy = self._learner(self._unset(stage.scalar), policy.optimizer.skipped)
        if source is not policy.network:
            self._fill(policy.network, source, base)
        if stage.scalar:
            policy.network.initialise(self._recipe.run.seed, only="score.weight")
        policy.optimizer.reset()
        found = replace(cast, policy=policy, critic=None, judge=None, judge_key="")
        if stage.needs_reference:
            reference = self._unset()
            reference.copy_from(policy.network)
            found = replace(found, reference=reference.freeze(), reference_key=base or INITIAL)
        if stage.draws and judge is not None:
            found = replace(found, judge=self._frozen(judge, scalar=True), judge_key=judge)
        if stage.objective == "ppo":
            found = replace(found, critic=self._learner(self._value_model(found)))
        return found

    def for_checkpoint(self, stage: Stage, cast: Cast, standing: Standing) -> Cast:
        """To load a checkpoint of the stage into: its learners' weights are still as they are, or unset. Raises CheckpointError."""
        policy = cast.policy
        if policy.network.scalar != stage.scalar:
            policy = self._learner(self._unset(stage.scalar))
        critic = None
        if stage.objective == "ppo":
            critic = cast.critic or self._learner(self._unset(scalar=True))
        reference, key = None, (standing.reference or INITIAL) if standing.has_reference and not stage.reference_cached else ""
        if key:
            reference = cast.reference if cast.reference_key == key else self._frozen(key)
        judge, judge_key = None, standing.judge or ""
        if judge_key:
            judge = cast.judge if cast.judge_key == judge_key else self._frozen(judge_key, scalar=True)
        return Cast(policy, critic, reference, key, judge, judge_key)

    def reference(self, standing: Standing) -> Network:
        """The frozen network that a stage is held against. Raises CheckpointError."""
        return self._frozen(standing.reference or INITIAL)

    def _value_model(self, cast: Cast) -> Network:
        """Begins as the reward model, or with the policy's weights where a function scores: Ouyang et al. 2022, appendix C.4."""
        network = self._unset(scalar=True)
        network.copy_from(cast.judge or cast.policy.network)
        if cast.judge is None:
            network.initialise(self._recipe.run.seed, only="score.weight")
        return network

    def _unset(self, scalar: bool = False) -> Network:
        return Network(self._recipe.model, self._vocabulary, self._world, scalar)

    def _initial(self) -> Network:
        network = self._unset()
        if self._recipe.model.source is None:
            network.initialise(self._recipe.run.seed)
        else:
            load.load(network, self._recipe.model, self._world, self._recipe.run.seed)
        return network

    def _fill(self, network: Network, source: Network | None, base: str | None) -> None:
        """With the weights of a language model; a scalar head is left as it is."""
        if source is None and base is not None:
            self._read(network, base)
        else:
            network.copy_from(source or self._initial())

    def _frozen(self, id: str, scalar: bool = False) -> Network:
        if id == INITIAL:
            return self._initial().freeze()
        network = self._unset(scalar)
        self._read(network, id)
        return network.freeze()

    def _read(self, network: Network, id: str) -> None:
        """The checkpoint's weights, but for a scalar head that it does not have."""
        directory, found = self._checkpoints / id, []
        problem = together(lambda: found.append(manifest.read(directory)[0]), self._world, CheckpointError)
        if problem:
            raise CheckpointError(problem)
        (known,) = found
        targets = model_tensors(network)
        if "model.score.weight" not in known.tensors:
            targets.pop("model.score.weight", None)
        network.reshard()
        storage.load(directory, known, targets, lambda problem: first_problem(problem, self._world), self._world.control)

    def _learner(self, network: Network, skipped: Tensor | None = None) -> Learner:
        offload = self._recipe.parallel.offload == "optimizer"
        optimizer = Optimizer(network.parameters(), self._world.device, network.owned(), offload=offload)
        if skipped is not None:
            optimizer.skipped.copy_(skipped)
        return Learner(network, optimizer)


def model_tensors(network: Network) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in network.parameters().items()}
