"""Everything that trains, in one place: model, optimizer, stage, progress; saved to a checkpoint, and loaded from one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from torch import Tensor

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.protocol import Ended, Note, Phase, Replay, StageBorder, Start
from midwatch.recipe import Recipe, stage_inputs
from midwatch.recipe.live_settings import check_setting
from shards.common.errors import ShardError
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer
from trainer.checkpoint import storage
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.control.boundary import RETRY_SECONDS, Boundary
from trainer.control.heartbeat import Heartbeat
from trainer.control.reporting import ControllerLink, MetricReporter
from trainer.control.step_timer import Pace
from trainer.distributed.mesh import World, first_problem, together
from trainer.model.sharded_model import ShardedModel
from trainer.optimizer import Optimizer
from trainer.progress import Rollout, TrainProgress, from_manifest, opening_settings, plain
from trainer.rollout_engines.local_engine import LocalRolloutEngine
from trainer.rollout_engines.rollout_engine import RolloutEngine
from trainer.rollout_engines.vllm_engine import VllmRolloutEngine
from trainer.stage.model_roles import ModelFactory, ModelRoles
from trainer.stage.reward_provenance import scored_by
from trainer.stage.rollout_buffer import RolloutBuffer, experience_of
from trainer.stage.stage import StageRun, open_stage

if TYPE_CHECKING:
    from trainer.stage.reference_sums import ReferenceSums

PhaseName = Literal["loading", "training", "evaluating", "sampling", "generating", "scoring", "saving", "paused", "ending"]


class Training:
    """The state that the loop, the commands and the evaluation share. Every rank has one, and all do the same with it."""

    stage: StageRun

    def __init__(self, recipe: Recipe, root: Path, data: Path, world: World, link: ControllerLink, start: Start) -> None:
        self.recipe, self.root, self.data, self.world, self.link = recipe, root, data, world, link
        self.tokenizer = Tokenizer.load(data / TOKENIZER_FILE)
        vocabulary = max(self.tokenizer.vocab, recipe.model.vocabulary or 0)
        self._factory = ModelFactory(recipe, vocabulary, world, root / "checkpoints")
        self.roles = self._factory.first(initial=start.checkpoint is None)
        self.progress = TrainProgress(lineage=start.lineage.id)
        self.experience: RolloutBuffer | None = None
        """What the policy learns from at the moment, where it learns from its own responses."""
        self.sums: ReferenceSums | None = None
        """The reference's log-probabilities of the stage's pairs, where they are cached."""
        self._rollout_engine: RolloutEngine | None = None
        self.checkpointer = Checkpointer(root / "checkpoints", world, link, start.generation, recipe.checkpoint.asynchronous)
        self.reporter = MetricReporter(link, self.checkpointer.observe)
        self.heartbeat = Heartbeat.from_environment()
        self.pace = Pace(self.model.blocks, world.device)
        self.boundary = Boundary(world, link, start.applied, lambda: self.progress.step, self._changed, self._idle)
        self.checkpointer.tell, self.checkpointer.learn = self.boundary.tell, self.boundary.learn
        self.boundary.ask = self.checkpointer.ask
        self.checkpointer.beat = lambda: self.heartbeat.beat(self.progress.step)
        self._replays: list[Replay] = list(start.replays)
        self.revision = 0
        """Changes of settings since the last step; two checkpoints of one step with others between them differ."""
        self.evaluated: tuple[int, str, int] | None = None
        """Lineage, stage and step of the last evaluation."""
        self.sampled: tuple[int, str, int] | None = None
        self.stall = 0.0
        """Seconds that checkpoints held up training since the last step's report."""
        self._doing: PhaseName = "training"
        self._held_for = ""
        """Why the run is paused, where it paused by itself."""
        self.just_loaded = False
        """What was loaded need not be saved."""
        self.ending: Ended | None = None

    @property
    def mark(self) -> tuple[int, str, int]:
        """Where the run stands, for telling what was done there already."""
        return self.progress.lineage, self.progress.stage_name, self.progress.step

    @property
    def stage_is_over(self) -> bool:
        return self.progress.stage_step >= self.stage.stage.steps

    @property
    def model(self) -> ShardedModel:
        """The one that learns: the policy, or the reward model."""
        return self.roles.policy.model

    @property
    def optimizer(self) -> Optimizer:
        return self.roles.policy.optimizer

    @property
    def reference(self) -> ShardedModel | None:
        return self.roles.reference

    @property
    def models(self) -> list[ShardedModel]:
        return self.roles.models

    def rollout_engine(self) -> RolloutEngine:
        """What writes with the policy's weights; made when it is wanted. A server writes only what is learned from."""
        if self._rollout_engine is None:
            outside = self.recipe.generate.engine == "vllm" and (self.stage.stage.draws or self.stage.stage.makes)
            kind: type[LocalRolloutEngine] | type[VllmRolloutEngine] = VllmRolloutEngine if outside else LocalRolloutEngine
            self._rollout_engine = kind(self.recipe, self.stage.stage, self.model, self.world, self.tokenizer)
        return self._rollout_engine

    def load_reference(self) -> ShardedModel:
        """Anew. Raises CheckpointError."""
        return self._factory.reference(self.progress)

    def phase(self, name: PhaseName) -> None:
        at = self.progress
        if name != "paused":
            self._doing = name
        self.heartbeat.enter(name, at.step)
        self.link.send(
            Phase(
                phase=name,
                step=at.step,
                stage=at.stage_name,
                stage_step=at.stage_step,
                lineage=at.lineage,
                settings=dict(at.settings),
                position=at.position,
            )
        )

    def obeyed(self) -> None:
        """Tells that what an order took is over: it trains, or is paused and will then train."""
        self._doing = "training"
        self.phase("paused" if self.boundary.paused else "training")

    def note(self, level: Literal["info", "warning", "alarm"], text: str) -> None:
        self.link.send(Note(level=level, text=text, step=self.progress.step))

    def hold_for_data(self, problem: str, *, retries: bool = True) -> None:
        """Pauses with an alarm: a shard, say, cannot be read. Resuming tries again; so does the run, unless retries is false."""
        if problem != self._held_for:
            way = f"and tries again every {RETRY_SECONDS:g} s, or when it is resumed"
            self.note("alarm", f"{problem}; the run is paused {way if retries else 'until it is resumed, and then tries again'}")
        self._held_for = problem
        self.boundary.hold(retries)

    def _changed(self, what: str) -> None:
        if what == "resumed" and self._held_for:
            self._held_for = ""
            if self.boundary.recovered:
                self.note("info", "what could not be read can be read again; the run goes on")
        if what == "paused":
            self.reporter.flush()
            self.checkpointer.poll()
            self.phase("paused")
        else:
            self.phase(self._doing)

    def _idle(self) -> None:
        self.heartbeat.beat(self.progress.step)
        self.checkpointer.poll()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name, live."""
        return self.roles.tensors() | (self.experience.tensors() if self.experience is not None else {})

    def save(self, *, ended: bool = False, following: int | None = None, numbers: tuple[int, ...] = ()) -> tuple[str, bool]:
        """Begins a checkpoint of this boundary: its id, and whether it is committed already."""
        began = time.monotonic()
        at = msgspec.convert(plain(self.progress), TrainProgress)
        at.ended, at.following, at.revision = ended, following, self.revision
        at.feed = self.stage.feed.state()
        id, there = self.checkpointer.begin(at, self.tensors(), numbers, self.revision)
        self.stall += time.monotonic() - began
        return id, there

    def save_and_wait(self, *, ended: bool = False, following: int | None = None) -> tuple[str, str | None]:
        """A checkpoint that is committed on return: its id and, on every rank, why it is not."""
        self.phase("saving")
        self.reporter.flush()
        id, there = self.save(ended=ended, following=following)
        error = self.checkpointer.join()
        problem = str(error) if error else None
        if problem is None and not there:
            problem = self.checkpointer.wait_commit(id)
        return id, problem

    def load(self, id: str) -> None:
        """Takes over a checkpoint in place. Raises CheckpointError, and nothing has changed, where it cannot be read.

        What it needs beside its own tensors (the stage's data, the reference) is opened first, so that only the overwriting
        itself is left to go wrong; if that does, RuntimeError: the ranks hold neither the old state nor the new one.
        """
        self.checkpointer.join()
        self.reporter.flush()
        self.checkpointer.poll()
        directory = self.root / "checkpoints" / id
        known, progress = self._read(directory)
        opened: list[StageRun] = []
        problem = together(lambda: opened.append(self._open(progress, directory)), self.world, CheckpointError)
        try:
            if problem:
                raise CheckpointError(problem)
            roles = self._factory.for_checkpoint(opened[0].stage, self.roles, progress)
            experience = experience_of(opened[0].stage, self.world.device)
            for trainable in roles.trainables:
                trainable.model.reshard()
            targets = roles.tensors() | (experience.tensors() if experience is not None else {})
            storage.load(directory, known, targets, self._agree, self.world.control)
        except CheckpointError:
            for stage in opened:
                stage.close()
            raise
        self.progress = progress
        self._switch(opened[0], roles, experience)
        self.checkpointer.forget(progress.step)
        self.just_loaded = True

    def _read(self, directory: Path) -> tuple[manifest.Manifest, TrainProgress]:
        found: list[tuple[manifest.Manifest, TrainProgress]] = []

        def read() -> None:
            known, _ = manifest.read(directory)
            found.append((known, from_manifest(known.state, str(directory), self.recipe)))

        problem = together(read, self.world, CheckpointError)
        if problem:
            raise CheckpointError(problem)
        return found[0]

    def _open(self, progress: TrainProgress, directory: Path) -> StageRun:
        try:
            return open_stage(self.recipe, self.data, progress.stage, progress.feed, self._made(progress))
        except ShardError as error:
            raise CheckpointError(f"{directory}: {error}") from None

    def _made(self, progress: TrainProgress) -> dict[str, Path]:
        """Where sources lie that stages have made."""
        sources = (source for source in self.recipe.data.source if source.origin == "stage")
        return {each.name: self.root / "made" / progress.made[each.stage] for each in sources if each.stage in progress.made}

    def _agree(self, problem: str | None) -> str | None:
        return first_problem(problem, self.world)

    def begin_stage(self, opened: StageRun) -> None:
        """The next stage: its own order, settings and optimizer state; the weights as they are."""
        before, index, stage = self.progress, opened.index, opened.stage
        taken = before.origin.products
        base = self._product(stage_inputs.base(self.recipe.stage, index, taken))
        reward_model = self._product(stage_inputs.reward_model_stage(self.recipe.stage, index, taken))
        at_hand = not before.stage_name or (base is not None and base == before.origin.products.get(before.stage_name))
        at = msgspec.structs.replace(
            before,
            stage=index,
            stage_name=stage.name,
            stage_step=0,
            ended=False,
            following=None,
            position=0,
            settings=opening_settings(self.recipe, stage, before.settings),
            feed={},
            reward_model=reward_model,
            drawn=Rollout(),
            files=[],
        )
        at.origin = msgspec.structs.replace(
            before.origin,
            recipe=self.recipe.digest(),
            model=self.recipe.model.source_digest or "",
            tokenizer=self.tokenizer.hash,
            shards=before.origin.shards | {stage.name: opened.feed.digests},
            functions=before.origin.functions | scored_by(stage),
        )
        if stage.needs_reference:
            at.has_reference, at.reference = True, base
        roles = self._factory.for_stage(stage, self.roles, base, reward_model, at_hand=at_hand)
        self.progress = at
        self._switch(opened, roles, experience_of(stage, self.world.device))
        self.link.send(StageBorder(stage=stage.name, event="begin", step=at.step, stage_step=0, lineage=at.lineage))

    def _product(self, index: int | None) -> str | None:
        """The checkpoint that a stage ended with."""
        return None if index is None else self.progress.origin.products.get(self.recipe.stage[index].name)

    def passed_over(self, index: int) -> str | None:
        """Why the stage of that index cannot begin after this one: another that it rests on was passed over."""
        at = self.progress
        return stage_inputs.passed_over(self.recipe.stage, index, (at.stage_name, *at.origin.products))

    def open_next(self, index: int | None) -> StageRun | None:
        """The data of the stage of that index, or of the next one; None after the last. Raises ShardError, on all ranks alike."""
        index = self.progress.stage + 1 if index is None else index
        if index >= len(self.recipe.stage):
            return None
        reason = self.passed_over(index)
        if reason is not None:
            raise ShardError(reason)
        made = self._made(self.progress)
        opened: list[StageRun] = []
        problem = together(lambda: opened.append(open_stage(self.recipe, self.data, index, None, made)), self.world, ShardError)

        if problem:
            for stage in opened:
                stage.close()
            raise ShardError(problem)
        return opened[0]

    def begin_next(self, product: str, opened: StageRun | None) -> None:
        """After the stage that `product` ends: the one that is open, or the run is finished."""
        at = self.progress
        at.origin = msgspec.structs.replace(at.origin, products=at.origin.products | {at.stage_name: product})
        if opened is not None:
            self.begin_stage(opened)
        else:
            at.ended = True
            self.ending = Ended(cause="finished", step=at.step, checkpoint=product)

    def _switch(self, opened: StageRun, roles: ModelRoles, experience: RolloutBuffer | None) -> None:
        old, self.stage = getattr(self, "stage", None), opened
        if roles.policy.model is not self.model:
            self.pace = Pace(roles.policy.model.blocks, self.world.device)
        self.roles, self.experience = roles, experience
        self._rollout_engine, self.sums = None, None
        if old is not None:
            old.close()
        for model in self.models:
            model.configure_stage(opened.stage, self.recipe.stage[0].context)

    def open(self, start: Start) -> None:
        """Where a generation starts: from a checkpoint or from the beginning. Raises CheckpointError."""
        if start.checkpoint is None:
            self.begin_stage(open_stage(self.recipe, self.data, 0, None))
            self.checkpointer.observe(0, True, None)
        else:
            self.resume_from(start.checkpoint, start.lineage.id, start.skip, start.lr_scale)
        self._replays = [replay for replay in self._replays if replay.step >= self.progress.step]

    def resume_from(self, id: str, lineage: int, skip: int, lr_scale: float) -> None:
        """Loads a checkpoint and goes on from it in a lineage; past `skip` steps of data, with a scaled learning rate."""
        self.load(id)
        at = self.progress
        # What is saved here next must not be taken for a checkpoint of this step and line that is there already.
        self.revision = at.revision if at.lineage == lineage and not at.ended else 0
        at.lineage = lineage
        if at.ended:
            self.begin_next(id, self.open_next(at.following))
            at = self.progress
        self._pass_over(skip)
        if "lr_scale" in at.settings:
            at.settings["lr_scale"] *= lr_scale

    def _pass_over(self, steps: int) -> None:
        """So many steps' data are not trained on. Of a policy's own responses that is whole rollouts, the one at hand first."""
        at, stage = self.progress, self.stage.stage
        if not steps:
            return
        if not stage.draws:
            count = steps * stage.global_batch
        else:
            count = (-(-steps // stage.updates_drawn) - bool(at.drawn.left)) * stage.prompts_drawn
            at.drawn.left = 0
        # A mixture that is to come at some step comes at that step still.
        self.stage.feed.order.delay(at.position, count)
        at.position += count

    def follow_schedule(self) -> None:
        """The settings of the mixture that the recipe has for this boundary."""
        at = self.progress
        asked = self.stage.feed.order.asked(at.position)
        mixture = {f"mixture.{name}": asked.get(name, 0.0) for name in self.stage.stage.sources}
        if any(at.settings[key] != weight for key, weight in mixture.items()):
            at.settings |= mixture
            shown = ", ".join(f"{name} {weight:g}" for name, weight in asked.items())
            self.note("info", f'stage "{at.stage_name}" goes on with the mixture of step {at.stage_step}: {shown}')
            self.phase(self._doing)

    def replay(self) -> None:
        """Applies again, without an outcome, what an earlier generation was told at this step."""
        due = [replay for replay in self._replays if replay.step <= self.progress.step]
        self._replays = [replay for replay in self._replays if replay.step > self.progress.step]
        for replay in due:
            try:
                self.change(replay.key, replay.value)
            except (ValueError, ShardError) as error:
                self.note("warning", f"{replay.key} = {replay.value:g}, set before, is not set again: {error}")
        if due:
            self.obeyed()

    def change(self, key: str, value: float) -> float:
        """Sets a live setting from this boundary on; its old value. Raises ValueError or ShardError, changing nothing."""
        at = self.progress
        value = check_setting(self.recipe, self.stage.stage, key, value)
        old = at.settings[key]
        if key.startswith("mixture."):
            weights = at.settings | {key: value}
            mixture = {name.removeprefix("mixture."): weights[name] for name in weights if name.startswith("mixture.")}
            if sum(mixture.values()) <= 0:
                raise ValueError(f"{key}: at least one source needs a weight above 0")
            self.stage.feed.reweight(at.position, mixture)
        at.settings[key] = value
        self.revision += 1
        return old

    def close(self) -> None:
        """Ends the threads and lets go of the data."""
        self.checkpointer.abandon()
        if hasattr(self, "stage"):
            self.stage.close()
        self.heartbeat.close()
