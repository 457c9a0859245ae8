"""The backend that a recipe names: a built-in one, or one that another package brings."""

from __future__ import annotations

from launcher.backends.base import Backend
from midwatch.extensions import ExtensionError
from midwatch.recipe import Recipe, RecipeError
from midwatch.recipe.cluster import BACKENDS
from midwatch.run_directory import RunPaths


def backend_of(recipe: Recipe, paths: RunPaths) -> Backend:
    """Raises RecipeError where it cannot be loaded.

    A backend is made by `BACKEND(paths, cluster)`, where `cluster` is the recipe's `[cluster]`.
    """
    check_backend(recipe)
    backend: Backend = BACKENDS.load(recipe.cluster.backend)(paths, recipe.cluster)
    return backend


def check_backend(recipe: Recipe) -> None:
    """Raises RecipeError where the backend cannot be loaded."""
    try:
        BACKENDS.load(recipe.cluster.backend)
    except ExtensionError as error:
        raise RecipeError(f"[cluster] backend: {error}") from None
