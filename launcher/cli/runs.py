"""Runs by name: making one from a recipe, remembering it, finding it again, telling how it stands."""

from __future__ import annotations

import contextlib
import glob
import os
import time
from pathlib import Path

import msgspec

from launcher.backends.choice import check_backend
from launcher.backends.slurm.jobs import elsewhere
from midwatch.journal.journal import JournalError, read_journal
from midwatch.journal.run_identity import claim
from midwatch.journal.run_state import Ledger
from midwatch.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from midwatch.recipe.watch_checks import condition_problems
from midwatch.run_directory import PRIVATE_FILE, RunPaths, cache_directories, controller_lives, runtime_directory, write_atomically
from midwatch.transport.access import group_id
from midwatch.transport.ssh_url import RemoteError, RemoteRun, parse_remote
from shards.build.marker import build_key, conflict, is_built
from shards.common.errors import ShardError
from shards.tokenization.tokenizer import check_template


class NoSuchRun(Exception):
    """The message says what was looked for and what there is."""


def prepare(recipe_file: Path, directory: Path | None) -> RunPaths:
    """Checks a recipe and what it needs, and makes a run directory for it. Raises RecipeError before anything is made."""
    return make_run(check_recipe(recipe_file), directory)


def make_run(recipe: Recipe, directory: Path | None) -> RunPaths:
    """Makes a run directory for a recipe that was checked. Raises RecipeError before anything is made."""
    root = directory if directory is not None else _free_directory(Path("runs"), recipe.run.name)
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise RecipeError(f"{directory}: is not empty; name a new directory, or `midwatch attach {directory}`")
    paths = RunPaths(root.absolute())
    recipe = with_data_directory(recipe, paths.root)
    group = recipe.cluster.operators
    operators = group_id(group, recipe.run.name) if group is not None else None
    try:
        text = dump_recipe(recipe).encode()
        str(paths.root).encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"{error.object[:200]}: holds a file name that is not UTF-8; rename that directory or file") from None
    try:
        runtime_directory()
    except OSError as error:
        raise RecipeError(
            f"{error.filename}: {error.strerror}: no place for the run's socket" if error.filename else str(error)
        ) from None
    try:
        paths.create(operators)
        write_atomically(paths.recipe, text, PRIVATE_FILE if operators is not None else 0o600)
        if operators is not None:
            os.chown(paths.recipe, -1, operators)
        claim(paths, ())
    except OSError as error:
        raise RecipeError(f"{paths.root}: cannot be made: {error.strerror}") from None
    remember(paths.root)
    return paths


def check_recipe(recipe_file: Path) -> Recipe:
    """Loads a recipe and looks for the files that it names. Raises RecipeError."""
    recipe = load_recipe(recipe_file)
    try:
        check_backend(recipe)
    except RecipeError as error:
        raise RecipeError(f"{recipe_file}: {error}") from None
    for source in recipe.data.source:
        if source.path is not None and "://" not in source.path and not glob.glob(source.path, recursive=True):
            raise RecipeError(f'{recipe_file}: source "{source.name}": there is nothing at {source.path}')
    if recipe.tokenizer.path is not None and not Path(recipe.tokenizer.path).is_file():
        raise RecipeError(f"{recipe_file}: [tokenizer] path: there is no file {recipe.tokenizer.path}")
    if recipe.tokenizer.template != "midwatch":
        try:
            check_template(recipe.tokenizer)
        except ShardError as error:
            raise RecipeError(f"{recipe_file}: {error}") from None
    if problems := [f"{recipe_file}: {problem}" for problem in condition_problems(recipe)]:
        raise RecipeError("\n".join(problems))
    if recipe.cluster.operators is not None:
        group_id(recipe.cluster.operators, str(recipe_file))
    if recipe.data.dir is not None and Path(recipe.data.dir).exists() and any(Path(recipe.data.dir).iterdir()):
        build = recipe.build(recipe.data.dir)
        problem = "" if is_built(build) else conflict(build)
        if problem:
            raise RecipeError(f"{recipe_file}: [data] dir: {problem}")
    return recipe


