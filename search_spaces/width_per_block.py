"""A hidden width for each MLP, in eighths of its own: blocks need not be alike.

Trained weights are sliced by `reconstruction`, and repaired.
"""

EIGHTHS = 8


def suggest(trial, model):
    widths = {}
    for mlp in model.owners:
        kept = trial.suggest_int(mlp.name, 1, EIGHTHS)
        if kept < EIGHTHS:
            widths[mlp.name] = max(1, mlp.hidden_features * kept // EIGHTHS)
    units = model.units["reconstruction"] if model.trained else {}
    return [("shallow", {"widths": widths, **units})] if widths else []
