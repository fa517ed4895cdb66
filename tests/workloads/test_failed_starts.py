"""A start that cannot succeed is refused before the run's folder is made, and before Ray starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.data.canonical import shard_name
from dra_ray.errors import DraError
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.teachers import checkpoint as checkpoint_of_teacher
from dra_ray.teachers.edm import EDM
from dra_ray.workloads import sweep, train

PLAIN = {"align.weight": 0.0, "model.name": "wrn-10-1"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a wrn-10-1 for other pictures: three channels."""
    folder = Store(str(tmp_path_factory.mktemp("weights")))
    other = students.build(config.Model(name="wrn-10-1"), Shape(10, 3, 32, (0.5,) * 3, (0.5,) * 3))
    checkpoint.save(folder, other.state_dict())
    return (folder / checkpoint.WEIGHTS).uri


SMALL_TEACHER = config.UNet(model_channels=16)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model.name": "timm/no_such_network"}, "no_such_network"),
    ({"model.name": "wrn-100000-1"}, "wrn-100000-1"),
    ({"model.name": "vit-t-7"}, "7"),
    ({"model.weights": "WEIGHTS"}, "weights"),
    ({"model.weights": "/nowhere/model.safetensors"}, "/nowhere"),
    ({"synthetic.uri": "/nowhere/images", "synthetic.images": 50}, "/nowhere/images"),
    ({"synthetic.images": 10**6, "synthetic.uri": "IMAGES"}, "synthetic.images=1000000"),
    ({"data.name": "cifar10", "data.uri": "/nowhere/cifar"}, "data.uri|/nowhere/cifar"),
    ({"data.resolution": 9}, "data.resolution=9"),
    ({"data.test_images": 1790}, "data.test_images"),
    ({"data.validation_images": 1790}, "data.validation_images"),
    ({"canonical.uri": "/nowhere/set", "distill.weight": 1.0}, "/nowhere/set"),
    (
        {"canonical.uri": "SAMPLES", "distill.weight": 1.0, "canonical.images": 50},
        "canonical.images=50",
    ),
    (
        {"canonical.uri": "SAMPLES", "align.target": "canonical", "align.weight": 1.0},
        "no canonical sample has class 5",
    ),
    ({"model.name": "diffusion/package:fashion-edm"}, "sees images of"),
    ({"model.name": "diffusion//nowhere/teacher"}, "no teacher at .*/nowhere/teacher"),
]
# of runs that align with a small teacher of digits
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"teacher.uri": "package:fashion-edm"}, "takes images of"),
    ({"teacher.uri": "/nowhere/teacher"}, "no teacher at '/nowhere/teacher'"),
    ({"teacher.layer": "dec.9x9_in9"}, "dec.9x9_in9"),
    ({"data.resolution": 7}, "takes images of"),
    ({"align.transform": "whiten", "align.whiten_dim": 4096}, "align.whiten_dim=4096"),
    ({"model.name": "vit-t-7"}, "7"),
]


def start(kind: str, usual: dict[str, Any], changes: dict[str, Any], run: Store) -> None:
    """Train with these fields, or sweep over the last of them: wrong in one of two trials, or at a
    value that a search which learns may come to.
    """
    if kind == "train":
        train.fit(config.override(config.Experiment(), usual | changes), run)
        return
    *others, last = changes
    base = config.override(config.Experiment(), usual | {field: changes[field] for field in others})
    right = dict(config.flatten(base.model_dump(mode="json")))
    space = {last: [right[last], changes[last]]}
    search = {"method": "tpe" if kind == "search" else "grid"}
    tree = {"base": base.model_dump(mode="json"), "space": space, "search": search, "trials": 2}
    sweep.run(config.validate(config.Sweep, tree, "sweep"), run)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Store(str(tmp_path_factory.mktemp("teacher")))
    checkpoint_of_teacher.save(folder, EDM(SMALL_TEACHER, 8, 1, 10), {})
    return folder.uri


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Store(str(tmp_path_factory.mktemp("images")))
    pixels = np.zeros((20, 8, 8, 1), dtype=np.uint8)
    (folder / "shard.npz").write_npz(image=pixels, label=np.arange(20) % 10)
    return folder.uri


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Canonical samples of half of the classes."""
    folder = Store(str(tmp_path_factory.mktemp("samples")))
    (folder / shard_name(0)).write_npz(
        image=np.zeros((20, 8, 8, 1), dtype=np.uint8),
        label=np.arange(20) % 5,
        feature=np.ones((20, 3), dtype=np.float32),
        judged=np.full(20, -1),
    )
    return folder.uri


@pytest.mark.parametrize("kind", ["train", "sweep", "search"])
@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_wrong_start_leaves_no_folder(
    tmp_path: Path,
    weights: str,
    images: str,
    samples: str,
    kind: str,
    wrong: dict[str, Any],
    words: str,
) -> None:
    made = {"WEIGHTS": weights, "IMAGES": images, "SAMPLES": samples}
    changes = {field: made.get(value, value) for field, value in wrong.items()}
    refuse(tmp_path, kind, PLAIN, changes, words)


@pytest.mark.skipif(bool(importlib.util.find_spec("trackio")), reason="Trackio is installed")
@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_a_tracker_that_is_not_installed_leaves_no_folder(tmp_path: Path, kind: str) -> None:
    usual = PLAIN | {"tracking.trackio": "project"}
    refuse(tmp_path, kind, usual, {"optim.lr": 0.1}, "trackio")


@pytest.mark.parametrize("kind", ["train", "sweep", "search"])
@pytest.mark.parametrize(("wrong", "words"), UNFIT)
def test_what_does_not_fit_its_teacher_leaves_no_folder(
    tmp_path: Path, teacher: str, kind: str, wrong: dict[str, Any], words: str
) -> None:
    usual = PLAIN | {"align.weight": 1.0, "teacher.uri": teacher}
    refuse(tmp_path, kind, usual, wrong, words)


def refuse(
    tmp_path: Path, kind: str, usual: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DraError, match=words) as refused:
        start(kind, usual, changes, Store(str(tmp_path / "runs" / "mine")))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()
    assert not ray.is_initialized()
