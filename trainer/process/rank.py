"""A rank's beginning and end: recipe, store, process groups, what to start from; then the loop; then all leave together."""

from __future__ import annotations

import gc
import logging
import os
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from midwatch.checkpoint_format.manifest import CheckpointError, MismatchError
from midwatch.objectives.registry import ObjectiveError
from midwatch.protocol import CERTAIN_STATUS, VERSION, Lineage, RankHello, Start
from midwatch.recipe import Recipe, RecipeError, load_recipe
from midwatch.transport.rank_client import RankLink
from shards.build.build import build as build_shards
from shards.build.marker import is_built
from shards.common.errors import ShardError
from shards.common.terminal import write_error
from trainer.control.rank_log import Logged, begin
from trainer.control.reporting import ControllerLink, NoLink
from trainer.control.standalone import LogLink, committed, newest, sweep
from trainer.distributed.mesh import World, join, open_store, reduce, settle, share
from trainer.loop.loop import train
from trainer.objectives.objective import implementation
from trainer.stage.training import Training

log = logging.getLogger("trainer")

START_KEY = "midwatch/start"
"""Where the agent leaves what the generation starts from, in its store."""
FLUSH_SECONDS = 30.0

_held: list[object] = []
"""What must never be destroyed: torch's worker server may wait for ever for its own thread when it is."""


def main(arguments: list[str]) -> int:
    """Runs one rank; the exit status: 0 ended as told, 1 a checkpoint cannot be loaded, 2 the data are wrong.

    CERTAIN_STATUS: the recipe, the software or the checkpoint's model is wrong, so that every start would end so.
    """
    if len(arguments) != 1:
        write_error("usage: torchrun --nproc-per-node=N -m trainer RUN")
        return 2
    root = Path(arguments[0])
    begin()
    # A bug leaves its traceback where the elastic agent looks for it; what the user can mend is said in a line.
    try:
        return record(_explained)(root) or 0
    except Exception:
        # At once: threads may wait for ranks that are gone, and the agent waits for this process.
        log.exception("this rank ends on an error:")
        os._exit(1)


def _explained(root: Path) -> int:
    try:
        _main(root)
    except ObjectiveError as error:
        log.exception("an objective cannot be loaded:")
        log.error("%s", error)
        return CERTAIN_STATUS
    except (RecipeError, ShardError, CheckpointError) as error:
        log.error("%s", error)
        if isinstance(error, MismatchError) or (isinstance(error, RecipeError) and os.access(root / "recipe.toml", os.R_OK)):
            return CERTAIN_STATUS  # not so where the storage is away, which may come back
        return 1 if isinstance(error, CheckpointError) else 2
    except ImportError as error:
        log.exception("this rank lacks software:")
        log.error("%s: %s", type(error).__name__, error)
        return CERTAIN_STATUS
    return 0


def _main(root: Path) -> None:
    _held.append(_worker_server())
    recipe = load_recipe(root / "recipe.toml")
    for stage in recipe.stage:
        implementation(stage)  # a later stage's objective that cannot be loaded ends the run now, not hours later
    settle(recipe.cluster)
    store = open_store()
    generation = os.environ.get("MIDWATCH_GENERATION")
    if generation is not None:
        start = msgspec.msgpack.decode(store.get(START_KEY), type=Start)
        world = join(store, f"midwatch/{generation}", recipe.cluster, recipe.parallel)
    else:
        run, count = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        world = join(store, f"midwatch/{run}/{count}", recipe.cluster, recipe.parallel)
        start = _own_start(root, world)
    if world.size % recipe.ranks_multiple:
        needs = f"a multiple of {recipe.ranks_multiple} ranks, and there are {world.size}"
        raise RecipeError(f"[parallel] and the stages' context_parallel need {needs}")
    _introduce(world, start)
    data = _data(recipe, root, world, controlled=generation is not None)
    link = _link(recipe, root, world, start, controlled=generation is not None)
    run_rank(recipe, root, data, world, link, start)
    dist.destroy_process_group()
    log.info("rank %d has ended as told", world.rank)


