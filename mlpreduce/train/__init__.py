"""One training loop, for one process and for a DDP worker. It knows no Ray: see `mlpreduce.launch`.

The names are loaded when first used, so that a recipe can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpreduce.train.density import DensityLoss
    from mlpreduce.train.distillation import FeatureDistill
    from mlpreduce.train.loop import TrainingStopped, fit
    from mlpreduce.train.parts import build_model, create_ema, learning_rates
    from mlpreduce.train.runtime import Runtime
    from mlpreduce.train.sam import ascended
    from mlpreduce.train.settings import ModelSettings, Run, Step, TrainSettings
    from mlpreduce.train.state import read_checkpoint, save_checkpoint
    from mlpreduce.train.validation import evaluate

__all__ = [
    "DensityLoss",
    "FeatureDistill",
    "ModelSettings",
    "Run",
    "Runtime",
    "Step",
    "TrainSettings",
    "TrainingStopped",
    "ascended",
    "build_model",
    "create_ema",
    "evaluate",
    "fit",
    "learning_rates",
    "read_checkpoint",
    "save_checkpoint",
]

_HOME = {
    "DensityLoss": "density",
    "evaluate": "validation",
    "FeatureDistill": "distillation",
    "Runtime": "runtime",
    "ascended": "sam",
    **dict.fromkeys(("TrainingStopped", "fit"), "loop"),
    **dict.fromkeys(("build_model", "create_ema", "learning_rates"), "parts"),
    **dict.fromkeys(("ModelSettings", "Run", "Step", "TrainSettings"), "settings"),
    **dict.fromkeys(("read_checkpoint", "save_checkpoint"), "state"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
