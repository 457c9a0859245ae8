"""Imports of the libraries of the extra `data`, with what to do where one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from shards.common.errors import SpecError


def need(module: str, what: str) -> Any:
    """A module of the extra `data`; SpecError, saying what it is for, where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        said = "" if isinstance(error, ModuleNotFoundError) else f": {str(error).splitlines()[0]}"
        raise SpecError(f"{what} needs {module.partition('.')[0]}{said} (pip install 'midwatch[data]')") from None
