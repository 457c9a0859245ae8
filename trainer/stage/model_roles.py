"""The models of a stage by their roles: the trained one, the reference, the reward model; and where the weights of each come from.

The trained model is a language model, or a reward model in a reward stage. PPO trains a second one, the value model. The reference
and the reward model that scores responses are frozen. A checkpoint names them by the checkpoints that hold their weights, so that
these are stored once.
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
from trainer.model.sharded_model import ShardedModel
from trainer.optimizer import Optimizer

INITIAL = "initial"
"""Instead of a checkpoint's id: the weights that the run began with."""


class FrozenModels(Protocol):
    """What of a checkpoint's state says which frozen networks there are."""

    reference: str | None
    has_reference: bool
    reward_model: str | None


@dataclass(frozen=True)
class TrainableModel:
    model: ShardedModel
    optimizer: Optimizer

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Of a checkpoint, by name, live."""
        found = model_tensors(self.model) | self.optimizer.tensors()
        return {prefix + name: tensor for name, tensor in found.items()}


@dataclass(frozen=True)
class ModelRoles:
    policy: TrainableModel
    """Or the reward model that is being trained."""
    critic: TrainableModel | None = None
    """The value model."""
    reference: ShardedModel | None = None
    reference_key: str = ""
    """Checkpoint that it is of, or INITIAL."""
    reward_model: ShardedModel | None = None
    """The reward model that scores responses."""
    reward_model_key: str = ""

    @property
    def models(self) -> list[ShardedModel]:
        others = (self.critic.model if self.critic else None, self.reference, self.reward_model)
        return [self.policy.model, *(each for each in others if each is not None)]

    @property
    def trainables(self) -> list[TrainableModel]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def tensors(self) -> dict[str, Tensor]:
        """All of a checkpoint's, by name, live; what is frozen lies in another."""
        return self.policy.tensors() | (self.critic.tensors("critic.") if self.critic else {})


class ModelFactory:
    """Makes casts: for the beginning, for a stage, for a checkpoint. By all ranks alike."""

    def __init__(self, recipe: Recipe, vocabulary: int, world: World, checkpoints: Path) -> None:
        self._recipe, self._vocabulary, self._world, self._checkpoints = recipe, vocabulary, world, checkpoints

    def first(self, *, initial: bool) -> ModelRoles:
        """With the weights that the run begins with, or with unset ones."""
        return ModelRoles(self._trainable(self._initial() if initial else self._unset()))

    def for_stage(
        self, stage: Stage, roles: ModelRoles, base: str | None, reward_model: str | None, *, at_hand: bool
    ) -> ModelRoles:
        """As a stage begins. Raises CheckpointError.

        base: checkpoint whose weights it begins with; None: those that the run began with. at_hand: `roles` has them already.
        reward_model: checkpoint of the reward model.
        """
        policy = roles.policy
        source = policy.model if at_hand else None
        if policy.model.scalar != stage.scalar:
            policy = self._trainable(self._unset(stage.scalar), policy.optimizer.skipped)
        if source is not policy.model:
            self._fill(policy.model, source, base)
        if stage.scalar:
            policy.model.initialise(self._recipe.run.seed, only="score.weight")
        policy.optimizer.reset()
        found = replace(roles, policy=policy, critic=None, reward_model=None, reward_model_key="")
        if stage.needs_reference:
            reference = self._unset()
            reference.copy_from(policy.model)
            found = replace(found, reference=reference.freeze(), reference_key=base or INITIAL)
        if stage.draws and reward_model is not None:
            found = replace(found, reward_model=self._frozen(reward_model, scalar=True), reward_model_key=reward_model)
        if stage.spec.critic:
            found = replace(found, critic=self._trainable(self._value_model(found)))
        return found

    def for_checkpoint(self, stage: Stage, roles: ModelRoles, standing: FrozenModels) -> ModelRoles:
        """To load a checkpoint of the stage into: its learners' weights are still as they are, or unset. Raises CheckpointError."""
        policy = roles.policy
        if policy.model.scalar != stage.scalar:
            policy = self._trainable(self._unset(stage.scalar))
        critic = None
        if stage.spec.critic:
            critic = roles.critic or self._trainable(self._unset(scalar=True))
        reference, key = None, (standing.reference or INITIAL) if standing.has_reference and not stage.reference_cached else ""
        if key:
            reference = roles.reference if roles.reference_key == key else self._frozen(key)
        reward_model, reward_model_key = None, standing.reward_model or ""
        if reward_model_key:
            reward_model = (
                roles.reward_model if roles.reward_model_key == reward_model_key else self._frozen(reward_model_key, scalar=True)
            )
        return ModelRoles(policy, critic, reference, key, reward_model, reward_model_key)

    def reference(self, standing: FrozenModels) -> ShardedModel:
        """The frozen reference of a stage. Raises CheckpointError."""
        return self._frozen(standing.reference or INITIAL)

    def _value_model(self, roles: ModelRoles) -> ShardedModel:
        """Begins as the reward model, or with the policy's weights where a function scores: Ouyang et al. 2022, appendix C.4."""
        model = self._unset(scalar=True)
        model.copy_from(roles.reward_model or roles.policy.model)
        if roles.reward_model is None:
            model.initialise(self._recipe.run.seed, only="score.weight")
        return model

    def _unset(self, scalar: bool = False) -> ShardedModel:
        return ShardedModel(self._recipe.model, self._vocabulary, self._world, scalar)

    def _initial(self) -> ShardedModel:
        model = self._unset()
        if self._recipe.model.source is None:
            model.initialise(self._recipe.run.seed)
        else:
            load.load(model, self._recipe.model, self._world, self._recipe.run.seed)
        return model

    def _fill(self, model: ShardedModel, source: ShardedModel | None, base: str | None) -> None:
        """With the weights of a language model; a scalar head is left as it is."""
        if source is None and base is not None:
            self._read(model, base)
        else:
            model.copy_from(source or self._initial())

    def _frozen(self, id: str, scalar: bool = False) -> ShardedModel:
        if id == INITIAL:
            return self._initial().freeze()
        model = self._unset(scalar)
        self._read(model, id)
        return model.freeze()

    def _read(self, model: ShardedModel, id: str) -> None:
        """The checkpoint's weights, but for a scalar head that it does not have."""
        directory, found = self._checkpoints / id, []
        problem = together(lambda: found.append(manifest.read(directory)[0]), self._world, CheckpointError)
        if problem:
            raise CheckpointError(problem)
        (known,) = found
        targets = model_tensors(model)
        if "model.score.weight" not in known.tensors:
            targets.pop("model.score.weight", None)
        model.reshard()
        storage.load(directory, known, targets, lambda problem: first_problem(problem, self._world), self._world.control)

    def _trainable(self, model: ShardedModel, skipped: Tensor | None = None) -> TrainableModel:
        offload = self._recipe.parallel.offload == "optimizer"
        optimizer = Optimizer(model.parameters(), self._world.device, model.owned(), offload=offload)
        if skipped is not None:
            optimizer.skipped.copy_(skipped)
        return TrainableModel(model, optimizer)


def model_tensors(model: ShardedModel) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in model.parameters().items()}
