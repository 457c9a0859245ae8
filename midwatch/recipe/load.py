"""Reads a recipe, fills in its defaults and checks it, with errors that name the line and the way out."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Any

import msgspec

from midwatch.recipe import stage_inputs
from midwatch.recipe.huggingface.config import family_of
from midwatch.recipe.huggingface.weights_map import misfits
from midwatch.recipe.mixture import name_problems
from midwatch.recipe.pretrained import OriginError, fill_in
from midwatch.recipe.recipe import Recipe
from midwatch.recipe.renamed_keys import renamed
from midwatch.recipe.repeat import RepeatError, expanded
from midwatch.recipe.stage import PARTS, Stage
from midwatch.recipe.text import TextError, home_expanded, read_recipe_text
from midwatch.recipe.toml import TomlError, dump_toml, parse_toml, too_large
from midwatch.recipe.toml_lines import Path as KeyPath
from midwatch.recipe.toml_lines import key_lines, line_of
from midwatch.recipe.watch_checks import action_problem
from shards.common.decoding import brief, shown
from shards.common.errors import SpecError
from shards.sampling.mixing import covers
from shards.spec import TEMPLATES, Build, Data, Source
from shards.spec import check as check_build


class RecipeError(Exception):
    """The recipe cannot be run; the message names file, line and the way out, one problem a line."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


