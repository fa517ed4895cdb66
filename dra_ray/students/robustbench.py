"""Checkpoints of RobustBench's model zoo (Croce et al., arXiv 2010.09670) as students.

| of the zoo | model.name | normalisation |
|---|---|---|
| DeepMind's Wide ResNet, SiLU (Gowal, Rebuffi, Wang 2023) | wrn-DEPTH-WIDTH | the data set's |
| TRADES' Wide ResNet (Zhang, Carmon 2019) | relu-wrn-DEPTH-WIDTH | none: `normalise: false` |
| networks of timm on ImageNet | timm/NAME | `normalize.mean` in the file, or ImageNet's |

A file does not tell that its network expects normalised images unless it holds mean and std; those
are then compared with the student's. Weights are found under `model_state_dict` or `state_dict`,
and prefixes that all keys share ("module.", "model.") go.
"""

from __future__ import annotations

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError, DataError
from dra_ray.storage import Store
from dra_ray.students.weights import load_into, read_weights


def load(store: Store, model: config.Model, shape: Shape) -> students.Student:
    """The student that `model` names for images of `shape`, with the weights of `store`, in eval
    mode and without gradients.

    Raises `CheckpointError` when the file is damaged, needs code to be read, or holds other keys,
    shapes or normalisation.
    """
    student = students.build(model, shape)
    try:
        weights = read_weights(store)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    load_into(student, weights, model.name, str(store))
    return student.eval().requires_grad_(False)
