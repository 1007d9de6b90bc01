"""How long planning and applying takes, beside a peer that does the same job: `python -m mlpreduce bench apply`.

Seconds say little from one machine to the next, and drift on one that others use. So both tools run in one process, in
turns, each on a fresh copy of one model, and what is reported is their ratio. The job is to halve the hidden width of
every MLP that `find_mlps` finds, on a timm model with random weights on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.bench.rounds import Ratios, at_least_one, ratio_text, ratios, read_models, reasons, turns, value_text
from mlpreduce.errors import ReductionError, optional
from mlpreduce.graph import Inputs, call_with, example_inputs
from mlpreduce.plugins import add_option, load_plugins

__all__ = ["Comparison", "Timing", "compare", "main"]

Tool = Callable[[nn.Module], object]

# architectures of many families, as words of the command line; the last of DINOv2's giant is a small one of its kind
LISTS = {
    "peers": """
        vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
        vit_small_plus_patch16_dinov3 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 cait_xxs24_224
        xcit_nano_12_p16_224 pvt_v2_b0 mvitv2_tiny maxvit_rmlp_pico_rw_256 maxvit_tiny_tf_224 convnext_atto
        convnextv2_atto davit_tiny mixer_s32_224 hiera_tiny_224 vitamin_small_224 naflexvit_base_patch16_gap
        levit_128s tiny_vit_5m_224 twins_svt_small volo_d1_224 poolformer_s12 efficientformer_l1 edgenext_xx_small
        resmlp_12_224 nest_tiny crossvit_tiny_240 visformer_tiny vit_relpos_small_patch16_224 focalnet_tiny_srf
        gcvit_xxtiny convit_tiny fastvit_t8 nextvit_small efficientvit_m0 caformer_s18 vit_base_patch16_siglip_224
        coat_tiny tnt_s_patch16_224 gmlp_s16_224
        vit_giant_patch14_dinov2 img_size=224 embed_dim=192 depth=12 num_heads=3
    """
}


@dataclass(frozen=True)
class Timing:
    """One tool on one model.

    Attributes:
        seconds: of each run.
        params: parameters of the model afterwards.
        failure: why it did not run; empty if it did.
    """

    seconds: tuple[float, ...] = ()
    params: int = 0
    failure: str = ""

    def __str__(self) -> str:
        return value_text(self.seconds, self.failure, digits=3)


@dataclass(frozen=True)
class Comparison:
    """Ours and, if there is one, a peer's timing of the same job on one model.

    Attributes:
        model: the timm architecture, with its arguments.
        params: parameters before.
        ours: timing of `mlpreduce.apply(model, "shallow")`.
        peer: timing of the peer.
    """

    model: str
    params: int
    ours: Timing
    peer: Timing | None = None

    @property
    def ratios(self) -> Ratios | None:
        """Ours over the peer's: the ratio of the medians, then the least and the largest of a round."""
        if self.peer is None or self.ours.failure or self.peer.failure:
            return None
        return ratios(self.ours.seconds, self.peer.seconds)

    @property
    def equal(self) -> bool | None:
        """Whether both leave as many parameters; None unless both ran."""
        return None if self.ratios is None or self.peer is None else self.ours.params == self.peer.params

    def __str__(self) -> str:
        after = "" if self.ours.failure else f"{self.ours.params:,}"
        line = _ROW.format(
            self.model, f"{self.params:,}", after, str(self.ours), str(self.peer or ""), ratio_text(self.ratios)
        )
        end = "" if self.equal is None else "equal" if self.equal else f"peer {self.peer and self.peer.params:,}"
        told = reasons(self.ours.failure, "" if self.peer is None else self.peer.failure)
        return "\n".join([f"{line} {end}".rstrip(), *told])

    def to_json(self) -> str:
        """The comparison as one line of JSON."""
        return json.dumps(asdict(self) | {"ratios": self.ratios, "equal": self.equal})


_ROW = "{:<36} {:>12} {:>12}  {:<22} {:<22} {:<19}"
_HEAD = _ROW.format("model", "parameters", "after", "ours, s (min to max)", "peer, s (min to max)", "ours / peer")


