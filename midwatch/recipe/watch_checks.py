"""What a run's start checks of watch rules: whether their conditions are installed, and whether their commands can ever apply.

Reading a recipe does not check this: a screen or a rank reads it too, and needs no package that brings a condition.
"""

from __future__ import annotations

from collections.abc import Iterator

from midwatch.recipe.live_settings import check_setting
from midwatch.recipe.load import Recipe
from midwatch.recipe.watch import Watch
from midwatch.watch_conditions import ConditionError


def rule_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with each rule, and the way out."""
    for rule in recipe.watch:
        for condition in (rule, *rule.others):
            try:
                condition.make()
            except ConditionError as error:
                yield f'watch "{rule.name}": condition: {error}'
        if problem := _action_problem(recipe, rule):
            yield f'watch "{rule.name}": action: {rule.action}: {problem}'


def _action_problem(recipe: Recipe, rule: Watch) -> str:
    """A setting that no stage has, or a stage that is not there: the command would be refused whenever the rule fires."""
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
