"""A trained student in its run directory: `model.safetensors` holds the averaged weights of the
best validation so far.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dra_ray import config, data, runs, students
from dra_ray.errors import CheckpointError, DataError
from dra_ray.storage import Store
from dra_ray.students.weights import load_into, read_weights

WEIGHTS = runs.MODEL


def save(run: Store, weights: Mapping[str, Tensor]) -> None:
    """Write a student's state dict into its run directory, atomically."""
    (run / WEIGHTS).write_tensors(weights)


def manifest(run: Store) -> runs.Manifest | None:
    """A run's manifest, None where there is none.

    Raises `CheckpointError` where it is damaged, or a stranger's that is no manifest of a run.
    """
    try:
        return runs.read_manifest(run)
    except DataError as error:
        raise CheckpointError(f"{error}, or give the folder that `dra train` wrote") from None


def load(run: Store) -> tuple[students.Student, config.Experiment]:
    """The selected student in eval mode, without gradients, and the experiment that it comes from.

    Raises `CheckpointError` when there is none or when its keys or shapes are another
    architecture's.
    """
    facts = manifest(run)
    if facts is None or facts.kind != "train":
        runs.require_folder(run)
        raise CheckpointError(
            f"'{run}' is not a training run; give the folder that `dra train` wrote"
        )
    if not (run / WEIGHTS).exists():
        raise CheckpointError(f"'{run}' has no trained weights yet; resume it with `dra train`")
    experiment = config.validate(config.Experiment, facts.config, str(run / runs.MANIFEST))
    student = students.build(experiment.model, data.outline(experiment.data).shape)
    load_into(student, read_weights(run / WEIGHTS), experiment.model.name, str(run / WEIGHTS))
    return student.eval().requires_grad_(False), experiment
