"""Canonical samples as files, and the batches of them."""

import numpy as np
import pytest
import torch

from dra_ray.data import canonical
from dra_ray.data.pictures import Shape
from dra_ray.errors import DataError
from dra_ray.storage import Store

SHAPE = Shape(3, 1, 4, (0.5,), (0.5,))


def write(store: Store, labels: list[int], judged: list[int], start: int = 0, index: int = 0):
    count = len(labels)
    (store / canonical.shard_name(index)).write_npz(
        image=np.full((count, 4, 4, 1), 7, np.uint8),
        label=np.array(labels),
        feature=np.arange(start, start + count, dtype=np.float32)[:, None].repeat(2, 1),
        judged=np.array(judged),
    )


def test_chosen_images_are_a_share_of_every_class_and_nested() -> None:
    labels = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0))
    small, large = (canonical.chosen(labels, share, 3) for share in (0.1, 0.25))
    for label, total in enumerate(labels.bincount().tolist()):
        assert int((labels[large] == label).sum()) == -(-total // 4)
    assert set(small.tolist()) < set(large.tolist())
    assert labels[large[:40]].bincount().tolist() == [10] * 4
    assert len(set(large.tolist())) == len(large)
    assert not torch.equal(canonical.chosen(labels, 0.1, 4), small)
    assert sorted(canonical.chosen(labels, 1.0, 0).tolist()) == list(range(400))
    assert len(canonical.chosen(torch.tensor([0, 0, 5]), 0.01, 0)) == 2


@pytest.mark.parametrize(("classes", "batch"), [(10, 128), (10, 40), (10, 30), (3, 7)])
def test_batches_have_at_least_four_of_a_class_and_repeat_none(classes: int, batch: int) -> None:
    labels = torch.arange(classes * 20) % classes
    found = canonical.indices(canonical.members(labels), batch, 1, 5)
    assert torch.equal(found, canonical.indices(canonical.members(labels), batch, 1, 5))
    assert not torch.equal(found, canonical.indices(canonical.members(labels), batch, 1, 6))
    counts = labels[found].bincount(minlength=classes)
    present = counts[counts > 0]
    assert len(found) == batch == len(set(found.tolist()))
    assert int(present.min()) >= min(4, batch)
    assert int(present.max() - present.min()) <= 1
    assert len(present) == min(classes, batch // 4)


def test_a_class_of_few_samples_repeats_them_evenly() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    found = canonical.indices(canonical.members(labels), 16, 0, 0)
    counts = found.bincount(minlength=11)
    assert sorted(counts[:3].tolist()) == [2, 3, 3]
    assert counts[3:].tolist() == [1] * 8


def test_over_steps_every_sample_and_every_class_has_its_turn() -> None:
    labels = torch.arange(60) % 12
    seen = torch.cat(
        [canonical.indices(canonical.members(labels), 16, 0, number) for number in range(200)]
    )
    counts = seen.bincount(minlength=60).double()
    assert counts.min() > 0.5 * counts.mean()


def test_samples_that_the_judge_rejects_are_left_out(tmp_path) -> None:
    store = Store(str(tmp_path))
    write(store, [0, 1, 2, 0], [0, 2, 2, 0])
    write(store, [1, 2], [-1, -1], start=4, index=1)
    found = canonical.read(store, None, SHAPE)
    assert found.features[:, 0].tolist() == [0, 2, 3, 4, 5]
    assert found.pictures.labels.tolist() == [0, 2, 0, 1, 2]
    assert found.rejected == 1
    assert canonical.read(store, 2, SHAPE).features[:, 0].tolist() == [0, 2]
    facts = found.facts()
    assert facts["images"] == 5
    assert facts != canonical.read(store, 2, SHAPE).facts()
    with pytest.raises(DataError, match="canonical.images=6, but .* has 5 samples"):
        canonical.read(store, 6, SHAPE)


def test_what_is_no_set_is_said(tmp_path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(DataError, match="holds no canonical samples"):
        canonical.read(store, None, SHAPE)
    write(store, [0, 3], [0, 3])
    with pytest.raises(DataError, match="labels reach 3, but there are 3 classes"):
        canonical.read(store, None, SHAPE)
    write(store, [0, 1], [1, 0])
    with pytest.raises(DataError, match="has 0 samples that its judge accepts"):
        canonical.read(store, None, SHAPE)
    (store / canonical.shard_name(0)).write_npz(image=np.zeros((1, 4, 4, 1), np.uint8))
    with pytest.raises(DataError, match="lacks label, feature, judged"):
        canonical.read(store, None, SHAPE)
