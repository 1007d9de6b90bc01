"""Neighbours that share one MLP of a trained model, with corrections as large as the budget allows: for `mlpreduce.tune`.

Units are aligned by what they do, and each use corrects the shared layer by what it lacks itself, to the highest rank that the
budget of parameters leaves (arXiv 2410.20672).
"""


def points(model):
    return [{f"pair{row}": True for rows in model.chains for row in rows[:-1:2]}]


def suggest(trial, model):
    pattern = []
    for rows in model.chains:
        place = 0
        while place < len(rows):
            pair = place + 1 < len(rows) and trial.suggest_categorical(f"pair{rows[place]}", [True, False])
            pattern.append(list(rows[place : place + 1 + pair]))
            place += 1 + pair
    if all(len(group) == 1 for group in pattern):
        return []
    step = {"pattern": pattern, "scale": "none", "keep": "align_activations", "repair": "least_squares"}
    if most := model.limit("params"):
        step["per_use"] = {"name": "lora", "init": "residual", "target_params": most}
    return [("grouped", step)]