def compare(name: str, peer: str | None = None, runs: int = 5, **kwargs: Any) -> Comparison:
    """Time `shallow` on a timm model and, with `peer`, the same job by another tool in turns.

    Each tool has one run beforehand that is not counted, after which the model must run on one image. What is timed is
    the call alone, on a copy made before, after a garbage collection. For ours it is `mlpreduce.apply`; for the peer it
    is all that it does once it has been told the layers: its trace, its choice of units and its surgery.

    Args:
        name: a timm architecture.
        peer: a name of `PEERS`.
        runs: timed runs of each tool.
        **kwargs: arguments of `timm.create_model`.

    Raises:
        ReductionError: no such architecture or peer, or the peer is not installed.
    """
    make_peer = None if peer is None else _find_peer(peer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlpreduce.create_model(name, **kwargs)
    images = example_inputs(model)
    tools: list[Tool] = [lambda fresh: mlpreduce.apply(fresh, "shallow", ratio=0.5)]
    if make_peer is not None:
        tools.append(make_peer(model, images))
    timings = [_try(tool, model, images) for tool in tools]
    ready = [index for index, timing in enumerate(timings) if not timing.failure]
    seconds: list[list[float]] = [[] for _ in tools]
    for index in turns(runs, ready):
        seconds[index].append(_time(tools[index], model))
    ours, *theirs = [
        Timing(tuple(taken), timing.params, timing.failure) for taken, timing in zip(seconds, timings, strict=True)
    ]
    text = " ".join([name, *(f"{key}={value}" for key, value in kwargs.items())])
    return Comparison(text, _count(model), ours, theirs[0] if theirs else None)


def _try(tool: Tool, model: nn.Module, images: Inputs) -> Timing:
    fresh = copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tool(fresh)
        with torch.no_grad():
            call_with(fresh.eval(), images)
    except Exception as error:  # a row of the table, whatever a tool raises
        first = next(iter(str(error).splitlines()), "")
        return Timing(failure=f"{type(error).__name__}: {first}")
    if _count(fresh) == _count(model):
        return Timing(failure="it changed nothing, without an error")
    return Timing(params=_count(fresh))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _time(tool: Tool, model: nn.Module) -> float:
    fresh = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
        start = time.perf_counter()
        tool(fresh)
        return time.perf_counter() - start


def _torch_pruning(model: nn.Module, images: Inputs) -> Tool:
    """Torch-Pruning (MIT, arXiv 2301.12900) at its best: told which layers to prune, so that it looks for none itself."""
    torch_pruning = optional("bench --peer torch-pruning", "torch_pruning")
    leaves = [leaf for mlp in mlpreduce.find_mlps(model) for leaf in mlp.leaves]
    pruned = {leaf.path for leaf in leaves if leaf.role in ("fc1", "conv")}  # whose outputs are hidden units

    def prune(fresh: nn.Module) -> None:
        if not pruned:
            raise ReductionError("found no MLP to tell it of")
        layers = (nn.Linear, nn.modules.conv._ConvNd)
        ignored = [m for path, m in fresh.named_modules() if isinstance(m, layers) and path not in pruned]
        pruner = torch_pruning.pruner.BasePruner(
            fresh,
            images,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            in_channel_groups={},  # its default is one dictionary for all pruners, which keeps their models alive
            out_channel_groups={},
        )
        pruner.step()

    return prune


PEERS: dict[str, Callable[[nn.Module, Inputs], Tool]] = {"torch-pruning": _torch_pruning}


def _find_peer(name: str) -> Callable[[nn.Module, Inputs], Tool]:
    if name not in PEERS:
        raise ReductionError(f"bench --peer {name}: unknown peer; known: {', '.join(PEERS)}")
    return PEERS[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, a model at a time, and return its exit status: 0, or 2 after a ReductionError."""
    options = _parser().parse_intermixed_args(argv)
    threads = torch.get_num_threads()
    try:
        at_least_one(options, ["runs", "threads"], "apply")
        torch.set_num_threads(options.threads)
        load_plugins(options.plugins)
        words = [*options.models, *LISTS.get(options.list, "").split()]
        models = read_models(words or ["vit_base_patch16_224"], "apply")
        results = []
        for name, kwargs in models:
            results.append(compare(name, options.peer, options.runs, **kwargs))
            if not options.json and len(results) == 1:
                print(_HEAD.rstrip())
            print(results[-1].to_json() if options.json else results[-1], flush=True)
        if not options.json:
            print(_summary(results, options.peer, options.runs))
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _summary(results: Sequence[Comparison], peer: str | None, runs: int) -> str:
    ours = sum(not result.ours.failure for result in results)
    text = f"{len(results)} models, runs of each: {runs}, threads: {torch.get_num_threads()}; ours ran on {ours}"
    if peer is None:
        return text
    theirs = sum(result.peer is not None and not result.peer.failure for result in results)
    both = [result.equal for result in results if result.equal is not None]
    return f"{text}, {peer} on {theirs}; where both did, parameters are equal on {sum(both)} of {len(both)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench apply",
        description="Time plan and apply of shallow(ratio=0.5) on this machine, beside a peer that does the same job.",
    )
    words = "timm architectures, each followed by its arguments as key=value (default: vit_base_patch16_224)"
    parser.add_argument("models", nargs="*", metavar="MODEL key=value", help=words)
    parser.add_argument("--models", dest="list", choices=list(LISTS), help="a list: peers has 44, of many families")
    parser.add_argument("--peer", metavar="NAME", help=f"beside {', '.join(PEERS)} (an extra: mlpreduce[bench])")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    threads = "threads of both (default: torch's); 1 on a machine that others use, where several wait for each other"
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help=threads)
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each model")
    add_option(parser)
    return parser
