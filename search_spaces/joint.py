"""All reductions together: MLPs that go, widths and the choice of units, sharing, what each use has of its own, layers, gates.

Both reductions of arXiv 2512.01059 and the systems beside them: SCHEME (block_diagonal), factors of low rank, SVFT, LoRA and
SSF for each use of a shared MLP, gates of ADA-DEFT. `sharing_width` has the first three alone.
"""

PLAIN = {"dropped": 0, "own": "none", "layers": "dense", "gates": False}
POINTS = [
    {"share": "sequence", "group": 2, "ratio": 1.0, "criterion": "first", **PLAIN},
    {"share": "none", "group": 2, "ratio": 0.5, "criterion": "first", **PLAIN},
]


def suggest(trial, model):
    names = [mlp.name for mlp in model.mlps]
    dropped = trial.suggest_int("dropped", 0, len(names) // 4)
    share = trial.suggest_categorical("share", ["none", "sequence", "cycle", "cycle_reverse"])
    group = trial.suggest_int("group", 2, model.longest)
    ratio = trial.suggest_float("ratio", 0.125, 1.0, step=0.125)
    criterion = trial.suggest_categorical("criterion", list(model.units))
    own = trial.suggest_categorical("own", ["none", "ssf", "lora"])
    layers = trial.suggest_categorical("layers", ["dense", "block_diagonal", "low_rank", "svft"])
    gates = trial.suggest_categorical("gates", [False, True])
    steps = []
    if dropped:  # evenly spaced, and neither the first nor the last
        steps.append(("drop", {"mlps": [names[(i + 1) * len(names) // (dropped + 1)] for i in range(dropped)]}))
    if ratio < 1:
        steps.append(("shallow", {"ratio": ratio, **model.units[criterion]}))
    if share != "none":
        steps.append(("grouped", {"pattern": share, "group": group, "remainder": "own"}))
    if own != "none":
        steps.append((own, {}))
    if layers != "dense":
        half = min(m.in_features * m.hidden_features // (2 * (m.in_features + m.hidden_features)) for m in model.mlps)
        options = {"block_diagonal": {"groups": 2, "align": "none"}, "low_rank": {"ratio": 0.5}, "svft": {"rank": half}}
        steps.append((layers, options[layers]))
    if gates:
        steps.append(("block_gate", {}))
    return steps
