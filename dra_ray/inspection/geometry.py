"""Where features lie: cosines, alignment and uniformity, effective dimension, the best constants.

Pure functions of features [N,D], in float64. Wang & Isola (arXiv 2005.10242) measure with alignment
and uniformity what the paper of DRA draws in figures 4 and 5 (arXiv 2602.19931), where the positive
pair of an image is its adversarial image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray.errors import DataError


def units(features: Tensor) -> Tensor:
    """Rows of length 1, float64 [N,D]; a row of zeros stays."""
    return F.normalize(features.double(), dim=1)


def mean_cosines(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine of two different images of one class, and of two classes; NaN without a pair."""
    rows, members = units(features), F.one_hot(labels.long()).double()
    sums, own = members.T @ rows, rows.square().sum()
    alike = members.sum(0).square().sum() - len(rows)
    apart = len(rows) ** 2 - members.sum(0).square().sum()
    within, whole = sums.square().sum(), rows.sum(0).square().sum()
    return float((within - own) / alike), float((whole - within) / apart)


def uniformity(features: Tensor, temperature: float = 2.0) -> float:
    """Log of the mean of exp(-t |u - v|^2) over pairs of unit rows (Wang & Isola, arXiv
    2005.10242): 0 where all are equal, about -4 where they are spread evenly.
    """
    rows = units(features)
    total = sum(
        (2 * temperature * (part @ rows.T - 1)).exp().sum().item() for part in rows.split(512)
    )
    pairs = len(rows) * (len(rows) - 1)
    equal = (2 * temperature * (rows.square().sum(1) - 1)).exp().sum().item()
    return float(torch.tensor((total - equal) / pairs).log())


def effective_dimension(features: Tensor, centred: bool = False) -> float:
    """Participation ratio of the spectrum, (sum l)^2 / sum l^2 over the eigenvalues l of the second
    moment, or of the covariance where `centred`: 1 on a line, D where all directions are equal.
    """
    rows = features.double()
    rows = rows - rows.mean(0) if centred else rows
    moment = rows.T @ rows if rows.shape[1] <= len(rows) else rows @ rows.T  # equal spectra
    return float(moment.trace() ** 2 / moment.square().sum().clamp_min(1e-300))


def constant_loss(features: Tensor) -> float:
    """Alignment loss of the best constant vector, which learns nothing: 1 - |mean unit row|."""
    return float(1 - units(features).mean(0).norm())


def class_constant_loss(features: Tensor, labels: Tensor) -> float:
    """The same of the best constant per class, which knows the class and nothing else."""
    rows, members = units(features), F.one_hot(labels.long()).double()
    return float(1 - (members.T @ rows).norm(dim=1).sum() / len(rows))


def alignment(features: Tensor, positives: Tensor) -> float:
    """Mean of |u - v|^2 over pairs of unit rows, one of `features` [N,D] and one of `positives`
    [N,D] each: 0 where all pairs coincide, 2 where they are unrelated. Raises `DataError` for
    unlike shapes.
    """
    if features.shape != positives.shape or not len(features):
        raise DataError(
            f"features are {list(features.shape)} and their positives {list(positives.shape)}; "
            "give equally many of one width"
        )
    return float((units(features) - units(positives)).square().sum(1).mean())
