"""The recipe: typed sections, one a module, and the reader that checks them."""

from midwatch.recipe.cluster import Cluster
from midwatch.recipe.load import RecipeError, check, dump_recipe, load_recipe, parse_recipe, warnings
from midwatch.recipe.model import Model, Rope
from midwatch.recipe.parallel import Parallel
from midwatch.recipe.probe import Probe
from midwatch.recipe.recipe import Recipe
from midwatch.recipe.run import Checkpoint, Report, Run
from midwatch.recipe.stage import Stage
from midwatch.recipe.watch import Watch
from shards.spec import Data, Source, TokenizerSpec

__all__ = [
    "Checkpoint",
    "Cluster",
    "Data",
    "Model",
    "Parallel",
    "Probe",
    "Recipe",
    "RecipeError",
    "Report",
    "Rope",
    "Run",
    "Source",
    "Stage",
    "TokenizerSpec",
    "Watch",
    "check",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "warnings",
]
