"""Intervals against published tables and against scipy."""

import numpy as np
import pytest
from scipy.stats import binomtest

from dra_ray.evaluation.intervals import bootstrap_difference, mcnemar, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_newcombes_table(successes, n, low, high):
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3
    assert np.round(wilson(successes, n), 4).tolist() == [low, high]


@pytest.mark.parametrize(
    ("successes", "n", "confidence"),
    [(263, 263, 0.95), (247, 360, 0.95), (6731, 10_000, 0.99), (1, 2, 0.5)],
)
def test_wilson_is_scipys(successes, n, confidence):
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_wilson_stays_inside_and_mirrors():
    assert wilson(0, 7)[0] == 0 and wilson(7, 7)[1] == 1
    low, high = wilson(3, 11)
    assert wilson(8, 11) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("only_first", "only_second", "both"),
    [(86, 150, 794), (0, 0, 5), (3, 0, 4), (5, 5, 0), (0, 12, 1)],
)
def test_mcnemar_is_the_binomial_test(only_first, only_second, both):
    first = [True] * only_first + [False] * only_second + [True] * both
    second = [False] * only_first + [True] * only_second + [True] * both
    disagree = only_first + only_second
    expected = binomtest(only_first, disagree).pvalue if disagree else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_of_ten_thousand_disagreements():
    first = np.arange(10_000) % 2 == 0
    assert mcnemar(first, ~first) == 1.0


def test_bootstrap_is_the_normal_interval_of_paired_differences():
    rng = np.random.default_rng(0)
    first = rng.random(4000) < 0.6
    second = np.where(rng.random(4000) < 0.1, ~first, first)
    difference, low, high = bootstrap_difference(first, second)
    paired = second.astype(float) - first
    error = 1.96 * paired.std() / np.sqrt(len(paired))
    assert difference == pytest.approx(paired.mean())
    assert (low, high) == pytest.approx((difference - error, difference + error), abs=0.1 * error)
    assert bootstrap_difference(first, second) == (difference, low, high)


def test_bootstrap_of_a_model_with_itself_is_nothing():
    assert bootstrap_difference([True, False, True], [True, False, True]) == (0.0, 0.0, 0.0)


def test_what_cannot_be_an_accuracy_is_refused():
    with pytest.raises(ValueError, match="successes=5 of n=4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="confidence=95"):
        wilson(1, 4, 95)
    with pytest.raises(ValueError, match="equally long"):
        mcnemar([True], [True, False])
