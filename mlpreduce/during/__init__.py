"""What reduces a model while it trains, in any PyTorch training loop: it knows no recipe and no Ray.

    PruneAndGrow        trains under a mask of hidden units that moves: drop the weak ones, grow others (S2ViTE)
    GateL1              learns a gate for each hidden unit under an L1 penalty, then folds and slices (VTP)
    LotteryTicket       prunes a part, rewinds the rest to what it was, and again (lottery ticket)
    reduce_in_training  reduces a model between two updates and carries the optimizer's state over

The names are loaded when first used, as those of `mlpreduce.train`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpreduce.during.carry import reduce_in_training
    from mlpreduce.during.gates import GateL1
    from mlpreduce.during.masks import PruneAndGrow
    from mlpreduce.during.tickets import LotteryTicket

__all__ = ["GateL1", "LotteryTicket", "PruneAndGrow", "reduce_in_training"]

_HOME = {"GateL1": "gates", "LotteryTicket": "tickets", "PruneAndGrow": "masks", "reduce_in_training": "carry"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
