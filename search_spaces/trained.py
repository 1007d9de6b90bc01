"""The width of each MLP of a trained model at a budget, by `reconstruction` and refitted: for `mlpreduce.tune`.

Widths are those that move what the model gives least, by what was measured of each MLP alone, or equal parts of all; early MLPs
are then favoured over late ones, or those in the middle over both, or the other way round. A factor of each MLP by itself would
fit the few hundred examples of a score and no others: docs/tune.md has what that gave.
"""

STEPS = 192  # widths of an MLP: multiples of 8 of 1,536 hidden units
CRITERION = {"name": "reconstruction", "metric": "loss"}


def points(model):
    return [{"begin": begin, "late": 0.0, "ends": 0.0} for begin in ("worth", "uniform")]


def suggest(trial, model):
    begin = trial.suggest_categorical("begin", ["worth", "uniform"])
    late = trial.suggest_float("late", -0.5, 0.5, step=0.0625)  # in powers of two
    ends = trial.suggest_float("ends", -0.5, 0.5, step=0.0625)
    more, last = {}, max(1, len(model.owners) - 1)
    for row, mlp in enumerate(model.owners):
        depth = 2 * row / last - 1
        more[mlp.name] = 2.0 ** (late * depth + ends * (2 * depth**2 - 1))
    widths = model.widths(begin, more, steps=STEPS)
    return [("shallow", {"widths": widths, "criterion": CRITERION, "repair": "least_squares"})] if widths else []
