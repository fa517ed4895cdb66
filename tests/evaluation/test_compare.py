"""Two models on the same images: McNemar and its mid-p against scipy, the bootstrap against
resampling, and `dra compare`.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from dra_ray.errors import ConfigError, DataError
from dra_ray.evaluation import compare
from dra_ray.evaluation.intervals import mcnemar
from dra_ray.storage import Store
from tests.support.command import dra


def verdicts(only_a: int, only_b: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(1, 5), (30, 52), (52, 30), (7, 7), (0, 4), (0, 0), (410, 500)]
)
def test_exact_and_mid_p_are_scipys_binomial(only_a: int, only_b: int) -> None:
    a, b = verdicts(only_a, only_b, 40, 9)
    disagree, fewer = only_a + only_b, min(only_a, only_b)
    coin = stats.binom(disagree, 0.5)
    found = compare.compare(a, b)
    assert (found.only_a, found.only_b, found.images) == (only_a, only_b, disagree + 49)
    assert found.p_value == pytest.approx(
        stats.binomtest(only_a, disagree).pvalue if disagree else 1.0
    )
    assert found.mid_p == pytest.approx(2 * coin.cdf(fewer - 1) + coin.pmf(fewer))
    assert found.mid_p <= found.p_value
    assert mcnemar(b, a, mid_p=True) == found.mid_p


def test_mid_p_is_less_cautious_and_nearer_to_its_level() -> None:
    """How often each rejects a true hypothesis at 5 %, exactly, over 10 to 40 disagreements."""
    rates = []
    for disagree in range(10, 41):
        splits = stats.binom(disagree, 0.5).pmf(range(disagree + 1))
        rates.append(
            [
                sum(
                    p
                    for k, p in enumerate(splits)
                    if mcnemar(*verdicts(k, disagree - k, 1, 0), mid_p=mid) < 0.05
                )
                for mid in (False, True)
            ]
        )
    assert max(exact for exact, _ in rates) < 0.05
    exact, mid = np.mean(rates, axis=0)
    assert exact < 0.035
    assert abs(mid - 0.05) < 0.005


def test_the_interval_is_that_of_resampled_images() -> None:
    a, b = verdicts(60, 100, 500, 340)
    found = compare.compare(a, b)
    picks = np.random.default_rng(1).integers(0, 1000, (4000, 1000))
    low, high = np.quantile(b[picks].mean(1) - a[picks].mean(1), [0.025, 0.975])
    assert found.interval == pytest.approx((low, high), abs=2e-3)
    assert found.difference == pytest.approx(0.04)
    assert (found.accuracy_a, found.accuracy_b) == (
        0.56,
        0.6,
    )
    assert found == compare.compare(a, b)
    back = compare.compare(b, a)
    assert back.difference == -found.difference
    assert back.p_value == found.p_value


def test_the_sentence_claims_no_more_than_the_test() -> None:
    sure, unsure = (
        compare.compare(*verdicts(60, 100, 500, 340)),
        compare.compare(*verdicts(14, 17, 500, 469)),
    )
    assert sure.distinguishable
    assert not unsure.distinguishable
    assert compare.sentence(sure, "AutoAttack").startswith(
        "AutoAttack: B is 4.00 points above A on 1000 images (95 % interval +1."
    )
    assert compare.sentence(sure, "x").endswith("more than the choice of the images explains.")
    assert "B is 0.30 points above" in compare.sentence(unsure, "x")
    assert "about 1.09 points to stand out" in compare.sentence(unsure, "x")
    assert "below A" in compare.sentence(compare.compare(*verdicts(17, 14, 500, 469)), "x")
    assert "the same verdict on each of the 5 images" in compare.sentence(
        compare.compare(*verdicts(0, 0, 3, 2)), "x"
    )
    assert "equal on 9 images, though they disagree on 4" in compare.sentence(
        compare.compare(*verdicts(2, 2, 3, 2)), "x"
    )
    big = compare.compare(
        *verdicts(100, 100 + round(1000 * unsure.needed), 500, 0)
    )  # what is needed grows with the disagreements
    assert big.needed > unsure.needed


# -- runs ------------------------------------------------------------------------------------------
N = 200
RESULT = {
    "images": N,
    "threat": {"norm": "linf", "eps_255": 8.0},
    "seed": 0,
    "batch": 64,
    "pgd_steps": 20,
    "effort": {"apgd_steps": 100},
}


def run(
    tmp_path, name: str, seed: int, settings: dict | None = None, labels: int = 0, **changes
) -> Store:
    """An evaluated run whose verdicts a seed gives."""
    store, rng = Store(str(tmp_path)) / name, np.random.default_rng(seed)
    clean = rng.random(N) < 0.9
    pgd = clean & (rng.random(N) < 0.7)
    arrays = {
        "clean_correct": clean,
        "pgd_correct": pgd,
        "robust": pgd & (rng.random(N) < 0.9),
        "labels": (np.arange(N) + labels) % 10,
    }
    (store / "evaluation/per_sample.npz").write_npz(**arrays)
    (store / "evaluation/autoattack.json").write_json(
        RESULT | ({"settings": settings} if settings else {}) | changes
    )
    return store


def test_runs_are_compared_in_all_that_both_have(tmp_path) -> None:
    a, b = run(tmp_path, "a", 0), run(tmp_path, "b", 1)
    found = compare.compare_runs(a, b)
    assert [row["what"] for row in found["rows"]] == ["Clean", "PGD-20", "AutoAttack"]
    assert found["sentence"].startswith("AutoAttack: B is ")
    assert len(found["notes"]) == 1
    for row, name in zip(found["rows"], ("clean_correct", "pgd_correct", "robust"), strict=True):
        one, two = ((store / "evaluation/per_sample.npz").read_npz()[name] for store in (a, b))
        assert row["difference"] == pytest.approx(two.mean() - one.mean())
        assert (row["only_a"], row["only_b"]) == (int((one & ~two).sum()), int((two & ~one).sum()))
    assert [row["only A right"] for row in compare.table(found)] == [
        row["only_a"] for row in found["rows"]
    ]
    assert "same verdict" in compare.compare_runs(a, a)["sentence"]
    assert compare.compare_runs(a, b, "pgd")["sentence"].startswith("PGD-20: ")
    assert (
        compare.compare_runs(a / "evaluation", b)["rows"] == found["rows"]
    )  # where `dra evaluate --to` has put it


def test_runs_that_cannot_be_paired_are_refused(tmp_path) -> None:
    a = run(tmp_path, "a", 0, {"images": "aa", "version": "standard"})

    def refused(words: str, what: str = "autoattack", **changes) -> None:
        with pytest.raises(DataError, match=words) as caught:
            compare.compare_runs(a, run(tmp_path, "b", 1, **changes), what)
        assert "\n" not in str(caught.value)

    refused("the labels of their test images differ", labels=1)
    refused("their test images differ", settings={"images": "bb"})
    refused(
        "threat is .*8.0.* in one and .*4.0.* in the other", threat={"norm": "linf", "eps_255": 4.0}
    )
    refused("effort is", effort={"apgd_steps": 10})
    refused("version is standard in one and rand in the other", settings={"version": "rand"})
    refused("pgd_steps is 20 in one and 40 in the other", "pgd", pgd_steps=40)
    other = run(tmp_path, "c", 1, {"images": "aa", "version": "standard"}, pgd_steps=40)
    found = compare.compare_runs(a, other)  # AutoAttack does not depend on PGD's steps
    assert [row["what"] for row in found["rows"]] == ["Clean", "AutoAttack"]
    assert found["notes"] == ["PGD is not compared: pgd_steps is 20 in one and 40 in the other"]
    with pytest.raises(DataError, match="none' does not exist"):
        compare.compare_runs(a, Store(str(tmp_path)) / "none")
    with pytest.raises(ConfigError, match="--what autoatack: did you mean 'autoattack'"):
        compare.compare_runs(a, other, "autoatack")


@pytest.mark.seconds
def test_the_command_prints_the_table_and_the_sentence(tmp_path) -> None:
    a, b = run(tmp_path, "a", 0), run(tmp_path, "b", 1)

    done = dra(tmp_path, "compare", "a", "b", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["sentence"] in done.stdout
    assert "PGD-20" in done.stdout
    assert "note: " in done.stderr
    assert told | {"a": str(a), "b": str(b)} == compare.compare_runs(a, b)
    done = dra(tmp_path, "compare", "a", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'nowhere' does not exist")
    assert done.stderr.count("\n") == 1
