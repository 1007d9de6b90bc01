"""Runs a training script and notes when its updates end: `python -m mlpreduce.bench.watch NOTES FIRST LAST SCRIPT ...`.

The script runs as it is. A hook that torch calls after each step of an optimizer is added to its process, so what is measured
is the same for every script, and no log is read: the seconds from the end of update FIRST to the end of update LAST. What
this process found is written to NOTES/<rank>.json. Two things that would stop a script are mended, neither of which takes
time in the loop: see `no_cpus`, and `_let_images_be_black`.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Watch", "main", "no_cpus"]


class Watch:
    """Notes the clock at the end of two updates; work that a GPU has still to do then is waited for.

    Args:
        first: number of the update whose end starts the span.
        last: number of the update whose end ends it.

    Attributes:
        found: what was seen: updates, seconds of the span, and what trained.
    """

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._started = 0.0
        self.found: dict[str, Any] = {"updates": 0, "seconds": None, "failure": ""}

    def __call__(self, optimizer: Any, *_: Any) -> None:
        found = self.found
        found["updates"] += 1
        if found["updates"] == 1:
            found.update(_facts(optimizer))
        if found["updates"] == self._first:
            self._started = _clock()
        elif found["updates"] == self._last:
            found["seconds"] = _clock() - self._started


def _clock() -> float:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _facts(optimizer: Any) -> dict[str, Any]:
    import timm
    import torch

    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = [kind for kind in ("fused", "foreach") if optimizer.defaults.get(kind)]
    return {
        "optimizer": " ".join([type(optimizer).__name__, *kinds]),
        "parameters": sum(parameter.numel() for parameter in trained),
        "device": trained[0].device.type,
        "workers": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def no_cpus(device_ids: Sequence[Any] | None) -> Sequence[Any] | None:
    """The devices that DDP may be told of: torch takes none on CPUs, and some scripts name theirs all the same."""
    import torch

    if device_ids and all(not isinstance(one, int) and torch.device(one).type == "cpu" for one in device_ids):
        return None
    return device_ids


def _let_cpus_join() -> None:
    from torch.nn.parallel import DistributedDataParallel

    wrap: Any = DistributedDataParallel.__init__

    @functools.wraps(wrap)
    def wrap_on_cpus(self: Any, module: Any, device_ids: Any = None, *args: Any, **kwargs: Any) -> None:
        wrap(self, module, no_cpus(device_ids), *args, **kwargs)

    DistributedDataParallel.__init__ = wrap_on_cpus  # type: ignore[method-assign]


def _let_images_be_black() -> None:
    """What our loader does to timm's policies, for any script: 0 bits of a pixel are a black image, where Pillow 13 raises."""
    from timm.data.auto_augment import NAME_TO_OP

    from mlpreduce.data.loaders import posterize

    for name in [name for name in NAME_TO_OP if name.startswith("Posterize")]:
        NAME_TO_OP[name] = posterize


def main(argv: Sequence[str]) -> None:
    """Run a script under watch; what ends the script ends this."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    folder, first, last, script, *arguments = argv
    watch = Watch(int(first), int(last))
    register_optimizer_step_post_hook(watch)
    _let_cpus_join()
    _let_images_be_black()
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise  # the exit status says it, and the last line of what it printed
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        watch.found["failure"] = f"{type(error).__name__}: {lines[0]}"
        raise
    finally:
        note = Path(folder) / f"{os.environ.get('RANK', '0')}.json"
        note.write_text(json.dumps(watch.found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
