"""What is timed for a plan, and what a plan says where that cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dra_ray import plan as planning
from dra_ray.config import Experiment, Sweep, override
from dra_ray.plan import speed, timing
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from tests.plan.test_plan import TINY

SMALL = override(
    Experiment(),
    {"model.name": "wrn-10-1", "threat.steps": 1, "selection.steps": 1, "optim.batch": 16},
)
LIGHT = "json"  # a module that stands for a worker's, since it is there at once
GIVEN = speed.Speed(0.02, "as given")


@pytest.fixture
def teacher(tmp_path: Path) -> Store:
    checkpoint.save(Store(str(tmp_path)), EDM(TINY, 8, 1, 10), {})
    return Store(str(tmp_path))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "changes",
    [
        {"pool.kind": "local"},
        {"teacher.tokens": True, "loss.awp": 0.005},
        {"align.transform": "standardise", "optim.averaging": "epoch"},
    ],
)
def test_what_is_timed_is_positive_and_leaves_no_trace(
    teacher: Store, changes: dict[str, object]
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    found = timing.pace(override(SMALL, {"teacher.uri": teacher.uri, **changes}), LIGHT)
    assert torch.rand(1) == expected
    assert torch.get_num_threads() == threads
    assert found.encoding
    for seconds in (found.training, found.validation, found.encoding, found.process_s):
        assert 0 < seconds < math.inf
    assert found.cores >= 1
    for part in ("s a step of", "s a validation of", "teacher", "start of a process", "1 thread"):
        assert part in found.what


@pytest.mark.seconds
def test_weights_that_are_not_there_are_not_needed() -> None:
    plain = override(SMALL, {"align.weight": 0.0, "model.weights": "nowhere.safetensors"})
    found = timing.pace(plain, LIGHT)
    assert found.encoding is None
    assert found.training > 0


def test_without_its_teacher_a_plan_is_arithmetic_and_says_so(teacher: Store) -> None:
    aligned = override(SMALL, {"teacher.uri": teacher.uri})
    (teacher / checkpoint.WEIGHTS).remove()
    basis = timing.basis(aligned, LIGHT, lambda: GIVEN)
    assert (basis.pace, basis.tflops) == (None, 0.02)
    assert "arithmetic" in basis.said
    assert "not measured: " in basis.said
    assert teacher.uri in basis.said
    hours = planning.plan(aligned, basis.tflops).hours
    assert hours
    assert hours.start is None


def test_a_student_that_takes_too_long_is_not_timed() -> None:
    large = override(
        Experiment(), {"model.name": "wrn-70-16", "align.weight": 0.0, "data.name": "cifar10"}
    )
    basis = timing.basis(large, LIGHT, lambda: GIVEN)
    assert basis.pace is None
    assert "a step of 2 images would take" in basis.said


def test_a_gpu_that_is_not_here_leaves_hours_unknown() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    basis = timing.basis(override(SMALL, {"resources.gpus_per_worker": 1}), LIGHT, lambda: None)
    assert (basis.pace, basis.tflops) == (None, None)
    assert "--gpu" in basis.said
    shared = override(SMALL, {"resources.gpus_per_worker": 0.5})
    assert "shared" in timing.basis(shared, LIGHT, lambda: GIVEN).said


def test_a_speed_that_is_given_says_that_it_is_arithmetic() -> None:
    said = timing.by_arithmetic(GIVEN).said
    assert "arithmetic at 0.02 TFLOP/s, as given" in said
    assert "start-up is not counted" in said


def test_what_of_a_sweep_is_timed() -> None:
    """The base; where it has no teacher, the first trial with one."""
    base = override(SMALL, {"align.weight": 0.0, "teacher.uri": "here"})
    with_teacher = override(base, {"align.weight": 1.0})
    sweep = Sweep(base=base, space={"align.weight": [0.0, 1.0]})
    assert timing.of_sweep(sweep, [base, with_teacher]) == with_teacher
    assert timing.of_sweep(sweep, [base]) == base
    aligned = Sweep(base=with_teacher, space={"align.weight": [2.0, 1.0]})
    assert timing.of_sweep(aligned, [base]) == with_teacher


@pytest.mark.parametrize("way", ["off", "forward", "attack"])
def test_nothing_is_compiled_for_a_plan(way: str) -> None:
    sample = timing._sample(override(SMALL, {"compute.compile": way}))
    assert sample == type(sample).model_validate(sample.model_dump())
    assert sample.compute.compile == "off"
