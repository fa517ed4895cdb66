"""How many directions of its features a classifier needs (arXiv 2602.19931, figure 7 and table 3).

Features are projected on their k main directions before the last layer: the smallest k that keeps
95 or 99 % of the clean accuracy is CLS-95 and CLS-99 (Feng et al., arXiv 2206.06072), and the k
with the highest accuracy on adversarial images is the robust dimension. All k come from one pass:
the logits of k + 1 directions are those of k plus one product.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dra_ray.errors import DataError

_ROWS = 256  # images at a time: their logits for every k are in memory
SHARES = (0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Accuracies (fractions) by how many directions are kept, k = 1 .. D at index k - 1.

    Attributes:
        clean, robust: accuracy on clean and on adversarial images.
        cls_95, cls_99: smallest k whose clean accuracy is at least 95 and 99 % of that of all.
        robust_dimension: smallest k of the highest accuracy on adversarial images.
        full_clean, full_robust: accuracy with the features as they are.
    """

    clean: list[float]
    robust: list[float]
    cls_95: int
    cls_99: int
    robust_dimension: int
    full_clean: float
    full_robust: float


def dimensions(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    centred: bool = False,
) -> Dimensions:
    """Of a classifier whose last layer is `weight` [K,D] and `bias` [K], from its features [N,D] of
    clean and adversarial images with `labels` int64 [N].

    Directions are those of the covariance of the clean features. The features themselves are
    projected, without their mean taken off, as the public code does; `centred` projects them around
    their mean. Adversarial images are those of the whole classifier. That 95 and 99 % are shares of
    its accuracy is our reading (UNVERIFIED). Raises `DataError` for sizes that do not fit, values
    that are not finite, and features that are constant.
    """
    _check(clean, adversarial, labels, weight)
    clean, adversarial, weight = clean.double(), adversarial.double(), weight.double()
    offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    mean = clean.mean(0)
    around = clean - mean
    variances, directions = torch.linalg.eigh(around.T @ around / len(clean))
    if not variances[-1] > 0:
        raise DataError("the features are the same for all images; the model tells none apart")
    directions = directions.flip(1)
    base = mean if centred else torch.zeros_like(mean)
    curves = [
        _curve(features - base, labels, directions, weight, offset + weight @ base)
        for features in (clean, adversarial)
    ]
    full = [
        float(((f @ weight.T + offset).argmax(1) == labels).double().mean())
        for f in (clean, adversarial)
    ]
    first, second = (_smallest(curves[0], share * full[0]) for share in SHARES)
    best = int(torch.tensor(curves[1]).argmax()) + 1  # the first of equals
    return Dimensions(curves[0], curves[1], first, second, best, full[0], full[1])


def _curve(
    features: Tensor, labels: Tensor, directions: Tensor, weight: Tensor, offset: Tensor
) -> list[float]:
    """Accuracy with the first 1 .. D directions."""
    heads = weight @ directions  # [K,D]: what a step along each direction adds to the logits
    right = torch.zeros(directions.shape[1], dtype=torch.float64)
    for rows, truth in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        steps = (rows @ directions)[:, :, None] * heads.T  # [n,D,K]
        logits = steps.cumsum(1) + offset
        right += (logits.argmax(2) == truth[:, None]).double().sum(0)
    return [float(share) for share in right / len(labels)]


def _smallest(curve: list[float], least: float) -> int:
    return next((k for k, value in enumerate(curve, 1) if value >= least - 1e-12), len(curve))


def _check(clean: Tensor, adversarial: Tensor, labels: Tensor, weight: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (clean, adversarial, labels, weight)]
    fits = (
        clean.ndim == 2
        and clean.shape == adversarial.shape
        and labels.shape == clean.shape[:1]
        and weight.ndim == 2
        and weight.shape[1] == clean.shape[1]
        and len(clean) > 1
    )
    if not fits:
        raise DataError(
            f"clean features are {shapes[0]}, adversarial ones {shapes[1]}, labels {shapes[2]} and "
            f"the last layer {shapes[3]}; give [N,D], [N,D], [N] and [K,D] with N above 1"
        )
    if not bool(clean.isfinite().all() and adversarial.isfinite().all()):
        raise DataError("features are not all finite; check the model and its images")
