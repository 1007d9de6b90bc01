"""Documents of searches written by hand: a report needs nothing else."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from mlpreduce.records import StudyDocument, typed

OBJECTIVES = {
    "top1": {"name": "top1", "direction": "maximize", "unit": "%"},
    "params": {"name": "params", "direction": "minimize", "unit": ""},
    "macs": {"name": "macs", "direction": "minimize", "unit": ""},
    "latency": {"name": "latency", "direction": "minimize", "unit": "ms"},
}
BASELINE = 200_000


def make_point(name: str, size: int, *tops: float, number: int | None = None, **changes: Any) -> dict[str, Any]:
    """A point of four blocks; a run for each top-1."""
    runs = [
        {
            "seed": seed,
            "top1": top1,
            "top5": 99.0,
            "final_top1": top1 - 0.25,
            "peak_epoch": 2,
            "epochs": 3,
            "latency": 0.5,
        }
        for seed, top1 in enumerate(tops)
    ]
    return {
        "name": name,
        "kind": "reference" if number is None else "trial",
        "number": number,
        "key": f"{size:08x}",
        "state": "complete",
        "params": {},
        "steps": [],
        "settings": {},
        "cost": {
            **{"params": size, "mlp_params": size // 2, "unique_mlps": 2},
            **{"macs_linear": 40 * size, "macs": 41 * size, "macs_with_attention": 42 * size},
        },
        "pattern": {
            "blocks": [f"blocks.{block}.mlp" for block in range(4)],
            **{"owners": [0, 0, 2, 2], "widths": [64, 64, 32, 32]},
        },
        "values": {"top1": fmean(tops), "params": size, "macs": 41 * size, "latency": 0.5} if tops else {},
        "feasible": True,
        "front": False,
        "message": "",
        "runs": runs,
        **changes,
    }


def make_trial(number: int, size: int, *tops: float, **changes: Any) -> dict[str, Any]:
    """A trial with two parameters; the second is there in every other one."""
    ratio = size / BASELINE
    sampled: dict[str, Any] = {"ratio": ratio, **({"share": "cycle"} if number % 2 else {})}
    steps = [{"transform": "grouped", "group": 2}, {"transform": "shallow", "ratio": ratio}]
    return make_point(f"trial {number}", size, *tops, number=number, params=sampled, steps=steps, **changes)


def make_study(*objectives: str, points: list[dict[str, Any]] | None = None, **changes: Any) -> StudyDocument:
    """What a report is made of."""
    return typed(StudyDocument, make_document(*objectives, points=points, **changes), "study")


def make_document(*objectives: str, points: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        **{"study": "sharing_width-digits", "space": "sharing_width", "recipe": "digits"},
        "objectives": [OBJECTIVES[name] for name in objectives or ("top1", "params")],
        "budgets": [{"text": "params<=0.7", "cost": "params", "limit": 140_000}],
        "settings": {"trials": 6, "sampler": {"name": "tpe", "seed": 0}},
        "counts": {"trained": 6, "complete": 4, "pruned": 1, "infeasible": 3, "duplicate": 2, "failed": 1},
        "environment": {"versions": {"torch": "2.15.0", "optuna": "5.0.0"}, "hardware": {"cpu_cores": 2}},
        "seconds": 1234.5,
        "points": make_points() if points is None else points,
        "hypervolume": {"value": 123.4, "reference": {"top1": 0.0, "params": 202_314}},
        "importance": {name: {"ratio": 0.6, "share": 0.4} for name in objectives or ("top1", "params")},
        "verdicts": ["trial 0 dominates grouped: 97.00 % with 20,000 parameters fewer"],
        **changes,
    }


def make_points() -> list[dict[str, Any]]:
    """Three points on the front, one behind it, one over the budget, one pruned, one failed, and three references."""
    names = [f"blocks.{block}.mlp" for block in range(4)]
    pairs = {"owners": [0, 0, 2, 2], "widths": [64, 64, 64, 64], "blocks": names}
    return [
        make_point("baseline", BASELINE, 97.0, 98.0, 98.5, feasible=False),
        make_point("grouped", 135_000, 96.0, 96.8, steps=[{"transform": "grouped", "group": 2}], pattern=pairs),
        make_point("shallow", 136_000, 96.5, steps=[{"transform": "shallow", "ratio": 0.5}]),
        make_trial(0, 120_000, 97.0, 97.4, 96.9, front=True),
        make_trial(1, 100_000, 96.0, 96.6, front=True, settings={"train.lr": 0.001}),
        make_trial(2, 80_000, 94.0, front=True),
        make_trial(3, 110_000, 95.5),
        make_trial(4, 180_000, 97.9, feasible=False),
        make_trial(5, 90_000, 41.0, state="pruned"),
        make_trial(6, 95_000, state="failed", message="out of memory"),
    ]
