"""How a fixed reduction is trained: peak learning rate, weight decay and drop path. Search it with --objectives top1.

Copy this file and change REDUCTION to the reduction that you are about to train.
"""

REDUCTION = [("grouped", {"group": 2})]


def suggest(trial):
    return REDUCTION


def settings(trial):
    return {
        "train.lr": trial.suggest_float("lr", 1e-4, 2e-2, log=True),
        "train.weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
        "model.kwargs.drop_path_rate": trial.suggest_float("drop_path_rate", 0.0, 0.3, step=0.05),
    }
