"""A hidden width for each MLP, in eighths of its own: blocks need not be alike."""

EIGHTHS = 8


def suggest(trial, model):
    widths = {}
    for mlp in model.owners:
        kept = trial.suggest_int(mlp.name, 1, EIGHTHS)
        if kept < EIGHTHS:
            widths[mlp.name] = max(1, mlp.hidden_features * kept // EIGHTHS)
    return [("shallow", {"widths": widths})] if widths else []
