"""What a model costs: parameters, MACs, and measured speed and memory. Every figure says what it counted."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mlpreduce.budget import Cost, measure
from mlpreduce.errors import ReductionError, check_whole
from mlpreduce.graph import Inputs, call_with, example_inputs, map_tensors, refuse_wrapped, tensors_in
from mlpreduce.words.console import width, wrapped
from mlpreduce.words.markup import html_table
from mlpreduce.words.values import short
from mlpreduce.words.waiting import steps

__all__ = ["LiveMemory", "Profile", "profile"]

MIB = 2**20


@dataclass(frozen=True)
class Profile(Cost):
    """Cost of a model for inference: the counts of `Cost` and, if they were measured, speed and memory.

    Attributes:
        batch_size: images of the timed batches; None if nothing was timed.
        throughput: images/s at that batch size, the median of the repeats.
        latency: milliseconds for one image, likewise.
        peak_memory_mib: MiB of parameters, buffers and live activations at that batch size.
        device: where it was timed, with the dtype.
    """

    batch_size: int | None = None
    throughput: float | None = None
    latency: float | None = None
    peak_memory_mib: float | None = None
    device: str | None = None

    def __repr__(self) -> str:
        speed = "" if self.throughput is None else f", {self.throughput:,.1f} images/s"
        return f"<Profile: {self.params:,} parameters, {self.unique_mlps} unique MLPs, {self.macs_text()}{speed}>"

    def _repr_html_(self) -> str:
        """Write the profile as an HTML table for notebooks."""
        return html_table(("what", "value", "counted or measured"), self._rows())

    def __str__(self) -> str:
        rows = self._rows()
        room = max(len(value) for _, value, _ in rows)
        lines = [f"{name:<19}  {value:>{room}}  {remark}" for name, value, remark in rows]
        return "\n".join(wrapped(line, width(), " " * (19 + room + 4)) for line in lines)

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, value, and unit or convention of each figure."""
        rows = [
            ("parameters", f"{self.params:,}", "(a tied tensor once)"),
            ("  of MLPs", f"{self.mlp_params:,}", f"in {self.unique_mlps} unique MLPs"),
            ("macs_linear", short(self.macs_linear), "(Linear and Conv, one image)"),
            ("macs", short(self.macs), "(and LayerNorm at 5 per element)"),
            ("macs_with_attention", short(self.macs_with_attention), "(and the products of attention)"),
        ]
        if self.batch_size is not None:
            memory = "MiB (parameters, buffers, activations; inference)"
            rows += [
                ("throughput", f"{self.throughput:,.1f}", f"images/s (batch {self.batch_size}, {self.device})"),
                ("latency", f"{self.latency:,.2f}", "ms (batch 1)"),
                ("peak memory", f"{self.peak_memory_mib:,.1f}", memory),
            ]
        return rows


class LiveMemory(TorchDispatchMode):
    """Peak bytes of tensors alive at once: those made inside the block, and those of `model` if one is given.

    Counts storages, so views and tied tensors count once. It is exact for what PyTorch allocates by tensors, on any
    device, and does not see the scratch memory inside kernels.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()
        self.live = self.peak = 0
        for tensor in [*model.parameters(), *model.buffers()] if model is not None else ():
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta or id(storage) in self._known:
            return
        self._known.add(id(storage))
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, id(storage), size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def profile(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    measure_speed: bool = False,
    batch_size: int = 32,
    repeats: int = 5,
    tokens_per_block: Sequence[int] | None = None,
) -> Profile:
    """Count a model's parameters and MACs and, if asked, time its inference where it is.

    The model is not changed; it is timed in eval mode and left in the mode it was in.

    Args:
        model: the model.
        inputs: images (batch, channels, height, width), or a tuple or dict of arguments with the batch first; by
            default zeros of the size the model says it takes.
        measure_speed: whether to time it. On a shared machine compare only what was measured side by side.
        batch_size: images of a timed batch; those of `inputs` if given.
        repeats: timed batches, after one that is not counted.
        tokens_per_block: the tokens that go into each block, class token included, to count what a system costs that prunes
            tokens on the way, such as DynamicViT (arXiv 2106.02034) or EViT (arXiv 2202.07800); without its own layers.

    Raises:
        ReductionError: the input size is not known, or a model on the meta device, or one with other tokens than it makes,
            is to be timed.
    """
    refuse_wrapped(model, "profile")
    if inputs is not None and not isinstance(inputs, (torch.Tensor, tuple, Mapping)):
        raise ReductionError(
            f"profile: inputs is a {type(inputs).__name__}; give a tensor (images, channels, height, width), or a tuple "
            f"or dict of arguments"
        )
    check_whole("profile: batch_size", batch_size)
    check_whole("profile: repeats", repeats)
    if tokens_per_block is not None and measure_speed:
        raise ReductionError("profile(measure_speed=True): tokens are counted, not pruned; leave out tokens_per_block")
    cost = asdict(measure(model, inputs, tokens_per_block=tokens_per_block).cost)
    if not measure_speed:
        return Profile(**cost)
    batch = example_inputs(model, batch_size) if inputs is None else inputs
    first = map_tensors(batch, lambda tensor: tensor[:1])
    images = tensors_in(batch)[0]
    if images.is_meta:
        raise ReductionError("profile: a model on the meta device cannot be timed; move it to a device")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(), steps("profile", 2 * repeats + 2) as advance:
            many = _seconds(lambda: call_with(model, batch), images.device, repeats, advance)
            one = _seconds(lambda: call_with(model, first), images.device, repeats, advance)
            peak = _peak_bytes(model, batch, images.device)
    finally:
        model.train()  # what some modules keep for evaluation goes: it was made within inference_mode
        for module, training in modes.items():
            module.training = training
    return Profile(
        **cost,
        batch_size=len(images),
        throughput=len(images) / many,
        latency=one * 1e3,
        peak_memory_mib=peak / MIB,
        device=f"{images.device.type}, {str(images.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads",
    )


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int, advance: Callable[[int], None]) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        advance(1)
        return taken

    once()
    return statistics.median(once() for _ in range(repeats))


def _peak_bytes(model: nn.Module, batch: Inputs, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call_with(model, batch)
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak
    with LiveMemory(model) as memory:
        call_with(model, batch)
    return int(memory.peak)
