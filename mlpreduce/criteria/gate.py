"""`gate`: the units whose gates stay large while gates are learned and pulled to zero.

Source: VTP (Zhu et al., "Vision Transformer Pruning", arXiv 2104.08500): factors on what units put out, whose gradient has
1e-4 times their sign added, and of which the smallest go. There all weights are trained with them; here, as a criterion, they
stay as they are, and `mlpreduce.train` has both.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import register_criterion


@register_criterion("gate", needs="gates")
def gate(gates: torch.Tensor, *, coefficient: float = 1e-4, lr: float = 0.01, epochs: int = 1) -> torch.Tensor:
    """|gate| after learning.

    Args:
        gates: (hidden units,), learned.
        coefficient: of the L1 penalty.
        lr: learning rate of Adam.
        epochs: passes over the data.
    """
    return gates.abs()
