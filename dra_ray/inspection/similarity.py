"""How alike two representations of the same images are: CKNNA and CKA (arXiv 2602.19931, figures 1
and 9, appendix A).

Written from the definitions of Huh et al. (arXiv 2405.07987, appendix A), Kornblith et al. (arXiv
1905.00414) and Song et al. (2012, JMLR 13:1393, equation 5); no n x n matrix is held. Which layer,
how many images, which k and which clamp the paper took is not in the text we have (UNVERIFIED): the
defaults are the public script's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray.errors import DataError

NEIGHBOURS, QUANTILE = 10, 0.95
EPS = 1e-6  # the public script's; with few images it shows
_ROWS = 1024  # of the kernel at a time


def prepared(features: Tensor, quantile: float = QUANTILE) -> Tensor:
    """Features [N,D] as float64 [N,D] rows of length 1, after large values are clamped.

    The bound is the mean over images of the `quantile` of their absolute values; 1 for none. Raises
    `DataError` for values that are not finite, rows without direction and fewer than 4 images,
    which the unbiased estimate needs.
    """
    if features.ndim != 2 or len(features) < 4:
        raise DataError(f"features are {list(features.shape)}; give [N,D] with at least 4 images")
    rows = features.double()
    if not bool(rows.isfinite().all()):
        raise DataError("features are not all finite; check the model and its images")
    if quantile < 1:
        bound = rows.abs().quantile(quantile, dim=1).mean()
        rows = rows.clamp(-bound, bound)
    if not bool(rows.norm(dim=1).all()):
        raise DataError("a feature is zero in every dimension, so it has no direction")
    return F.normalize(rows, dim=1)


def cka(a: Tensor, b: Tensor, unbiased: bool = False) -> float:
    """Linear CKA of features [N,D] and [N,E] of the same images, as they are: see `prepared`.

    `unbiased` takes Song's estimate of HSIC, which is 0 on average for independent features.
    """
    _check(a, b)
    hsic = _hsic_unbiased if unbiased else _hsic
    return _normalised(hsic(a, b), hsic(a, a), hsic(b, b))


def _hsic(a: Tensor, b: Tensor) -> float:
    """tr(KHLH) of linear kernels."""
    return float(((a - a.mean(0)).T @ (b - b.mean(0))).square().sum())


def _hsic_unbiased(a: Tensor, b: Tensor) -> float:
    own_a, own_b = a.square().sum(1), b.square().sum(1)  # the diagonals
    rows_a, rows_b = a @ a.sum(0) - own_a, b @ b.sum(0) - own_b
    product = (a.T @ b).square().sum() - (own_a * own_b).sum()
    return _song(len(a), float(product), rows_a, rows_b)


def _song(n: int, product: float, rows_a: Tensor, rows_b: Tensor) -> float:
    """Equation 5, from the sum over i and j of K_ij L_ji, the column sums of K and the row sums of
    L, both without diagonal.
    """
    whole = float(rows_a.sum() * rows_b.sum()) / ((n - 1) * (n - 2))
    across = 2 * float((rows_a * rows_b).sum()) / (n - 2)
    return (product + whole - across) / (n * (n - 3))


def _normalised(across: float, a: float, b: float) -> float:
    return across / (math.sqrt(max(a * b, 0.0)) + EPS)


def cknna(a: Tensor, b: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Unbiased CKA of features [N,D] and [N,E] over pairs of images where the second is among the
    nearest `neighbours` of the first in both, by inner product: 1 is alike, about 0 independent.

    Give rows of length 1 (`prepared`). Raises `DataError` for `neighbours` below 2 or not below N.
    """
    _check(a, b)
    if not 2 <= neighbours < len(a):
        raise DataError(
            f"neighbours={neighbours} of {len(a)} images; choose at least 2, and fewer than images"
        )
    one, two = _Near.of(a, neighbours), _Near.of(b, neighbours)
    return _normalised(_local(one, two), _local(one, one), _local(two, two))


@dataclasses.dataclass(frozen=True)
class _Near:
    """Features, and each row's nearest others as sorted pairs: i * N + j, int64."""

    features: Tensor
    pairs: np.ndarray

    @classmethod
    def of(cls, features: Tensor, neighbours: int) -> _Near:
        pairs, count = [], len(features)
        for start in range(0, count, _ROWS):
            kernel = features[start : start + _ROWS] @ features.T
            rows = torch.arange(start, start + len(kernel))
            kernel[rows - start, rows] = -torch.inf
            near = kernel.topk(neighbours, dim=1).indices
            pairs.append((rows[:, None] * count + near).flatten())
        return cls(features, np.sort(torch.cat(pairs).numpy()))


def _local(one: _Near, two: _Near) -> float:
    """Song's estimate for both kernels, zero where a pair is not near in both."""
    n = len(one.features)
    pairs = np.intersect1d(one.pairs, two.pairs, assume_unique=True)
    i, j = torch.from_numpy(pairs // n), torch.from_numpy(pairs % n)
    k, el = ((of.features[i] * of.features[j]).sum(1) for of in (one, two))
    back, _, place = np.intersect1d(
        pairs, (j * n + i).numpy(), assume_unique=True, return_indices=True
    )
    both = torch.from_numpy(np.searchsorted(pairs, back))  # (i, j) where (j, i) is near as well
    product = float((k[both] * el[torch.from_numpy(place)]).sum())
    columns = torch.zeros(n, dtype=torch.float64).index_add_(0, j, k)
    rows = torch.zeros(n, dtype=torch.float64).index_add_(0, i, el)
    return _song(n, product, columns, rows)


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 4:
        raise DataError(
            f"features are {list(a.shape)} and {list(b.shape)}; give [N,D] and [N,E] of the same "
            "images, at least 4"
        )


@dataclasses.dataclass(frozen=True)
class Rank:
    """Spearman's rank correlation over models, its p-value and 95 % bootstrap interval (None for
    fewer than 5 models).
    """

    models: int
    rho: float
    p_value: float
    interval: tuple[float, float] | None


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Rank | None:
    """Of two lists over the same models; None for fewer than 3, or where either is constant."""
    from scipy import stats  # takes a second to load

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found = stats.spearmanr(x, y)
    return Rank(len(x), float(found.statistic), float(found.pvalue), _interval(x, y, seed))


def _interval(x: Sequence[float], y: Sequence[float], seed: int) -> tuple[float, float] | None:
    if len(x) < 5:
        return None
    from scipy import stats

    draws = np.random.default_rng(seed)
    values = []
    for pick in draws.integers(0, len(x), (2000, len(x))):
        one, two = np.asarray(x)[pick], np.asarray(y)[pick]
        if len(set(one)) > 1 and len(set(two)) > 1:
            values.append(stats.spearmanr(one, two).statistic)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
