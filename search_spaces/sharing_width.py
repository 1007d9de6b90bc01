"""Sharing, width and the choice of units together: both reductions of arXiv 2512.01059 and all between and beyond them."""

POINTS = [
    {"share": "sequence", "group": 2, "ratio": 1.0, "criterion": "first"},
    {"share": "none", "group": 2, "ratio": 0.5, "criterion": "first"},
]


def suggest(trial, model):
    share = trial.suggest_categorical("share", ["none", "sequence", "cycle", "cycle_reverse"])
    group = trial.suggest_int("group", 2, model.longest)
    ratio = trial.suggest_float("ratio", 0.125, 1.0, step=0.125)
    criterion = trial.suggest_categorical("criterion", list(model.units))
    steps = []
    if ratio < 1:
        steps.append(("shallow", {"ratio": ratio, **model.units[criterion]}))
    if share != "none":
        steps.append(("grouped", {"pattern": share, "group": group, "remainder": "own"}))
    return steps
