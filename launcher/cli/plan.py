"""`midwatch plan`: what a recipe will take, or what a budget allows, as tables or as one JSON object."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.plan import Assumptions, PlanError, find_accelerator, plan_budget, plan_recipe
from launcher.plan.accelerators import DEFAULT
from midwatch.recipe import RecipeError, load_recipe
from shards.common.decoding import shown
from shards.common.terminal import make_console, write_json

MOST = 10**9
_OF_A_RECIPE = ("pipeline", "micro_batches", "virtual")
_OF_A_BUDGET = ("days", "params", "tokens")


def plan(arguments: argparse.Namespace) -> int:
    """Raises RecipeError for what cannot be planned."""
    try:
        return _of_recipe(arguments) if arguments.recipe is not None else _of_budget(arguments)
    except PlanError as error:
        raise RecipeError(str(error)) from None


def _of_recipe(arguments: argparse.Namespace) -> int:
    _refuse(arguments, _OF_A_BUDGET, "is for a budget without a recipe")
    _positive(arguments)
    found = plan_recipe(
        load_recipe(Path(arguments.recipe)),
        Assumptions(
            gpu=arguments.gpu,
            gpus=arguments.gpus,
            mfu=arguments.mfu,
            usd_per_hour=arguments.price,
            precision=arguments.precision,
            pipeline=arguments.pipeline,
            micro_batches=arguments.micro_batches,
            virtual=arguments.virtual,
        ),
    )
    if arguments.json:
        write_json(found)
        return 0
    from launcher.cli.plan_tables import render_plan

    render_plan(found, arguments.recipe, make_console())
    return 0


def _of_budget(arguments: argparse.Namespace) -> int:
    _refuse(arguments, _OF_A_RECIPE, "needs a recipe")
    _positive(arguments)
    if arguments.gpus is None and arguments.days is not None:
        raise PlanError("--days needs the number of GPUs: --gpus 64")
    found = plan_budget(
        find_accelerator(arguments.gpu or DEFAULT, arguments.price),
        arguments.gpus if arguments.gpus is not None else 1,
        arguments.mfu,
        precision=arguments.precision or "bfloat16",
        days=arguments.days,
        parameters=arguments.params,
        tokens=arguments.tokens,
    )
    if arguments.json:
        write_json(found)
        return 0
    from launcher.cli.plan_tables import render_budget

    render_budget(found, arguments.gpu is None, make_console())
    return 0


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise PlanError(f"--{name.replace('_', '-')} {why}")


def _positive(arguments: argparse.Namespace) -> None:
    for name in ("gpus", "pipeline", "micro_batches", "virtual"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise PlanError(f"--{name.replace('_', '-')}: {value} must be at least 1")
        if value is not None and value > MOST:
            raise PlanError(f"--{name.replace('_', '-')}: {shown(value)} must be at most {MOST:,}")
    if not 0 < arguments.mfu <= 1:
        raise PlanError(f"--mfu: {arguments.mfu:g} must lie above 0 and not above 1 (0.4 is usual)")
    if arguments.days is not None and not 0 < arguments.days < 1e6:
        raise PlanError(f"--days: {arguments.days:g} must be above 0")
    if arguments.price is not None and not 0 <= arguments.price < 1e6:
        raise PlanError(f"--price: {arguments.price:g} must not be negative (US dollars an hour of one GPU)")
