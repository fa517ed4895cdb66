"""Which weights a validation is of: the average, or the better of the average and the raw ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dra_ray import config, data
from dra_ray.training.step import State, initial_state
from dra_ray.workloads import judging
from dra_ray.workloads.session import Place

EXPERIMENT = config.override(
    config.Experiment(),
    {
        "model.name": "wrn-10-1",
        "align.weight": 0.0,
        "selection.steps": 2,
        "threat.eps_255": 2.0,
        "data.validation_images": 200,
    },
)
HERE = Place(0, 1, slice(0, EXPERIMENT.optim.batch), torch.device("cpu"))


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.load(EXPERIMENT.data)


@pytest.fixture(scope="module")
def state(images: data.Images) -> State:
    """Raw weights after a few plain steps, and the average where it began, as one that lags."""
    state, _ = initial_state(EXPERIMENT, images.shape, None, HERE.device)
    pixels, labels = images.train.take(torch.arange(512))
    optimizer = torch.optim.SGD(state.student.parameters(), lr=0.05, momentum=0.9)
    state.student.train()
    for step in range(24):
        part = torch.arange(64 * step, 64 * step + 64) % 512
        loss = torch.nn.functional.cross_entropy(
            state.student(data.to_float(pixels[part])), labels[part]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return state


def judged(
    state: State, images: data.Images, weights: str, averaging: str = "step"
) -> judging.Judged:
    fields = {"selection.weights": weights, "optim.averaging": averaging}
    changed = config.override(EXPERIMENT, fields)
    students = judging.candidates(state, changed)
    return judging.judge(students, changed, images.validation, HERE)


def test_the_better_weights_are_those_of_more_verdicts(state: State, images: data.Images) -> None:
    alone = {
        name: judging.validate(student, EXPERIMENT, images.validation, HERE)
        for name, student in (("average", state.average), ("raw", state.student))
    }
    assert alone["raw"][1].sum() > alone["average"][1].sum()
    usual, better = (judged(state, images, weights) for weights in ("average", "better"))
    assert (usual.weights, better.weights) == ("average", "raw")
    both = config.override(EXPERIMENT, {"selection.weights": "better"})
    students = judging.candidates(state, both)
    assert (students[usual.weights], students[better.weights]) == (state.average, state.student)
    assert students["raw"].state_dict().keys() == students["average"].state_dict().keys()
    for found in (usual, better):
        assert np.array_equal(found.clean, alone[found.weights][0])
        assert np.array_equal(found.withstood, alone[found.weights][1])


def test_without_an_average_or_a_difference_it_is_the_average(
    state: State, images: data.Images
) -> None:
    assert judged(state, images, "better", averaging="none").weights == "average"
    fresh, _ = initial_state(EXPERIMENT, images.shape, None, HERE.device)
    assert judged(fresh, images, "better").weights == "average"
