"""A trained student in its run directory: `model.safetensors` holds the averaged weights of the
best validation so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dra_ray import config, data, runs, students
from dra_ray.errors import CheckpointError
from dra_ray.storage import Store
from dra_ray.students.weights import load_into, read_weights

WEIGHTS = "model.safetensors"


def save(run: Store, weights: Mapping[str, Tensor]) -> None:
    """Write a student's state dict into its run directory, atomically."""
    (run / WEIGHTS).write_tensors(weights)


def manifest(run: Store) -> Mapping[str, Any]:
    """A run's manifest, which may be a stranger's; empty where there is none.

    Raises `CheckpointError` where it is no JSON object or its config is none, and `DataError` where
    it is no JSON at all.
    """
    facts = runs.read_manifest(run)
    if facts is None:
        return {}
    if not isinstance(facts, Mapping) or not isinstance(facts.get("config", {}), Mapping):
        raise CheckpointError(
            f"'{run / 'manifest.json'}' is not a run's manifest; give the folder that `dra train` "
            "wrote"
        )
    return facts


def load(run: Store) -> tuple[students.Student, config.Experiment]:
    """The selected student in eval mode, without gradients, and the experiment that it comes from.

    Raises `CheckpointError` when there is none or when its keys or shapes are another
    architecture's.
    """
    facts = manifest(run)
    if facts.get("kind") != "train":
        raise CheckpointError(
            f"'{run}' is not a training run; give the folder that `dra train` wrote"
        )
    if not (run / WEIGHTS).exists():
        raise CheckpointError(f"'{run}' has no trained weights yet; resume it with `dra train`")
    experiment = config.validate(
        config.Experiment, facts.get("config", {}), str(run / "manifest.json")
    )
    student = students.build(experiment.model, data.outline(experiment.data).shape)
    load_into(student, read_weights(run / WEIGHTS), experiment.model.name, str(run / WEIGHTS))
    return student.eval().requires_grad_(False), experiment
