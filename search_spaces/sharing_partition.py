"""Any split of the blocks into runs of neighbours, each with one MLP: whether a new MLP begins at each block.

GroupedMLP (arXiv 2512.01059) begins one at every second block.
"""


def suggest(trial, model):
    pattern = []
    for rows in model.chains:  # MLPs of one stage, which may share
        for row in rows:
            if row == rows[0] or trial.suggest_categorical(f"new{row}", [True, False]):
                pattern.append([])
            pattern[-1].append(row)
    return [("grouped", {"pattern": pattern})] if any(len(group) > 1 for group in pattern) else []
