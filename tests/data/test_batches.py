"""Batch t is a pure function of (seed, t); epochs count as DM-AT's."""

from __future__ import annotations

import pickle

import pytest
import torch

from dra_ray import config, data
from dra_ray.data.batches import BatchPlan, part_of
from dra_ray.data.random import derive


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    one, two, other = (BatchPlan(seed, 1000, 5000, 64, 0.7) for seed in (3, 3, 4))
    backwards = {t: two.indices(t) for t in reversed(range(40))}
    for t in range(40):
        assert torch.equal(one.indices(t), backwards[t])
    assert not torch.equal(one.indices(0), other.indices(0))


@pytest.mark.parametrize(
    ("batch", "fraction", "synthetic"), [(512, 0.7, 358), (1024, 0.8, 819), (2048, 0.8, 1638)]
)
def test_the_synthetic_part_is_exact(batch: int, fraction: float, synthetic: int) -> None:
    """DM-AT: int(B * fraction) of every batch; 512 at 0.7 is 358 + 154."""
    plan = BatchPlan(0, 50_000, 1_000_000, batch, fraction)
    for step in (0, 1, plan.steps_per_epoch - 1, plan.steps_per_epoch):
        chosen = plan.indices(step)
        assert len(chosen) == batch
        assert (chosen >= 50_000).sum() == synthetic
        assert chosen.max() < 1_050_000


@pytest.mark.parametrize(("batch", "steps"), [(128, 391), (512, 98), (1024, 49), (2048, 25)])
def test_steps_per_epoch_are_those_of_dm_at(batch: int, steps: int) -> None:
    assert BatchPlan(0, 50_000, 0, batch, 0.7).steps_per_epoch == steps


def test_without_synthetic_images_an_epoch_sees_every_image() -> None:
    plan = BatchPlan(0, 1000, 0, 64, 0.7)
    seen = torch.cat([plan.indices(t) for t in range(plan.steps_per_epoch)])
    assert torch.equal(seen.unique(), torch.arange(1000))
    assert len(seen) == 16 * 64  # the last batch is filled up from a second pass


def test_real_images_of_an_epoch_do_not_repeat_before_all_were_seen() -> None:
    plan = BatchPlan(0, 1000, 9000, 100, 0.5)
    real = torch.cat([plan.indices(t) for t in range(plan.steps_per_epoch)])
    real = real[real < 1000]
    assert len(real) == len(real.unique()) == 500


@pytest.mark.parametrize(("batch", "steps"), [(128, 391), (512, 98), (1024, 49), (2048, 25)])
def test_an_epoch_counts_the_images_before_validation(batch: int, steps: int) -> None:
    assert BatchPlan(0, 50_000 - 1024, 0, batch, 0.7, epoch_images=50_000).steps_per_epoch == steps
    assert BatchPlan(0, 50_000 - 1024, 0, 128, 0.7).steps_per_epoch == 383


def test_a_short_slice_is_topped_up_with_synthetic_images() -> None:
    """DM-AT: 100 real images in slices of 48 are 48, 48 and 4, and then a fresh permutation begins
    within the epoch.
    """
    plan = BatchPlan(0, 100, 1000, 64, 0.25, epoch_images=64 * 5)
    real = [plan.indices(step) for step in range(plan.steps_per_epoch)]
    real = [chosen[chosen < 100] for chosen in real]
    assert [len(chosen) for chosen in real] == [48, 48, 4, 48, 48]
    assert torch.equal(torch.cat(real[:3]).sort().values, torch.arange(100))
    assert not torch.equal(real[0].sort().values, real[3].sort().values)


def test_a_plan_can_be_sent() -> None:
    plan = BatchPlan(0, 100, 1000, 64, 0.25)
    plan.indices(0)
    sent = pickle.loads(pickle.dumps(plan))
    assert sent == plan
    assert torch.equal(sent.indices(3), plan.indices(3))


def test_derived_seeds_are_apart() -> None:
    seeds = {
        derive(seed, purpose, step)
        for seed in range(5)
        for purpose in range(5)
        for step in range(200)
    }
    assert len(seeds) == 5 * 5 * 200
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 3), (7, 4), (512, 8)])
def test_the_workers_parts_make_the_batch(batch: int, world: int) -> None:
    parts = [list(range(batch)[part_of(batch, rank, world)]) for rank in range(world)]
    assert [image for part in parts for image in part] == list(range(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_runs_of_several_training_seeds_share_their_batches() -> None:
    base = config.Experiment(seed=3)
    repeat = config.override(base, {"seed": 4, "data_seed": 3})
    plans = [data.batch_plan(experiment, 100, 0) for experiment in (base, repeat)]
    assert torch.equal(plans[0].indices(7), plans[1].indices(7))
    other = data.batch_plan(config.override(base, {"seed": 4}), 100, 0)
    assert not torch.equal(other.indices(7), plans[0].indices(7))
    assert base.digest() != repeat.digest()
