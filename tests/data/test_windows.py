"""Draws by windows: pure functions of the draw's number that serve training as uniform ones do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dra_ray import config, data
from dra_ray.data import BatchPlan, Split
from dra_ray.data.loader import Batches
from dra_ray.data.windows import Windows, suited


def offsets(*sizes: int) -> np.ndarray:
    return np.cumsum([0, *sizes])


@pytest.mark.parametrize("case", range(40))
def test_without_replacement_a_pass_has_every_image_once(case: int) -> None:
    drawn = np.random.default_rng(case)
    sizes = drawn.integers(1, 41, drawn.integers(1, 13))
    windows = Windows(case, offsets(*sizes), int(drawn.integers(1, 201)), replace=False)
    count = windows.count
    whole = windows.draws(0, 2 * count)
    for number in (0, 1):
        one = whole[number * count : (number + 1) * count]
        assert torch.equal(one.sort().values, torch.arange(count))
    begin = 0
    while begin < 2 * count:
        length = min(int(drawn.integers(1, 91)), 2 * count - begin)
        assert torch.equal(windows.draws(begin, length), whole[begin : begin + length])
        begin += length


@pytest.mark.parametrize("case", range(40))
def test_draws_lie_in_the_shards_that_are_near(case: int) -> None:
    chosen = np.random.default_rng(case)
    sizes = chosen.integers(1, 41, chosen.integers(1, 13))
    windows = Windows(1, offsets(*sizes), int(chosen.integers(1, 201)), bool(case % 2))
    first, length = int(chosen.integers(3000)), int(chosen.integers(1, 101))
    drawn = windows.draws(first, length)
    assert torch.equal(drawn, windows.draws(first, length))
    shards = set(np.searchsorted(windows.offsets, drawn.numpy(), side="right") - 1)
    near = {shard for at in range(first, first + length) for shard in windows.near(at)}
    assert shards <= near
    assert len(windows.near(first)) == len(set(windows.near(first)))


def test_the_first_windows_are_small_and_no_window_is_much_smaller() -> None:
    windows = Windows(0, offsets(*[100] * 1000), 6400, replace=True)
    assert len(windows.near(0)) == 3, "one shard, and the two of the next window"
    assert len(windows.near(50_000)) == 128
    assert len(windows.near(99_999)) >= 64 + 1


def test_where_a_batch_lies_does_not_depend_on_how_large_the_set_is() -> None:
    """What a step costs: no list of all images, nor of all shards, is made for one."""
    small, large = (
        Windows(0, np.arange(0, images + 1, 10_000), 700_000, replace=True)
        for images in (1_000_000, 300_000_000)
    )
    for windows in (small, large):
        assert len(windows.draws(0, 700)) == 700
        assert windows.offsets.nbytes < 250_000


def uniform(count: int, batches: int, per_batch: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(count, (batches, per_batch), generator=drawn)


COUNT, PER_BATCH, CLASSES = 200_000, 70, 10


@pytest.fixture(scope="module", params=[True, False], ids=["with", "without"])
def drawn(request) -> tuple[bool, torch.Tensor, torch.Tensor]:
    """Batches of a pass by windows of the size that is suited, after the first small ones, and as
    many uniform ones.
    """
    size = suited(64, PER_BATCH, request.param)
    size = min(size, PER_BATCH * (1000 if request.param else 8))
    windows = Windows(0, np.arange(0, COUNT + 1, 500), size, request.param)
    batches = COUNT // PER_BATCH
    first = COUNT  # the second pass has no small windows
    return (
        request.param,
        torch.stack([windows.draws(first + PER_BATCH * b, PER_BATCH) for b in range(batches)]),
        uniform(COUNT, batches, PER_BATCH),
    )


def test_classes_of_a_batch_are_as_balanced_as_by_uniform_draws(drawn) -> None:
    """Of a set that was shuffled when it was written: chi-squared of every batch's classes has its
    distribution.
    """
    _, batches, _ = drawn
    labels = torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(7))
    counts = torch.stack([labels[batch].bincount(minlength=CLASSES) for batch in batches]).double()
    shares = labels.bincount(minlength=CLASSES).double() / COUNT
    chi = ((counts - shares * PER_BATCH).square() / (shares * PER_BATCH)).sum(1)
    assert abs(chi.mean() - (CLASSES - 1)) < 4 * chi.std() / len(chi) ** 0.5
    # and what one batch has too many of, the next one has not
    share = counts[:, 0] - counts[:, 0].mean()
    correlation = (share[1:] * share[:-1]).mean() / share.square().mean()
    assert abs(correlation) < 4 / len(share) ** 0.5


def test_a_pass_covers_what_uniform_draws_do_or_all(drawn) -> None:
    replace, batches, independent = drawn
    times = torch.bincount(batches.flatten(), minlength=COUNT)
    if not replace:
        assert int(times.max()) == 1
        assert int((times == 0).sum()) < PER_BATCH
        return
    others = torch.bincount(independent.flatten(), minlength=COUNT)
    observed, expected = (
        torch.bincount(each.clamp(max=5), minlength=6).double().numpy() for each in (times, others)
    )
    assert stats.chi2_contingency([observed, expected]).pvalue > 1e-4, "drawn 0, 1, 2, ... times"


def test_an_image_is_rarely_twice_in_a_batch(drawn) -> None:
    """What the size of the window is for: 1000 batches leave 1 in 2000 per image and batch."""
    replace, batches, _ = drawn
    twice = sum(PER_BATCH - len(batch.unique()) for batch in batches) / len(batches)
    assert twice == 0 if not replace else twice < 1.5 * PER_BATCH / 2000


def test_the_seed_decides_the_order() -> None:
    one, same, other = (Windows(seed, offsets(*[50] * 20), 100, True) for seed in (3, 3, 4))
    assert torch.equal(one.draws(0, 500), same.draws(0, 500))
    assert not torch.equal(one.draws(0, 500), other.draws(0, 500))


# -- in the batch plan -----------------------------------------------------------------------------
@pytest.mark.parametrize("case", range(40))
def test_batches_take_the_draws_one_after_another(case: int) -> None:
    chosen = np.random.default_rng(case)
    real, batch, epoch = (int(chosen.integers(*ends)) for ends in ((1, 61), (10, 25), (1, 91)))
    fraction = (0.1, 0.5, 0.7, 0.9)[case % 4]
    windows = Windows(2, offsets(13, 13, 5), 20, replace=False)
    plan = BatchPlan(2, real, 31, batch, fraction, epoch, windows)
    drawn, steps = [], 2 * plan.steps_per_epoch + 1
    for step in range(steps):
        indices = plan.indices(step)
        assert len(indices) == batch
        drawn.append(indices[indices >= real] - real)
    expected = windows.draws(0, sum(map(len, drawn)))
    begin = 0
    for part in drawn:
        assert torch.equal(part.sort().values, expected[begin : begin + len(part)].sort().values)
        begin += len(part)


def run_of(**synthetic: object) -> config.Experiment:
    return config.Experiment(
        synthetic=config.Synthetic(uri="set", images=50, **synthetic),
        optim=config.Optim(batch=10),
        align=config.Align(weight=0.0),
    )


def pictures(count: int) -> Split:
    return Split(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count).long())


def test_when_a_run_draws_by_windows() -> None:
    few = pictures(50)
    assert data.windowed(run_of(), few) is None
    assert data.windowed(run_of(), None) is None
    once = data.windowed(run_of(replace=False), few)
    assert once is not None
    assert (once.images, once.replace, once.offsets.tolist()) == (50, False, [0, 50])
    assert once.draws(0, 50).sort().values.tolist() == list(range(50))
    chosen = data.windowed(run_of(window_images=20), few)
    assert chosen is not None
    assert (chosen.images, chosen.replace) == (20, True)


def test_fields_that_say_what_was_so_change_no_digest() -> None:
    assert run_of().digest() == run_of(replace=True, window_images=None).digest()
    assert run_of().digest() != run_of(replace=False).digest()
    assert run_of().digest() != run_of(window_images=20).digest()


def test_workers_together_get_the_batch(tmp_path) -> None:
    windows = Windows(2, offsets(20, 20, 10), 20, replace=False)
    plan = BatchPlan(2, 30, 50, 8, 0.5, None, windows)
    real, made = pictures(30), pictures(50)
    made.images[:, 0, 0, 0] = torch.arange(50)
    whole, one, two = (
        Batches(real, made, plan, torch.device("cpu"), mine, resident_bytes=resident)
        for mine, resident in ((slice(0, 8), 2**30), (slice(0, 4), 0), (slice(4, 8), 0))
    )
    for step in (0, 1, 7, 3):
        together = torch.cat([one.get(step)[0], two.get(step)[0]])
        assert torch.equal(whole.get(step)[0], together)
    for loader in (whole, one, two):
        loader.close()
