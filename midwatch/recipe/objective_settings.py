"""The keys of `[[stage]]` that are an objective's own: which a stage has depends on its `objective`."""

from __future__ import annotations

from typing import Any

from midwatch.objectives.registry import ObjectiveError, built_in, spec_of
from midwatch.recipe.conversion import ConversionError, converted
from midwatch.recipe.stage import Stage
from midwatch.recipe.toml_lines import Path as KeyPath

FIELD = "settings"
"""Of `Stage`; it is no key of a recipe."""


def taken(raw: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """The recipe with each stage's own settings as the struct of its objective, and what is wrong with keys of other objectives.

    Those keys are left out. Raises ConversionError for an objective that cannot be had and for a value of the wrong type.
    """
    stages = raw.get("stage")
    if not isinstance(stages, list):
        return raw, []
    found, problems = [], []
    for index, stage in enumerate(stages):
        if isinstance(stage, dict):
            stage, elsewhere = _of_stage(raw, index, stage)
            problems += elsewhere
        found.append(stage)
    return raw | {"stage": found}, problems


def _of_stage(root: dict[str, Any], index: int, stage: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    path, common, objective = ("stage", index), _common(), stage.get("objective")
    label = f'stage "{stage.get("name", "")}"'
    if FIELD in stage:
        raise ConversionError(
            (*path, FIELD), f"{label}: unknown key {FIELD!r} (write an objective's settings as keys of the stage)"
        )
    if not isinstance(objective, str):  # which the conversion tells
        return {key: value for key, value in stage.items() if key in common or not _owners(key)}, []
    try:
        spec = spec_of(objective)
    except ObjectiveError as error:
        raise ConversionError((*path, "objective"), f"{label}: {error}") from None
    kept: dict[str, Any] = {}
    own: dict[str, Any] = {}
    problems: list[tuple[KeyPath, str]] = []
    for key, value in stage.items():
        if key in common:
            kept[key] = value
        elif key in spec.settings.__struct_fields__:
            own[key] = value
        elif owners := _owners(key):
            names = " or ".join(f'"{name}"' for name in owners)
            message = f'{label}: {key}: is for objective {names}, this stage\'s is "{objective}" (drop it)'
            problems.append(((*path, key), message))
        else:
            kept[key] = value
    return kept | {FIELD: converted(own, spec.settings, root=root, prefix=path)}, problems


def _common() -> set[str]:
    """Keys that every stage may have."""
    return {key for key in Stage.__struct_encode_fields__ if key != FIELD}


def _owners(key: str) -> list[str]:
    """Objectives of Midwatch's own with such a setting. Packages of others are not imported to find out."""
    return [spec.name for spec in built_in() if key in spec.settings.__struct_fields__]


def known_keys(root: dict[str, Any], path: KeyPath, fields: list[str]) -> list[str]:
    """The keys that the table at a path has, by the fields of its struct: of a stage those of its objective as well."""
    if len(path) != 2 or path[0] != "stage" or not isinstance(path[1], int):
        return fields
    objective = root["stage"][path[1]].get("objective")
    own = spec_of(objective).settings.__struct_fields__ if isinstance(objective, str) else ()
    return [*(key for key in fields if key != FIELD), *own]


def flat(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe's builtins as TOML has them: the objective's settings among the stage's keys."""
    stages = []
    for stage in raw["stage"]:
        own = stage.get(FIELD) or {}
        stages.append({key: value for key, value in stage.items() if key != FIELD} | own)
    return raw | {"stage": stages}
