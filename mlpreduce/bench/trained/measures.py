"""How near features are to those of the whole model, and how well they serve."""

from __future__ import annotations

import torch

from mlpreduce.errors import optional

__all__ = ["Probe", "cosine", "rank_correlation", "similarities"]

_STRENGTH, _NEIGHBOURS = 50.0, 10


def cosine(whole: torch.Tensor, found: torch.Tensor) -> float:
    """The mean cosine of features, (examples, features)."""
    return float(torch.cosine_similarity(whole, found, dim=1).mean())


def similarities(features: torch.Tensor) -> torch.Tensor:
    """Of all pairs of examples, each once."""
    table = features @ features.T
    rows, columns = torch.triu_indices(len(table), len(table), offset=1)
    return table[rows, columns]


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr

    return float(spearmanr(one.numpy(), other.numpy()).statistic)


class Probe:
    """A linear classifier and nearest neighbours, made of features of the whole model.

    Args:
        features: of the examples that they are made of, (examples, features).
        classes: of these.
        wanted: classes of the tests.
    """

    def __init__(self, features: torch.Tensor, classes: torch.Tensor, wanted: torch.Tensor) -> None:
        linear = optional("bench trained", "sklearn.linear_model")
        neighbors = optional("bench trained", "sklearn.neighbors")
        preprocessing = optional("bench trained", "sklearn.preprocessing")
        self._scale = preprocessing.StandardScaler().fit(features.numpy())
        self._linear = linear.RidgeClassifier(_STRENGTH).fit(self._scale.transform(features.numpy()), classes.numpy())
        self._near = neighbors.KNeighborsClassifier(_NEIGHBOURS, metric="cosine").fit(features.numpy(), classes.numpy())
        self._wanted = wanted.numpy()

    def measure(self, features: torch.Tensor) -> dict[str, float]:
        """Accuracies of both in percent."""
        probe = self._linear.score(self._scale.transform(features.numpy()), self._wanted)
        return {"probe": 100 * float(probe), "knn": 100 * float(self._near.score(features.numpy(), self._wanted))}
