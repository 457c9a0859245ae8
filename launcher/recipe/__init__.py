"""The recipe: typed sections, one a module, and the reader that checks them."""

from launcher.recipe.cluster import Cluster
from launcher.recipe.load import Recipe, RecipeError, check, dump_recipe, load_recipe, parse_recipe, warnings
from launcher.recipe.model import Model, Rope
from launcher.recipe.parallel import Parallel
from launcher.recipe.probe import Probe
from launcher.recipe.run import Checkpoint, Report, Run
from launcher.recipe.stage import Stage
from launcher.recipe.watch import Watch
from shards.spec import Data, Source, Tokenizer

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
    "Tokenizer",
    "Watch",
    "check",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "warnings",
]