def load_recipe(file: Path) -> Recipe:
    """Reads and checks a recipe file. Raises RecipeError.

    Relative paths in it are taken from the file's directory, or from the working directory where the recipe comes through a pipe.
    """
    try:
        text = read_recipe_text(file)
        base = file.resolve().parent if file.is_file() else Path.cwd()
    except FileNotFoundError:
        raise RecipeError(f"{file}: there is no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (TextError, ValueError) as error:  # ValueError: a name with a NUL byte
        raise RecipeError(str(error) if isinstance(error, TextError) else f"{file}: no name of a file: {error}") from None
    return parse_recipe(text, str(file), base)


def parse_recipe(text: str, name: str = "recipe.toml", base: Path | None = None) -> Recipe:
    """Parses and checks a recipe's text. Raises RecipeError with every problem found."""
    try:
        raw = parse_toml(text)
    except TomlError as error:
        raise RecipeError(f"{name}:{error.line}: {error}" if error.line else f"{name}: {error}") from None
    lines = key_lines(text)

    def at(path: KeyPath) -> str:
        line = line_of(lines, path)
        return f"{name}:{line}" if line else name

    for path, number in too_large(raw):
        raise RecipeError(f"{at(path)}: {'.'.join(map(str, path))}: {shown(number)} does not fit in 64 bits (use less than 2^63)")
    if old := [f"{at(path)}: {message}" for path, message in renamed(raw)]:
        raise RecipeError("\n".join(old))
    try:
        raw = fill_in(raw, base)
    except OriginError as error:
        raise RecipeError(f"{at(error.path)}: {error}") from None
    try:
        recipe = msgspec.convert(raw, Recipe)
    except msgspec.ValidationError as error:
        path, message = _explain(str(error), raw)
        raise RecipeError(f"{at(path)}: {message}") from None
    if base is not None:
        try:
            recipe = _absolute(recipe, base)
        except TextError as error:
            raise RecipeError(f"{name}: {error}") from None
    try:
        recipe, originals = expanded(_with_table(recipe))
    except RepeatError as error:
        raise RecipeError(f"{at(('stage', error.index, 'repeat'))}: {error}") from None

    def at_original(path: KeyPath) -> str:
        return at(("stage", originals[path[1]], *path[2:])) if path[:1] == ("stage",) and isinstance(path[1], int) else at(path)

    problems = [f"{at_original(path)}: {message}" for path, message in check(recipe)]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _with_table(recipe: Recipe) -> Recipe:
    """The table of learned positions is as long as the first stage, unless it says otherwise."""
    if recipe.model.position != "learned" or recipe.model.max_positions is not None or not recipe.stage:
        return recipe
    model = msgspec.structs.replace(recipe.model, max_positions=max(1, recipe.stage[0].context))
    return msgspec.structs.replace(recipe, model=model)


def check(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """Every problem that shows without touching the data: (path of the key, what is wrong and the way out)."""
    found: list[tuple[KeyPath, str]] = []
    for section in ("run", "model", "cluster", "checkpoint", "report", "generate", "probe"):
        found += [((section, *_path(key)), f"[{section}] {key}: {message}") for key, message in getattr(recipe, section).problems()]
    if not recipe.model.problems():
        found += [(("parallel", key), f"[parallel] {key}: {message}") for key, message in recipe.parallel.problems(recipe.model)]
        found += _served_problem(recipe)
    for i, rule in enumerate(recipe.watch):
        found += [(("watch", i, key), f'watch "{rule.name}": {key}: {message}') for key, message in rule.problems()]
    kinds: dict[str, str] = {source.name: source.kind for source in recipe.data.source}
    names: set[str] = set()
    if not recipe.stage:
        found.append(((), "a recipe needs at least one [[stage]]"))
    for i, stage in enumerate(recipe.stage):
        problems = stage.problems()
        if not recipe.model.problems():
            problems += stage.position_problems(recipe.model)
        problems += stage_inputs.problems(recipe.stage, i)
        found += [(("stage", i, *_path(key)), f'stage "{stage.name}": {key}: {message}') for key, message in problems]
        if stage.name in names:
            found.append((("stage", i, "name"), f'two stages are named "{stage.name}"; give each its own name'))
        names.add(stage.name)
        found += [(("stage", i, *path), f'stage "{stage.name}": {message}') for path, message in name_problems(stage, kinds)]
    seen: set[str] = set()
    for i, each in enumerate(recipe.data.source):
        if each.name in seen:
            found.append((("data", "source", i, "name"), f'two sources have the same name, "{each.name}"; give each its own'))
        seen.add(each.name)
        if each.origin == "stage" and each.part is not None:
            found += [(("data", "source", i, "part"), message) for message in _made_problems(recipe, each)]
    if len(seen) == len(recipe.data.source):
        found += _data_problem(recipe)
    return found or _action_problems(recipe) or _world_problem(recipe)


def _action_problems(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    problems = [(i, rule, action_problem(recipe, rule)) for i, rule in enumerate(recipe.watch)]
    return [
        (("watch", i, "action"), f'watch "{rule.name}": action: {rule.action}: {problem}')
        for i, rule, problem in problems
        if problem
    ]


def _path(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _made_problems(recipe: Recipe, source: Source) -> list[str]:
    """Whether the stage that is to make a source does, and before it is read."""
    where = f'source "{source.name}"'
    makers = {stage.name: index for index, stage in enumerate(recipe.stage) if stage.makes}
    if source.stage not in makers:
        return [f'{where}: stage "{source.stage}" makes no data (those that do: {", ".join(makers) or "none"})']
    maker = makers[source.stage]
    parts = PARTS[recipe.stage[maker].objective]
    if parts.get(source.part or "") != source.kind:
        made = ", ".join(f'"{part}" of kind "{kind}"' for part, kind in parts.items())
        return [f'{where}: {recipe.stage[maker].objective} makes {made}, not "{source.part}" of kind "{source.kind}"']
    early = [stage.name for stage in recipe.stage[: maker + 1] if any(covers(source.name, name) for name in stage.sources)]
    return [f'{where}: stage "{name}" reads it before stage "{source.stage}" makes it' for name in early]


def _world_problem(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """Whether any number of nodes that may train has as many ranks as the model needs; all sizes are possible ones."""
    cluster, multiple = recipe.cluster, recipe.ranks_multiple
    if recipe.fewest_nodes <= recipe.most_nodes:
        return []
    nodes = _span(cluster.fewest_nodes, cluster.most_nodes)
    ranks = "1 rank" if cluster.ranks_per_node == 1 else f"{cluster.ranks_per_node} ranks"
    enough = -(-cluster.ranks_per_node // multiple) * multiple
    ways = [f'nodes = "{cluster.fewest_nodes}:{recipe.fewest_nodes}"'] if cluster.backend != "local" else []
    ways += [f"ranks_per_node = {enough}"]
    cannot = f"cannot make a multiple of {multiple} ranks, which [parallel] and context_parallel need"
    key = "nodes" if cluster.nodes is not None else "ranks_per_node"
    return [(("cluster", key), f"[cluster] {key}: {nodes} of {ranks} {cannot} (use {' or '.join(ways)})")]


def _span(fewest: int, most: int) -> str:
    """`1 node`, `3 nodes`, `2 to 3 nodes`."""
    return "1 node" if most == 1 else f"{most} nodes" if fewest == most else f"{fewest} to {most} nodes"


def _served_problem(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """A server reads the policy in Hugging Face's layout, which not every model has."""
    if recipe.generate.engine == "own":
        return []
    family = family_of(recipe.model)
    lacking = [f'position is "{recipe.model.position}"'] if family is None else misfits(recipe.model, family)
    if not lacking:
        return []
    problem = f'is "vllm", which has no model like this one: {"; ".join(lacking)} (use the own engine)'
    return [(("generate", "engine"), f"[generate] engine: {problem}")]


def _data_problem(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """What the building of the data would refuse, with the key that it speaks of."""
    try:
        check_build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out="", seed=recipe.run.seed), "[data]")
    except SpecError as error:
        message = str(error)
        for i, source in enumerate(recipe.data.source):
            if message.startswith(f'[data]: source "{source.name}"'):
                return [(("data", "source", i), message)]
        for path in (("tokenizer", "sample_bytes"), ("tokenizer", "vocab"), ("tokenizer", "template"), ("run", "seed")):
            if f"{path[1]} is" in message:
                return [(path, message.replace("[data]", f"[{path[0]}]"))]
        key = next((k for k in Data.__struct_fields__ if message.startswith(f"[data]: {k} ")), "")
        return [(("data", key) if key else ("data",), message)]
    return []


def warnings(recipe: Recipe) -> list[str]:
    """What is allowed and yet unusual enough to say."""
    found: list[str] = []
    base = max((s.lr for s in recipe.stage if s.objective == "pretrain"), default=None)
    for stage in recipe.stage:
        if base is not None and stage.objective != "pretrain" and stage.lr > base / 10:
            found.append(f'stage "{stage.name}": lr {stage.lr:g} is more than a tenth of the pretraining rate {base:g}')
    if recipe.tokenizer.path is None and not 32_000 <= recipe.tokenizer.vocab <= 100_000:
        found.append(f"a vocabulary of {recipe.tokenizer.vocab:,} ids is outside the usual 32k to 100k")
    if not 8_192 <= recipe.data.frame_tokens <= 65_536:
        cost = "smaller ones take more room, larger ones more time to read from"
        found.append(f"[data] frame_tokens is {recipe.data.frame_tokens:,}, outside 8,192 to 65,536: {cost}")
    fewest, most = recipe.cluster.fewest_nodes, recipe.cluster.most_nodes
    if recipe.nodes_multiple > 1 and fewest < most:
        sizes = [str(n) for n in range(recipe.fewest_nodes, most + 1, recipe.nodes_multiple)]
        listed = " or ".join([", ".join(sizes[:-1]), sizes[-1]] if len(sizes) > 1 else sizes)
        every = f"the ranks must be a multiple of {recipe.ranks_multiple}"
        found.append(f"of {_span(fewest, most)} {listed} train at a time, and others stand by: {every}")
    return found


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with every default written out; reads back as the same recipe."""
    raw: dict[str, Any] = msgspec.to_builtins(recipe)
    return dump_toml(raw)


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    def place(path: str | None) -> str | None:
        return path if path is None or "://" in path else str((base / home_expanded(path)).absolute())

    sources = tuple(msgspec.structs.replace(s, path=place(s.path)) for s in recipe.data.source)
    clean = recipe.data.clean and recipe.data.clean.placed(lambda path: place(path) or "")
    data = msgspec.structs.replace(recipe.data, source=sources, dir=place(recipe.data.dir), clean=clean)
    tokenizer = msgspec.structs.replace(recipe.tokenizer, path=place(recipe.tokenizer.path))
    if tokenizer.template not in TEMPLATES:
        tokenizer = msgspec.structs.replace(tokenizer, template=place(tokenizer.template))

    def moved(stage: Stage) -> Stage:
        if stage.rollout is None:
            return stage
        return msgspec.structs.replace(
            stage, rollout=msgspec.structs.replace(stage.rollout, function=place(stage.rollout.function))
        )

    stages = tuple(map(moved, recipe.stage))
    generate = msgspec.structs.replace(recipe.generate, weights=place(recipe.generate.weights))
    return msgspec.structs.replace(recipe, data=data, tokenizer=tokenizer, stage=stages, generate=generate)


def _explain(message: str, raw: dict[str, Any]) -> tuple[KeyPath, str]:
    """Turns a message of msgspec's into the key's path and a sentence that says the way out."""
    where = re.search(r" - at `\$?(.*)`$", message)
    body = message[: where.start()] if where else message
    path: list[str | int] = []
    for name, index in re.findall(r"\.([A-Za-z0-9_-]+)|\[(\d+|\.\.\.)\]", where.group(1) if where else ""):
        path.append(name or (int(index) if index != "..." else "..."))
    unknown = re.match(r"Object contains unknown field `(.*)`", body)
    label = ".".join(str(p) for p in path if not isinstance(p, int)) or "the recipe"
    if path and isinstance(_get(raw, path), dict) and "name" in _get(raw, path):
        label = f'{path[0]} "{_get(raw, path)["name"]}"'
    if unknown:
        key = unknown.group(1)
        close = difflib.get_close_matches(key, _fields_at(path), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(_fields_at(path)))}"
        return (*path, key), f"{label}: unknown key {key!r} ({hint})"
    missing = re.match(r"Object missing required field `(.*)`", body)
    if missing:
        return tuple(path), f"{label}: the key {missing.group(1)!r} is missing"
    if "..." in path:  # a value of a table, whose key msgspec does not tell
        path = path[: path.index("...")]
        label = ".".join(str(p) for p in path if not isinstance(p, int))
    choices = _choices_at(path)
    if choices:
        body = f"must be one of {', '.join(map(repr, choices))}"
    return tuple(path), f"{label}: {body[0].lower()}{body[1:]}, but it is {shown(_get(raw, path))}"


def _get(raw: Any, path: list[str | int]) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _fields_at(path: list[str | int]) -> list[str]:
    kind = _type_at(path)
    return [f.encode_name for f in kind.fields] if isinstance(kind, msgspec.inspect.StructType) else []


def _choices_at(path: list[str | int]) -> list[str]:
    kind = _type_at(path)
    return [str(value) for value in kind.values] if isinstance(kind, msgspec.inspect.LiteralType) else []


@functools.cache
def _recipe_type() -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(Recipe)


def _type_at(path: list[str | int]) -> Any:
    kind: Any = _recipe_type()
    for part in path:
        if isinstance(part, int):
            kind = getattr(kind, "item_type", kind)
        elif isinstance(kind, msgspec.inspect.StructType):
            kind = next((f.type for f in kind.fields if f.encode_name == part), None)
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = next((t for t in kind.types if isinstance(t, msgspec.inspect.StructType)), None)
    return kind
