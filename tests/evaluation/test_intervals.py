"""Intervals against published tables and recorded values."""

import numpy as np
import pytest

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
    ("successes", "n", "confidence", "low", "high"),
    [
        (0, 1, 0.95, 0.0, 0.7934506856227626),
        (1, 1, 0.95, 0.2065493143772375, 1.0),
        (0, 20, 0.95, 0.0, 0.1611251580528193),
        (7, 7, 0.95, 0.6456695649333126, 1.0),
        (81, 263, 0.95, 0.2552885198782743, 0.36620957698280016),
        (167, 360, 0.95, 0.41302669640146544, 0.5155136077071624),
        (6731, 10_000, 0.99, 0.6609059776546202, 0.6850644745276561),
        (1, 2, 0.5, 0.2847588845819623, 0.7152411154180376),
        (9999, 10_000, 0.95, 0.9994337311025987, 0.9999823473263989),
    ],
)
def test_wilson_keeps_the_values_of_earlier_reports(successes, n, confidence, low, high):
    """Recorded from the formula written out, with the quantile of Python's own normal
    distribution.
    """
    assert wilson(successes, n, confidence) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 360, 10_000])
def test_wilson_reaches_its_bounds_exactly(n):
    assert wilson(0, n)[0] == 0.0
    assert wilson(n, n)[1] == 1.0


def test_wilson_stays_inside_and_mirrors():
    assert wilson(0, 7)[0] == 0
    assert wilson(7, 7)[1] == 1
    low, high = wilson(3, 11)
    assert wilson(8, 11) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("only_first", "only_second", "exact", "mid"),
    [
        (0, 0, 1.0, 1.0),
        (10, 0, 0.001953125, 0.0009765625),
        (1, 5, 0.21875, 0.125),
        (30, 52, 0.019826915845841595, 0.015232201861994659),
        (7, 7, 1.0, 1.0),
        (86, 150, 3.715936139571442e-05, 2.89338951761549e-05),
        (410, 500, 0.003153040908555683, 0.002845133255630824),
        (5000, 5000, 1.0, 1.0),
        (5200, 4800, 6.593515598672442e-05, 6.326218680730252e-05),
    ],
)
def test_mcnemar_keeps_the_values_of_earlier_reports(only_first, only_second, exact, mid):
    """Recorded from sums of binomial coefficients in whole numbers."""
    first = [True] * only_first + [False] * only_second + [True] * 3
    second = [False] * only_first + [True] * only_second + [True] * 3
    for mid_p, expected in ((False, exact), (True, mid)):
        assert mcnemar(first, second, mid_p) == pytest.approx(expected, rel=1e-11, abs=1e-12)
        assert mcnemar(second, first, mid_p) == mcnemar(first, second, mid_p)


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