def _worker_server() -> object | None:
    """Torch's own server of stacks and collectives, where the agent has named a socket for it: it answers while the rank hangs."""
    place = os.environ.get("TORCH_WORKER_SERVER_SOCKET")
    if not place:
        return None
    from torch._C._distributed_c10d import _WorkerServer

    Path(place).unlink(missing_ok=True)
    said = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # it tells of every start as if that were a warning
        server: object = _WorkerServer(place)
    finally:
        os.dup2(said, 2)
        os.close(said)
    return server


def _introduce(world: World, start: Start) -> None:
    """Who writes this log."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    if world.is_rank_zero and world.parallel.model_ranks > 1:
        sizes = f"pipeline {world.parallel.pipeline} x data {world.data} x tensor {world.parallel.tensor}"
        log.info("%d ranks = %s", world.size, sizes)
    log.info(
        "generation %d: rank %d of %d on %s (%s), torch %s, process %d",
        start.generation,
        world.rank,
        world.size,
        world.device,
        device,
        torch.__version__,
        os.getpid(),
    )


def run_rank(recipe: Recipe, root: Path, data: Path, world: World, link: ControllerLink, start: Start) -> None:
    """Trains from `start` until told to end; returns when what there was to say has been said."""
    training = Training(recipe, root, data, world, link, start)
    try:
        if start.checkpoint is not None:
            training.phase("loading")
        training.open(start)
        if world.is_rank_zero:
            log.info("%s", _origin(training, start))
        if start.paused:
            training.boundary.pause()
        else:
            training.phase("training")
        # What is alive by now lives long; the garbage collector need not look through it again and again.
        gc.collect()
        gc.freeze()
        train(training)
        reduce([0], world.control)
        if not link.flush(FLUSH_SECONDS):
            log.warning("the controller is out of reach; what it was not told is lost")
        training.close()
    finally:
        link.close()


def _origin(training: Training, start: Start) -> str:
    """What the ranks start from."""
    at, line = training.progress, start.lineage
    words = [f"from checkpoint {start.checkpoint}" if start.checkpoint else f"from the beginning, seed {training.recipe.run.seed}"]
    words.append(f"lineage {at.lineage} ({line.cause})")
    words.append(f'step {at.step}, step {at.stage_step} of stage "{at.stage_name}"')
    if start.skip:
        words.append(f"past {start.skip} steps of data")
    if start.lr_scale != 1.0:
        words.append(f"learning rate times {start.lr_scale:g}")
    words += [f"{replay.key} = {replay.value:g} again at step {replay.step}" for replay in start.replays]
    return ", ".join(words)


def _own_start(root: Path, world: World) -> Start:
    """Without a controller: from the newest checkpoint that verifies, in the lineage that it is of."""
    body = b""
    if world.is_rank_zero:
        checkpoints = root / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        sweep(checkpoints)
        id = newest(checkpoints)
        states = {directory.name: state for directory, state in committed(checkpoints)}
        line = Lineage(id=int(states[id]["lineage"]) if id else 1)
        body = msgspec.msgpack.encode(Start(generation=time.time_ns() // 1_000_000, term=0, lineage=line, checkpoint=id))
    return msgspec.msgpack.decode(share(body, world.control), type=Start)


def _data(recipe: Recipe, root: Path, world: World, controlled: bool) -> Path:
    """Where the shards lie; without a controller rank 0 builds them first where they are not there yet."""
    place = Path(recipe.data.dir) if recipe.data.dir is not None else root / "data"
    spec = recipe.build(str(place))
    if controlled:
        return place
    problem = b""
    if world.is_rank_zero and not is_built(spec):
        log.info("building tokenizer and shards in %s", place)
        try:
            build_shards(spec)
        except ShardError as error:
            problem = str(error).encode()
    problem = share(problem, world.control)
    if problem:
        raise ShardError(problem.decode())
    return place


def _link(recipe: Recipe, root: Path, world: World, start: Start, controlled: bool) -> ControllerLink:
    if not world.is_rank_zero:
        return NoLink()
    if not controlled:
        return Logged(LogLink(root, recipe.checkpoint.keep), seconds=recipe.report.seconds)
    hello = RankHello(
        version=VERSION,
        run=os.environ.get("MIDWATCH_RUN", ""),
        generation=start.generation,
        term=start.term,
        pid=os.getpid(),
        world=world.size,
    )
    return Logged(RankLink(root / "control" / "address", hello))
