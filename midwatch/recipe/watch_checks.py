"""What is wrong with watch rules in view of the whole recipe, and of the packages that are installed."""

from __future__ import annotations

from collections.abc import Iterator

from midwatch.recipe.live_settings import check_setting
from midwatch.recipe.recipe import Recipe
from midwatch.recipe.watch import Watch
from midwatch.watch_conditions import ConditionError


def action_problem(recipe: Recipe, rule: Watch) -> str:
    """Why the rule's command would be refused whenever it fires: no stage has the setting, or the stage is not there."""
    command = rule.command()
    if command is None:
        return ""
    if command.verb == "set":
        reasons = []
        for stage in recipe.stage:
            try:
                check_setting(recipe, stage, **command.arguments)
            except ValueError as error:
                reasons.append(str(error))
        return reasons[-1] if len(reasons) == len(recipe.stage) else ""
    if command.verb == "advance":
        later = [stage.name for stage in recipe.stage[1:]]
        if not later or command.arguments.get("to", later[0]) not in later:
            return f"there is no such later stage (later ones: {', '.join(later) or 'none'})"
    return ""


def condition_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with conditions that may be of other packages, which are imported for it.

    A run's start checks this. Reading a recipe does not: a screen or a rank reads it too, and needs no such package.
    """
    for rule in recipe.watch:
        for condition in (rule, *rule.others):
            try:
                condition.make()
            except ConditionError as error:
                yield f'watch "{rule.name}": condition: {error}'
