"""One hidden width for all MLPs: the fraction of the hidden units that `shallow` keeps, in eighths.

ShallowMLP (arXiv 2512.01059, equation 2) is the point ratio=0.5. Trained weights are sliced by `reconstruction`, and repaired.
"""

POINTS = [{"ratio": 0.5}]


def suggest(trial, model):
    ratio = trial.suggest_float("ratio", 0.125, 1.0, step=0.125)
    units = model.units["reconstruction"] if model.trained else {}
    return [("shallow", {"ratio": ratio, **units})] if ratio < 1 else []
