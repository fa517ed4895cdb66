"""A start that cannot succeed is refused before the run's folder is made, and before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.errors import DraError
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.workloads import sweep, train

PLAIN = {"align.weight": 0.0, "model.name": "wrn-10-1"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a wrn-10-1 for other pictures: three channels."""
    folder = Store(str(tmp_path_factory.mktemp("weights")))
    other = students.build(config.Model(name="wrn-10-1"), Shape(10, 3, 32, (0.5,) * 3, (0.5,) * 3))
    checkpoint.save(folder, other.state_dict())
    return (folder / checkpoint.WEIGHTS).uri


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model.name": "timm/no_such_network"}, "no_such_network"),
    ({"model.name": "wrn-100000-1"}, "wrn-100000-1"),
    ({"model.name": "vit-t-7"}, "7"),
    ({"model.weights": "WEIGHTS"}, "weights"),
    ({"model.weights": "/nowhere/model.safetensors"}, "/nowhere"),
]


def start(kind: str, changes: dict[str, Any], run: Store) -> None:
    """Train with these fields, or sweep over the first of them: wrong in one of two trials."""
    if kind == "train":
        train.fit(config.override(config.Experiment(), PLAIN | changes), run)
        return
    base = config.override(config.Experiment(), PLAIN)
    right = dict(config.flatten(base.model_dump(mode="json")))
    space = {field: [right[field], value] for field, value in changes.items()}
    sweep.run(config.Sweep(base=base, space=space), run)


@pytest.mark.parametrize("kind", ["train", "sweep"])
@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_wrong_student_leaves_no_folder(
    tmp_path: Path, weights: str, kind: str, wrong: dict[str, Any], words: str
) -> None:
    changes = {field: weights if value == "WEIGHTS" else value for field, value in wrong.items()}
    with pytest.raises(DraError, match=words) as refused:
        start(kind, changes, Store(str(tmp_path / "runs" / "mine")))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()
    assert not ray.is_initialized()