def with_data_directory(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the place of its shards filled in: beside the runs, named after what they are, for all runs to share."""
    if recipe.data.dir is not None:
        return recipe
    build = recipe.build("")
    place = run.parent / ".data" / build_key(build)[:16]
    return msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, dir=str(place)))


def _free_directory(runs: Path, name: str) -> Path:
    for number in range(1, 100_000):
        candidate = runs / (name if number == 1 else f"{name}-{number}")
        if not candidate.exists():
            return candidate
    raise RecipeError(f"{runs}: too many runs named {name}")


# Remembering


def remember(root: Path) -> None:
    """Notes where a run lies, so that `ps` and names find it."""
    paths = RunPaths(root.absolute())
    for place in cache_directories():
        with contextlib.suppress(OSError):
            (place / "runs").mkdir(parents=True, exist_ok=True)
            write_atomically(place / "runs" / paths.key, str(paths.root).encode())
            return


def known_runs() -> list[Path]:
    """Directories of all runs that this user has started here, newest first; those gone are left out."""
    found: dict[Path, float] = {}
    for place in cache_directories():
        for note in _notes(place / "runs"):
            with contextlib.suppress(OSError, ValueError):
                root = Path(note.read_text(encoding="utf-8"))
                if RunPaths(root).is_run():
                    found[root] = RunPaths(root).recipe.stat().st_mtime
    return sorted(found, key=lambda r: -found[r])


def _notes(directory: Path) -> list[Path]:
    try:
        return [note for note in directory.iterdir() if not note.name.startswith(".")]
    except OSError:
        return []


def find_run(name: str | None) -> Path:
    """The run that a directory or a name means; the newest for None. Raises NoSuchRun."""
    if name is not None and name.startswith("ssh://"):
        raise NoSuchRun(f"{name}: this command reads the run's files; run it on the machine that has them")
    if name is not None and RunPaths(Path(name)).is_run():
        return Path(name).absolute()
    runs = known_runs()
    if name is None:
        if runs:
            return runs[0]
        raise NoSuchRun("there is no run yet; start one with: midwatch run RECIPE")
    matches = [r for r in runs if r.name == name]
    if matches:
        return matches[0]
    listed = ", ".join(r.name for r in runs[:8]) or "none"
    raise NoSuchRun(f"{name}: neither a run directory nor the name of a run (runs: {listed})")


def find_anywhere(name: str | None) -> Path | RemoteRun:
    """As `find_run`; an `ssh://` address is taken too, and a run in a batch job is found there. Raises NoSuchRun."""
    try:
        remote = parse_remote(name) if name is not None else None
    except RemoteError as error:
        raise NoSuchRun(str(error)) from None
    if remote is not None:
        return remote
    root = find_run(name)
    return elsewhere(root) or root


class RunLine(msgspec.Struct, frozen=True):
    """A run in a list."""

    name: str
    directory: str
    state: str
    reason: str
    step: int
    controller: bool
    """Whether its controller lives."""
    started: float


def line_of(root: Path) -> RunLine:
    """A run as its journal tells it, with no controller's help."""
    paths = RunPaths(root)
    ledger = read_ledger(root)
    alive = controller_lives(paths, write=False)
    step = max((c.step for c in ledger.checkpoints.values()), default=0)
    return RunLine(root.name, str(root), ledger.state, ledger.reason, step, alive, ledger.started or time.time())


def read_ledger(root: Path) -> Ledger:
    """Folds a run's journal. Raises NoSuchRun if it cannot be read."""
    ledger = Ledger()
    try:
        for term, entry in read_journal(RunPaths(root).journal).entries:
            ledger.apply(term, entry)
    except JournalError as error:
        raise NoSuchRun(str(error)) from None
    return ledger
