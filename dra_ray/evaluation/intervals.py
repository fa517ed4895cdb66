"""How sure an accuracy, or a difference of two, is.

Gains in robust accuracy are 0.3 to 2 points, while the binomial error on 10,000 images is 0.5 and
on 360 images 2.5 points: two models are to be compared image by image, with `mcnemar` and
`bootstrap_difference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Flags = Sequence[bool] | np.ndarray
"""One flag per image: correct, or robust."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Newcombe 1998, Statistics in Medicine 17,
    method 3).
    """
    from scipy import (
        stats,
    )  # inside: loading it takes a second, which every worker of an evaluation would pay

    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes={successes} of n={n}: expected 0 <= successes <= n and n >= 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(
    first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference `first` - `second` of two proportions on different images, each
    (successes, n), from Wilson's intervals of both (Newcombe 1998, Statistics in Medicine 17:873,
    method 10).
    """
    one, two = first[0] / first[1], second[0] / second[1]
    low_one, high_one = wilson(*first, confidence)
    low_two, high_two = wilson(*second, confidence)
    difference = one - two
    low = difference - float(np.hypot(one - low_one, high_two - two))
    high = difference + float(np.hypot(high_one - one, two - low_two))
    return low, high


def discordant(first: Flags, second: Flags) -> tuple[int, int]:
    """Images that only `first` gets right, and those that only `second` does."""
    one, two = _paired(first, second)
    return int((one & ~two).sum()), int((two & ~one).sum())


def mcnemar(first: Flags, second: Flags, mid_p: bool = False) -> float:
    """Exact two-sided p-value that two models err equally often on the same images (McNemar 1947,
    binomial form).

    Only images on which they disagree count. Returns 1.0 when there are none. With `mid_p`, the
    probability of what was observed counts once instead of twice (Fagerland et al. 2013, BMC
    Medical Research Methodology 13:91): less cautious.
    """
    from scipy import stats

    only_first, only_second = discordant(first, second)
    fewer, disagree = min(only_first, only_second), only_first + only_second
    if not disagree:
        return 1.0
    if not mid_p:
        return min(1.0, 2 * heads(fewer, disagree))
    coin = stats.binom(disagree, 0.5)
    return min(1.0, float(2 * coin.cdf(fewer - 1) + coin.pmf(fewer)))


def heads(at_most: int, throws: int) -> float:
    """Chance that a fair coin shows heads `at_most` times in so many throws."""
    from scipy import special  # a hundredth of what scipy.stats takes per call

    return float(special.bdtr(at_most, throws, 0.5)) if at_most < throws else 1.0


def behind(first: Flags, second: Flags) -> float:
    """Exact one-sided p-value of McNemar's test: how often chance alone would put `first` so far
    behind `second` on the same images.
    """
    only_first, only_second = discordant(first, second)
    return heads(only_first, only_first + only_second)


def behind_unpaired(first: tuple[int, int], second: tuple[int, int]) -> float:
    """`behind` for models judged on different images, each (successes, n): Fisher's exact test,
    one-sided, which is the test of two binomials given their sum.
    """
    from scipy import stats

    (won, n), (other, m) = first, second
    return float(stats.hypergeom(n + m, won + other, n).cdf(won))


def cochran(successes: np.ndarray, per_image: np.ndarray) -> float:
    """p-value of Cochran's Q test that all of k models are equally often right on the same images
    (Cochran 1950, Biometrika 37:256), chi-squared with k - 1 degrees of freedom.

    `successes` [k] counts the images of each model, `per_image` [N] the models that are right on
    each. 1.0 where no image tells models apart.
    """
    from scipy import special

    k = len(successes)
    spread = float((per_image * (k - per_image)).sum())
    if k < 2 or spread == 0:
        return 1.0
    q = k * (k - 1) * float(((successes - successes.mean()) ** 2).sum()) / spread
    return float(special.chdtrc(k - 1, q))


def homogeneous(successes: np.ndarray, n: np.ndarray) -> float:
    """`cochran` for models judged on images of their own, `n` [k] each: chi-squared."""
    from scipy import special

    rate = successes.sum() / n.sum()
    if len(successes) < 2 or rate in (0, 1):
        return 1.0
    q = float(((successes - n * rate) ** 2 / n).sum() / (rate * (1 - rate)))
    return float(special.chdtrc(len(successes) - 1, q))


def bootstrap_difference(
    first: Flags, second: Flags, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of `second` minus that of `first` on the same images: (difference, low, high),
    percentile bootstrap.

    Resampling n pairs only needs the counts of the three possible differences, so it is one
    multinomial draw.
    """
    n = len(first)
    lost, gained = discordant(first, second)
    counts = np.random.default_rng(seed).multinomial(
        n, [gained / n, lost / n, (n - gained - lost) / n], size=draws
    )
    spread = (counts[:, 0] - counts[:, 1]) / n
    low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (gained - lost) / n, float(low), float(high)


def _paired(first: Flags, second: Flags) -> tuple[np.ndarray, np.ndarray]:
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != two.shape or one.ndim != 1 or not len(one):
        raise ValueError(
            f"flags of shapes {one.shape} and {two.shape}: expected two equally long lists, one "
            "flag per image"
        )
    return one, two
