"""`block_gate` and `drop`: a learned gate for each MLP, and doing without those whose gate is shut.

Source: ADA-DEFT, after DEFT (arXiv 2402.01911): a learned weight for each MLP, of which the small ones are skipped when the
model runs. An MLP of d features and h units that goes saves 2 d h + h + d parameters, unless its weights are tied to others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlpreduce.edits import Replace
from mlpreduce.errors import ReductionError, check_number, did_you_mean
from mlpreduce.graph import MLP
from mlpreduce.layers import BlockGate, NoMlp
from mlpreduce.transforms.layers import replacing
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import register


@register("block_gate", preserves="at_init")
def block_gate(parts: Parts) -> Iterator[Replace]:
    """Put a gate in 0..1 on what each MLP gives, its own for each use of a tied one. It starts open.

    Train with a penalty on the gates, then `drop` the MLPs whose gate is shut; `merge` folds the others into the weights.

    Args:
        parts: the MLPs in scope.

    Raises:
        ReductionError: there is a gate already.
    """
    for mlp in parts:
        path = mlp.leaf("fc2").call
        layer = parts.module(path)
        if _gate(parts, mlp) is not None:
            raise ReductionError(f"{mlp.name} has a gate already")
        if not mlp.leaf("fc2").shareable:
            raise ReductionError(f"{path} is a layer of attention too, which the gate would shut; exclude {mlp.name}")
        _check_alone(mlp)
        yield replacing(path, "block_gate", {}, BlockGate(layer))


@register("drop", preserves="no", mergeable=False)
def drop(parts: Parts, *, gate: float = 0.05, mlps: Sequence[str] | None = None) -> Iterator[Replace]:
    """Do without MLPs: those whose gate is shut, or those that are named. The residual stream goes on as it is.

    Args:
        parts: the MLPs in scope.
        gate: the largest gate of those that go, where `block_gate` has put some.
        mlps: names of those that go, in place of gates.

    Raises:
        ReductionError: there are no gates and no names, or a name is none; no MLP would be left.
    """
    check_number("gate", gate, least=0)
    names = [mlp.name for mlp in parts]
    if mlps is None:
        gates = {mlp.name: found for mlp in parts if (found := _gate(parts, mlp)) is not None}
        if not gates:
            raise ReductionError("the MLPs have no gates, as block_gate puts them; or say mlps=['blocks.3.mlp']")
        going = [name for name, value in gates.items() if value <= gate]
        if not going:
            raise ReductionError(
                f"gate={gate}: all of {len(gates)} gates are larger, the least {min(gates.values()):.3g}"
            )
    else:
        going = [mlps] if isinstance(mlps, str) else list(mlps) if isinstance(mlps, (list, tuple)) else []
        if not going:
            raise ReductionError(f"mlps is {mlps!r}; give names, such as ['blocks.3.mlp']")
        for name in going:
            if name not in names:
                raise ReductionError(f"mlps has {name!r}{did_you_mean(str(name), names)}")
    if len(set(going)) == parts.number:
        raise ReductionError(f"none of {parts.number} MLPs would be left; drop fewer")
    for mlp in parts:
        if mlp.name in going:
            parts.whole(mlp)
            _check_alone(mlp)
            if mlp.in_features != mlp.out_features:
                raise ReductionError(f"{mlp.name} gives {mlp.out_features} features for {mlp.in_features}; exclude it")
            yield replacing(mlp.name, "no_mlp", {}, NoMlp())


def _check_alone(mlp: MLP) -> None:
    """Whether what an MLP gives comes to the residual stream as it is.

    Raises:
        ReductionError: a norm would undo the gate, and add its bias to zeros.
    """
    if mlp.norm_follows:
        raise ReductionError(f"a norm lies between {mlp.name} and the residual stream, which would undo it; exclude it")


def _gate(parts: Parts, mlp: MLP) -> float | None:
    """The gate of an MLP, within 0..1, if it has one."""
    path = mlp.leaf("fc2").call
    while path != mlp.leaf("fc2").path:
        layer = parts.module(path)
        if isinstance(layer, BlockGate):
            return float(parts.tensor(f"{path}.gate").detach().clamp(0, 1))
        path = f"{path}.base"
    return None
