"""Which blocks share an MLP, by family of patterns, with the rules for its weights.

GroupedMLP (arXiv 2512.01059, equation 1) is the point sequence, 2, inv_sqrt, first. The families are those of Takase and
Kiyono (arXiv 2104.06022).
"""

POINTS = [{"pattern": "sequence", "group": 2, "scale": "inv_sqrt", "keep": "first"}]


def suggest(trial, model):
    pattern = trial.suggest_categorical("pattern", ["sequence", "cycle", "cycle_reverse"])
    group = trial.suggest_int("group", 2, model.longest)
    scale = trial.suggest_categorical("scale", ["inv_sqrt", "none"])
    keep = trial.suggest_categorical("keep", ["first", "last", "mean"])
    return [("grouped", {"pattern": pattern, "group": group, "scale": scale, "keep": keep, "remainder": "own"})]
