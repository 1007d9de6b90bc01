"""Transforms and their registry. A transform is one file with one pure function from a model's parts to edits.

    @register("grouped", scope="chains")
    def grouped(parts, *, group=2, ...):
        ...
        yield Share(...)

Its keyword parameters are its config everywhere: Python, command line, recipes, search spaces and JSON. All files of this
folder are imported, and register what they have.
"""

from __future__ import annotations

import importlib
import pkgutil

from mlpreduce.transforms.registry import (
    Config,
    Follows,
    Transform,
    check_config,
    get_transform,
    is_construction,
    list_transforms,
    register,
)

__all__ = [
    "Config",
    "Follows",
    "Transform",
    "check_config",
    "get_transform",
    "is_construction",
    "list_transforms",
    "register",
]

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
