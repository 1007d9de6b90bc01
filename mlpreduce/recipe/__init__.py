"""Experiments as data: a TOML file names model, data, training, variants and seeds.

`python -m mlpreduce.recipe --list | NAME [key=value ...] [--dry-run] [--resume] [--output DIR]`
"""

from __future__ import annotations

from mlpreduce.recipe.cli import main
from mlpreduce.recipe.schema import Recipe, changed, differences, load, runs, with_plugins
from mlpreduce.recipe.shelf import list_recipes

__all__ = ["Recipe", "changed", "differences", "list_recipes", "load", "main", "runs", "with_plugins"]
