"""What the papers measure of representations, against plain definitions, scipy and the numbers of
the public script.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dra_ray.errors import DataError
from dra_ray.inspection import dimension, frequency, geometry, similarity


def pair(count: int, width: int, other: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of which the second are a noisy linear map of the first."""
    draws = np.random.default_rng(count)
    a = draws.normal(size=(count, width)) ** 3
    b = a @ draws.normal(size=(width, other)) + draws.normal(size=(count, other))
    return torch.from_numpy(a), torch.from_numpy(b)


# -- geometry --------------------------------------------------------------------------------------
def test_alignment_is_the_mean_squared_distance_of_directions() -> None:
    a, _ = pair(30, 5, 4)
    assert geometry.alignment(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert geometry.alignment(a, -a) == pytest.approx(4)
    b = a + torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b)]
    assert geometry.alignment(a, b) == pytest.approx(((unit[0] - unit[1]) ** 2).sum(1).mean())
    with pytest.raises(DataError, match=r"\[30, 5\] and their positives \[29, 5\]"):
        geometry.alignment(a, b[1:])


# -- similarity ------------------------------------------------------------------------------------
# by platonic-rep's metrics.py (commit dcd76ba) for these features: CKNNA, CKA, unbiased CKA
PUBLIC = {
    (40, 6, 9, 5): (0.69515304, 0.77451604, 0.74370865),
    (200, 16, 32, 10): (0.61535322, 0.76090068, 0.74441297),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_similarities_are_those_of_the_public_script(case: tuple[int, int, int, int]) -> None:
    *sizes, neighbours = case
    a, b = map(similarity.prepared, pair(*sizes))
    found = (
        similarity.cknna(a, b, neighbours),
        similarity.cka(a, b),
        similarity.cka(a, b, unbiased=True),
    )
    assert found == pytest.approx(PUBLIC[case], abs=1e-6)  # its clamp is in float32


def test_similarities_by_their_definitions() -> None:
    a, b = map(similarity.prepared, pair(50, 6, 9))
    n, k, el = 50, (a @ a.T).numpy(), (b @ b.T).numpy()
    centre = np.eye(n) - 1 / n
    hsic = [np.trace(x @ centre @ y @ centre) for x, y in ((k, el), (k, k), (el, el))]
    assert similarity.cka(a, b) == pytest.approx(hsic[0] / (np.sqrt(hsic[1] * hsic[2]) + 1e-6))

    def near(kernel: np.ndarray) -> np.ndarray:
        off = kernel - np.diag(np.full(n, np.inf))
        mask = np.zeros_like(kernel)
        np.put_along_axis(mask, np.argsort(-off, axis=1)[:, :7], 1, axis=1)
        return mask

    def song(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - np.diag(np.diag(x)), y - np.diag(np.diag(y))
        whole = x.sum() * y.sum() / ((n - 1) * (n - 2))
        return ((x * y.T).sum() + whole - 2 * (x @ y).sum() / (n - 2)) / (n * (n - 3))

    mask = near(k) * near(el)
    local = (
        song(mask * k, mask * el),
        song(near(k) * k, near(k) * k),
        song(near(el) * el, near(el) * el),
    )
    assert similarity.cknna(a, b, 7) == pytest.approx(
        local[0] / (np.sqrt(local[1] * local[2]) + 1e-6)
    )
    whole = song(k, el), song(k, k), song(el, el)
    assert similarity.cka(a, b, unbiased=True) == pytest.approx(
        whole[0] / (np.sqrt(whole[1] * whole[2]) + 1e-6)
    )


def test_similarity_does_not_see_rotations_and_independence_is_near_zero() -> None:
    a, _ = map(similarity.prepared, pair(3000, 12, 4))  # more rows than a block
    turn = torch.from_numpy(stats.ortho_group.rvs(12, random_state=0))
    assert similarity.cknna(a, a @ turn) == pytest.approx(similarity.cknna(a, a), abs=1e-9)
    assert similarity.cknna(a, a) == pytest.approx(1, abs=1e-2)
    draws = torch.Generator().manual_seed(1)
    other = similarity.prepared(torch.randn(3000, 12, generator=draws))
    assert abs(similarity.cknna(a, other)) < 0.05
    assert abs(similarity.cka(a, other, unbiased=True)) < 0.01


def test_what_has_no_similarity_is_refused() -> None:
    a, b = pair(20, 4, 5)
    with pytest.raises(DataError, match="at least 4 images"):
        similarity.prepared(a[:3])
    with pytest.raises(DataError, match="not all finite"):
        similarity.prepared(a.log())
    with pytest.raises(DataError, match="zero in every dimension"):
        similarity.prepared(a * (torch.arange(20) > 0)[:, None])
    with pytest.raises(DataError, match=r"\[20, 4\] and \[19, 5\]"):
        similarity.cka(a, b[1:])
    for neighbours in (1, 20):
        with pytest.raises(DataError, match=f"neighbours={neighbours} of 20 images"):
            similarity.cknna(a, b, neighbours)


def test_ranks_are_scipys() -> None:
    draws = np.random.default_rng(0)
    x = draws.normal(size=9)
    y = x + draws.normal(size=9)
    found = similarity.rank_correlation(list(x), list(y))
    assert found is not None
    expected = stats.spearmanr(x, y)
    assert (found.rho, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.interval is not None
    assert found.interval[0] <= found.rho <= found.interval[1]
    assert similarity.rank_correlation([1, 2], [1, 2]) is None
    assert similarity.rank_correlation([1, 2, 3], [1, 1, 1]) is None
    few = similarity.rank_correlation([1, 2, 3], [3, 2, 1])
    assert few is not None
    assert (few.rho, few.interval) == (-1, None)


# -- dimension -------------------------------------------------------------------------------------
def classifier() -> dict[str, torch.Tensor]:
    """Features along few directions of 12, their adversarial counterparts, labels and a head."""
    draws = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (300,), generator=draws)
    means = torch.randn(4, 12, generator=draws) * torch.tensor([3.0] * 3 + [0.3] * 9)
    clean = means[labels] + 0.8 * torch.randn(300, 12, generator=draws) + 1
    adversarial = clean + 0.9 * torch.randn(300, 12, generator=draws)
    return {
        "clean": clean,
        "adversarial": adversarial,
        "labels": labels,
        "weight": means + 0.1 * torch.randn(4, 12, generator=draws),
        "bias": -means.square().sum(1) / 2,
    }


@pytest.mark.parametrize("centred", [False, True])
def test_every_k_is_a_projection_on_the_main_directions(centred: bool) -> None:
    given = classifier()
    found = dimension.dimensions(**given, centred=centred)
    clean = given["clean"].double().numpy()
    _, _, directions = np.linalg.svd(clean - clean.mean(0), full_matrices=False)
    weight, bias = (given[name].double().numpy() for name in ("weight", "bias"))
    for name, curve in (("clean", found.clean), ("adversarial", found.robust)):
        rows = given[name].double().numpy()
        for k in range(1, 13):
            base = clean.mean(0) if centred else 0
            projected = base + (rows - base) @ directions[:k].T @ directions[:k]
            right = (projected @ weight.T + bias).argmax(1) == given["labels"].numpy()
            assert curve[k - 1] == pytest.approx(right.mean()), (name, k)
    assert found.full_clean == pytest.approx(found.clean[-1])
    assert found.full_robust == pytest.approx(found.robust[-1])
    for share, smallest in ((0.95, found.cls_95), (0.99, found.cls_99)):
        enough = [value >= share * found.full_clean for value in found.clean]
        assert enough[smallest - 1]
        assert not any(enough[: smallest - 1])
    assert found.robust[found.robust_dimension - 1] == max(found.robust)
    assert found.robust.index(max(found.robust)) == found.robust_dimension - 1


def test_what_has_no_dimensions_is_refused() -> None:
    given = classifier()
    same = torch.ones_like(given["clean"])
    with pytest.raises(DataError, match="the same for all images"):
        dimension.dimensions(**given | {"clean": same})
    with pytest.raises(DataError, match="not all finite"):
        dimension.dimensions(**given | {"adversarial": given["adversarial"] * torch.nan})
    with pytest.raises(DataError, match=r"the last layer \[4, 11\]"):
        dimension.dimensions(**given | {"weight": given["weight"][:, 1:]})


# -- frequency -------------------------------------------------------------------------------------
def test_a_spectrum_is_numpys() -> None:
    maps = torch.randn(5, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    found = frequency.spectrum(maps)
    x = maps.double().numpy()
    x = x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True))
    power = (np.abs(np.fft.fftshift(np.fft.fft2(x), axes=(2, 3))) ** 2).mean((0, 1))
    assert np.allclose(found.power.numpy(), power)
    assert float(found.power.sum()) == pytest.approx(8 * 10 / 3)  # Parseval
    v, u = np.meshgrid(np.arange(10) - 5, np.arange(8) - 4)
    radius = np.sqrt(u**2 + v**2)
    assert found.radial == pytest.approx([power[radius.round() == r].mean() for r in range(5)])
    assert found.low == pytest.approx(power[radius <= 1].sum() / power.sum())
    assert found.low + found.mid + found.high == pytest.approx(1)
    assert found.high == pytest.approx(power[radius > 2.5].sum() / power.sum())


def test_white_noise_is_flat_and_waves_are_where_they_are() -> None:
    noise = torch.randn(4000, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    radial = torch.tensor(frequency.spectrum(noise).radial)
    assert radial.max() / radial.min() < 1.1
    angle = 2 * torch.pi * torch.arange(32) / 32
    for cycles, band in ((3, "low"), (8, "mid"), (14, "high")):
        wave = (cycles * angle).sin().expand(2, 1, 32, 32)
        assert getattr(frequency.spectrum(wave), band) == pytest.approx(1)
    few, many = (
        (c * angle).sin().expand(1, 1, 32, 32) + 0.1 * noise[:1, :, :1, :1] for c in (3, 14)
    )
    ratio = frequency.log_ratio(frequency.spectrum(few), frequency.spectrum(many))
    assert ratio[16, 16 + 14] > 10
    assert ratio[16, 16 + 3] < -10


def test_what_has_no_spectrum_is_refused_and_zero_maps_are_counted() -> None:
    maps = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    some = frequency.spectrum(torch.cat([maps, torch.zeros(2, 1, 8, 8)]))
    assert (some.images, some.skipped) == (3, 2)
    assert torch.equal(some.power, frequency.spectrum(maps).power)
    with pytest.raises(DataError, match="every map is zero"):
        frequency.spectrum(0 * maps)
    with pytest.raises(DataError, match="not all finite"):
        frequency.spectrum(maps / 0)
    with pytest.raises(DataError, match=r"\[N,C,H,W\]"):
        frequency.spectrum(maps[0])
    with pytest.raises(DataError, match=r"\[8, 8\] and \[4, 4\]"):
        frequency.log_ratio(some, frequency.spectrum(maps[:, :, ::2, ::2]))
