"""How far features fall into their classes by themselves: normalised mutual information of k-means
clusters and labels, as CLAReps are judged (arXiv 2506.09955). Its protocol was not to be had
(UNVERIFIED): as many clusters as classes, rows of unit length, 10 starts.
"""

from __future__ import annotations

import dataclasses
import statistics

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray.errors import DataError

STARTS = 10


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Normalised mutual information in [0,1]: mean over k-means' seeds, and its deviation."""

    mean: float
    deviation: float


def agreement(features: Tensor, labels: Tensor, seeds: int = 5) -> Agreement:
    """Of `features` [N,D], whose rows are brought to unit length, and classes int64 [N].

    Raises `DataError` for fewer images than classes need, or features that are not finite or all
    the same.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    classes = len(labels.unique())
    if len(features) < 2 * classes or classes < 2:
        raise DataError(
            f"{len(features)} images of {classes} classes are too few to cluster; give at least "
            "two of each of two classes"
        )
    if not bool(features.isfinite().all()):
        raise DataError("features are not finite, so they have no clusters; check the teacher")
    rows = F.normalize(features.double(), dim=1)
    if bool(torch.isclose(rows, rows[:1], atol=1e-9).all()):
        raise DataError(
            "all features are the same, so they have no clusters; choose another layer or noise "
            "level"
        )
    scores = []
    for seed in range(seeds):
        means = KMeans(n_clusters=classes, n_init=STARTS, random_state=seed)
        found = means.fit_predict(rows.numpy())
        scores.append(float(normalized_mutual_info_score(labels.numpy(), found)))
    return Agreement(statistics.fmean(scores), statistics.pstdev(scores))
