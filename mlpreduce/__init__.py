"""mlpreduce: remove MLP parameters from Vision Transformers by torch.fx graph rewriting, and search over them.

    import timm, mlpreduce
    model = timm.create_model("vit_base_patch16_224")
    mlpreduce.apply(model, "grouped", group=2)   # 86.6 M -> 58.2 M parameters

Nothing heavy is imported until a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "MLP": "graph",
    "Plan": "edits",
    "Profile": "budget.profiling",
    "ReductionError": "errors",
    "Report": "reduction.verification",
    "apply": "reduction.applying",
    "create_model": "building.construction",
    "describe": "describing",
    "find_mlps": "graph",
    "history": "reduction.applying",
    "list_criteria": "criteria",
    "list_transforms": "transforms",
    "load": "building.checkpoint",
    "merge": "reduction.applying",
    "plan": "reduction.planning",
    "plot": "report.plans",
    "profile": "budget.profiling",
    "register": "transforms",
    "register_model": "building.registration",
    "save": "building.checkpoint",
    "to_graph": "graph",
    "to_onnx": "building.exporting",
    "tune": "search",
    "untie": "reduction.applying",
    "verify": "reduction.verification",
}

_PACKAGES = (
    "budget",
    "criteria",
    "data",
    "edits",
    "graph",
    "layers",
    "models",
    "plugins",
    "search",
    "testing",
    "train",
    "transforms",
)

__all__ = [
    "MLP",
    "Plan",
    "Profile",
    "ReductionError",
    "Report",
    "apply",
    "create_model",
    "describe",
    "find_mlps",
    "history",
    "list_criteria",
    "list_transforms",
    "load",
    "merge",
    "plan",
    "plot",
    "profile",
    "register",
    "register_model",
]
__all__ += ["save", "to_graph", "to_onnx", "tune", "untie", "verify"]

if TYPE_CHECKING:
    from mlpreduce.budget.profiling import Profile, profile
    from mlpreduce.building.checkpoint import load, save
    from mlpreduce.building.construction import create_model
    from mlpreduce.building.exporting import to_onnx
    from mlpreduce.building.registration import register_model
    from mlpreduce.criteria import list_criteria
    from mlpreduce.describing import describe
    from mlpreduce.edits import Plan
    from mlpreduce.errors import ReductionError
    from mlpreduce.graph import MLP, find_mlps, to_graph
    from mlpreduce.reduction.applying import apply, history, merge, untie
    from mlpreduce.reduction.planning import plan
    from mlpreduce.reduction.verification import Report, verify
    from mlpreduce.report.plans import plot
    from mlpreduce.transforms import list_transforms, register


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"mlpreduce.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'mlpreduce' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mlpreduce.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    dunders = (name for name in globals() if name.startswith("__"))
    return sorted({*dunders, *__all__, *_PACKAGES})  # nothing is imported for it
