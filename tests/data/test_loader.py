"""Batches from a resident set and read ahead from the disk: equal, in any order, and with errors
where they belong.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from dra_ray import config, data
from dra_ray.data import OnDisk, Split, synthetic
from dra_ray.data.batches import BatchPlan
from dra_ray.data.loader import Batches
from dra_ray.errors import DataError
from dra_ray.storage import Store

CPU = torch.device("cpu")


@pytest.fixture
def sets(tmp_path) -> tuple[Split, OnDisk]:
    """Real images in memory, synthetic ones in a file."""
    rng = np.random.default_rng(0)
    (Store(str(tmp_path)) / "a.npz").write_npz(
        image=rng.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8), label=np.arange(300) % 10
    )
    part = synthetic._part(Store(str(tmp_path / "a.npz")), False, data.load(config.Data()))
    real = torch.from_numpy(rng.integers(0, 256, (100, 1, 8, 8)).astype(np.uint8))
    return Split(real, torch.arange(100) % 7), OnDisk(
        synthetic.Arrays([part.name], [part.images]), part.labels, range(300)
    )


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_both_kinds_give_the_batches_of_the_plan(sets) -> None:
    real, extra = sets
    plan = BatchPlan(1, 100, 300, 32, 0.7)
    resident = Batches(real, extra, plan, CPU, slice(0, 32))
    assert not readers()
    ahead = Batches(real, extra, plan, CPU, slice(0, 32), resident_bytes=0)
    half = Batches(real, extra, plan, CPU, slice(16, 32), resident_bytes=0)
    both = Split(
        torch.cat([real.images, data.in_memory(extra).images]),
        torch.cat([real.labels, extra.labels]),
    )
    for step in (0, 1, 2, 3, 9, 4, 4, 40, 0):  # in order, after a resumption, again
        images, labels = both.take(plan.indices(step))
        for batches in (resident, ahead):
            found = batches.get(step)
            assert torch.equal(found[0], images)
            assert torch.equal(found[1], labels)
            assert found[0].dtype == torch.uint8
            assert found[1].dtype == torch.int64
        assert torch.equal(half.get(step)[0], images[16:])
        assert torch.equal(half.get(step)[1], labels[16:])
    for batches in (resident, ahead, half):
        batches.close()
    assert not readers()


@pytest.mark.parametrize("resident_bytes", [0, 2**30])
def test_real_images_alone(sets, resident_bytes: int) -> None:
    real, _ = sets
    plan = BatchPlan(1, 100, 0, 32, 0.7)
    batches = Batches(real, None, plan, CPU, slice(0, 32), resident_bytes=resident_bytes)
    for step in range(8):
        images, labels = batches.get(step)
        assert torch.equal(images, real.images[plan.indices(step)])
        assert torch.equal(labels, real.labels[plan.indices(step)])
    batches.close()


def test_what_fails_while_reading_ahead_is_raised_by_its_step(tmp_path, sets) -> None:
    real, extra = sets
    plan = BatchPlan(1, 100, 300, 32, 0.7)
    batches = Batches(real, extra, plan, CPU, slice(0, 32), resident_bytes=0)
    batches.get(0)
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"a\.npz"):
        batches.get(7)
    (tmp_path / "b.npz").rename(tmp_path / "a.npz")
    assert torch.equal(batches.get(7)[1], torch.cat([real.labels, extra.labels])[plan.indices(7)])
    batches.close()
    assert not readers()


def test_closing_in_the_middle_ends_the_thread(sets) -> None:
    real, extra = sets
    batches = Batches(
        real, extra, BatchPlan(1, 100, 300, 32, 0.7), CPU, slice(0, 32), ahead=50, resident_bytes=0
    )
    batches.get(0)
    assert len(readers()) == 1
    batches.close()
    batches.close()
    assert not readers()
