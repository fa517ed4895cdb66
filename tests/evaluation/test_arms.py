"""Two ways of training over several seeds: the tests against scipy, the interval against resampling
pairs and images, and `dra compare` with several runs.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from dra_ray.errors import ConfigError, DataError
from dra_ray.evaluation import arms
from tests.evaluation.test_compare import N, run
from tests.support.command import dra


def verdicts(pairs: int, images: int = 400, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Of two arms on images that are hard or easy for all, and seeds that are lucky or not."""
    draws = np.random.default_rng(pairs)
    hard, lucky = draws.normal(size=images), draws.normal(size=(pairs, 2, 1)) / 10
    noise = draws.normal(size=(pairs, 2, images)) / 2
    robust = hard + lucky + noise + np.array([[0], [gain]]) > 0
    return robust[:, 0], robust[:, 1]


def test_the_t_test_and_its_interval_are_scipys() -> None:
    a, b = verdicts(6, gain=0.1)
    found = arms.compare_arms(a, b)
    expected = stats.ttest_rel(b.mean(1), a.mean(1))
    assert found.p_value == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high))
    assert found.differences == pytest.approx(b.mean(1) - a.mean(1))
    assert found.difference == pytest.approx(b.mean() - a.mean())
    back = arms.compare_arms(b, a)
    assert (back.difference, back.p_value) == pytest.approx((-found.difference, found.p_value))


def test_flipped_signs_are_scipys_permutations() -> None:
    differences = np.array([0.3, 0.1, -0.05, 0.2, 0.4, 0.02])
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert arms.sign_flips(differences) == pytest.approx(exact.pvalue)
    assert arms.sign_flips(np.full(5, 0.1)) == 2 / 2**5
    assert arms.sign_flips(np.ones(arms.MOST_SIGNS + 1)) is None


def test_the_interval_over_both_is_that_of_resampled_pairs_and_images() -> None:
    a, b = verdicts(8, gain=0.2)
    found = arms.compare_arms(a, b)
    draws, gains = np.random.default_rng(1), b.astype(float) - a
    means = [
        gains[draws.integers(0, 8, 8)][:, draws.integers(0, 400, 400)].mean() for _ in range(4000)
    ]
    assert found.both == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=4e-3)
    of_one = arms.compare_arms(a, b).both
    assert found.both == of_one, "the same draws every time"


def test_two_ways_that_do_not_differ_are_told_apart_one_time_in_twenty() -> None:
    """Where seeds differ by more than chance in the images does, which a test over images alone
    takes for an effect.
    """
    draws = np.random.default_rng(0)
    told = []
    for _ in range(400):
        lucky = draws.normal(size=(5, 2, 1)) / 4
        robust = draws.normal(size=(1, 1, 500)) + lucky > 0
        told.append(arms.compare_arms(robust[:, 0], robust[:, 1]).distinguishable)
    assert 0.02 < np.mean(told) < 0.09


def test_equal_arms_have_no_difference() -> None:
    a, _ = verdicts(3)
    found = arms.compare_arms(a, a)
    assert (found.difference, found.p_value, found.interval) == (0, 1, (0, 0))
    assert "training seeds alone may do that" in arms.sentence(found, "x")
    always = arms.compare_arms(np.zeros((3, 5), bool), np.ones((3, 5), bool))
    assert always.p_value == 0
    assert arms.sentence(always, "x").startswith("x: B is 100.00 points above A over 3 pairs")


@pytest.mark.parametrize(
    "shapes", [((1, 5), (1, 5)), ((2, 5), (3, 5)), ((2, 0), (2, 0)), ((5,),) * 2]
)
def test_what_cannot_be_paired_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        arms.compare_arms(*(np.zeros(shape, bool) for shape in shapes))


def test_runs_of_both_arms_are_paired_by_their_place(tmp_path) -> None:
    a = [run(tmp_path, f"a{seed}", seed) for seed in range(3)]
    b = [run(tmp_path, f"b{seed}", 10 + seed) for seed in range(3)]
    found = arms.compare_runs(a, b)
    assert [row["what"] for row in found["rows"]] == ["Clean", "PGD-20", "AutoAttack"]
    for row, name in zip(found["rows"], ("clean_correct", "pgd_correct", "robust"), strict=True):
        means = [
            (two / "evaluation/per_sample.npz").read_npz()[name].mean()
            - (one / "evaluation/per_sample.npz").read_npz()[name].mean()
            for one, two in zip(a, b, strict=True)
        ]
        assert row["differences"] == pytest.approx(means)
    assert found["sentence"].startswith("AutoAttack: B is ")
    assert f"over 3 pairs of runs on {N} images" in found["sentence"]
    with pytest.raises(DataError, match="A has 3 runs and B 2; give as many of each"):
        arms.compare_runs(a, b[:2])
    with pytest.raises(DataError, match="b0' is given twice"):
        arms.compare_runs(a, [b[0], b[1], b[0]])
    with pytest.raises(ConfigError, match="--what clena: did you mean 'clean'"):
        arms.compare_runs(a, b, "clena")
    odd = run(tmp_path, "odd", 5, effort={"apgd_steps": 10})
    with pytest.raises(DataError, match="odd' cannot be compared image by image: effort is"):
        arms.compare_runs(a, [*b[:2], odd])
    found = arms.compare_runs(a, [*b[:2], odd], "pgd")
    assert [row["what"] for row in found["rows"]] == ["Clean", "PGD-20"]
    assert found["notes"][0].startswith("AutoAttack is not compared: effort is")


@pytest.mark.seconds
def test_the_command_takes_several_runs_of_each(tmp_path) -> None:
    for name in "abcd":
        run(tmp_path, name, ord(name))

    done = dra(tmp_path, "compare", "a,b", "c,d", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "over 2 pairs of runs" in " ".join(done.stdout.split())
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"][0]["differences"]) == 2
    done = dra(tmp_path, "compare", "a,b", "c")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "A has 2 runs and B 1" in done.stderr
