"""The width of each MLP of a trained model at a budget, by `reconstruction` and refitted: for `mlpreduce.tune`.

Widths are those that move what the model gives least, by what was measured of each MLP alone, or equal parts of all; what each
is worth, or its part, is raised or lowered. Equal parts are what most reductions take.
"""

STEPS = 32  # widths of an MLP
CRITERION = {"name": "reconstruction", "metric": "loss"}


def points(model):
    level = {mlp.name: 0.0 for mlp in model.owners}
    return [{"begin": begin, **level} for begin in ("worth", "uniform")]


def suggest(trial, model):
    begin = trial.suggest_categorical("begin", ["worth", "uniform"])
    more = {mlp.name: trial.suggest_float(mlp.name, -0.5, 0.5, step=0.125) for mlp in model.owners}  # in powers of two
    widths = model.widths(begin, {name: 2.0**power for name, power in more.items()}, steps=STEPS)
    return [("shallow", {"widths": widths, "criterion": CRITERION, "repair": "least_squares"})] if widths else []
