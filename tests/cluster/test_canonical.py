"""Canonical samples on Ray, from a teacher of seconds to a student that they taught."""

import os

import pytest
import torch

from dra_ray import config, data, runs
from dra_ray.config import Canonical
from dra_ray.errors import ConfigError
from dra_ray.inspection import canonical_set
from dra_ray.plan import plan
from dra_ray.storage import Store
from dra_ray.students import checkpoint as students
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.workloads import canonical, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    torch.manual_seed(0)
    net = EDM(config.UNet(model_channels=8, channel_mult=(1, 2)), 8, 1, 10)
    for parameter in net.parameters():
        if parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.05)
    checkpoint.save(store, net, {"data": config.Data().model_dump()})
    return store


def small(teacher: Store, **changes: object) -> Canonical:
    fields = {"share": 0.05, "sigma": 1.0, "steps": 4, "count": 2, "iterations": 3}
    fields |= {"batch": 10, "shard_images": 20}
    return Canonical.model_validate({"teacher": teacher.uri} | fields | changes)


def shards(store: Store) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in store.names() if name.endswith(".npz")}


def test_sets_do_not_depend_on_who_makes_them_and_teach(ray_cluster, teacher, tmp_path) -> None:
    root = Store(str(tmp_path))
    one, two = root / "one", root / "two"
    asked, rows = small(teacher), []
    manifest = canonical.run(asked.model_copy(update={"workers": 1}), one, rows.append)
    images = data.load(asked.data)
    total = int(manifest.images or 0)
    assert total == len(rows) * 20 - (20 * len(rows) - total)
    assert rows[-1].images == total
    assert rows[-1].images == rows[-1].images_total
    assert sum(manifest.counts.values()) == total
    assert len(manifest.counts) == 10
    canonical.run(asked, two)
    made = shards(one)
    assert made == shards(two)
    assert len(made) == -(-total // 20) > 1
    assert canonical.run(asked, one) == manifest

    # stopped early, with a damaged and a missing shard, it goes on to the same bytes
    stopped = (two / runs.MANIFEST).read_json() | {"status": "running"}
    (two / runs.MANIFEST).write_json(stopped)
    names = sorted(made)
    os.unlink((two / names[0]).uri)
    (two / names[1]).write_bytes(made[names[1]][:100])
    canonical.run(asked, two)
    assert shards(two) == made
    with pytest.raises(ConfigError, match="count is 2 there and 3 now"):
        canonical.run(small(teacher, count=3), one)

    arrays = (one / names[-1]).read_npz()
    originals, labels = images.train.take(torch.from_numpy(arrays["index"]))
    assert torch.equal(labels, torch.from_numpy(arrays["label"]))
    assert originals.shape[2:] == arrays["image"].shape[1:3]
    shown = canonical_set.show(one)
    assert shown.images == total
    assert shown.accepted is None
    assert 0 <= shown.nmi <= 1
    planned = plan(asked)
    assert planned.run.images == pytest.approx(total, abs=10)

    # a student that they teach, the same with them as class-matched targets, and a judge
    settings = {
        "loss.name": "plain",
        "model.name": "wrn-10-1",
        "optim.epochs": 1,
        "selection.steps": 2,
        "align.weight": 0.0,
        "canonical.uri": one.uri,
        "distill.weight": 1.0,
        "distill.per_step": 40,
    }
    taught = config.override(config.Experiment(), settings)
    seen = []
    train.fit_in_process(taught, root / "taught", seen.append)
    assert seen[-1]["loss_distill"] > 0
    assert seen[-1]["loss_align"] == 0
    found = runs.read_manifest(root / "taught")
    assert found
    assert found.canonical["images"] == total
    bridge = config.override(
        taught,
        {
            "distill.weight": 0.0,
            "align.weight": 1.0,
            "align.target": "canonical",
            "align.hidden": 16,
        },
    )
    train.fit_in_process(bridge, root / "bridge", seen.append)
    assert seen[-1]["loss_align"] > 0
    assert "loss_distill" not in seen[-1]

    judged = canonical.run(small(teacher, judge=(root / "taught").uri), root / "judged")
    student, _ = students.load(root / "taught")
    arrays = (root / "judged" / names[0]).read_npz()
    pixels = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        classes = student(data.to_float(pixels)).argmax(1)
    assert torch.equal(classes, torch.from_numpy(arrays["judged"]))
    assert 0 <= judged.canonical["accepted"] <= 1


def test_a_teacher_of_other_data_is_refused(teacher, tmp_path) -> None:
    with pytest.raises(ConfigError, match="teacher is not set"):
        canonical.run(Canonical(), Store(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"knows 10 classes of images \(1, 8\)"):
        canonical.check(small(teacher, data={"name": "fashion-mnist"}))
