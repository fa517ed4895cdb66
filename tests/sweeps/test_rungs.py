"""Where trials are compared, against the decisions of Ray Tune's own ASHA on the same reports."""

from __future__ import annotations

import random

import pytest

from dra_ray.config import Asha, Experiment, Optim, Selection, Sweep
from dra_ray.sweeps import rungs
from tests.support.rungs import IMAGES_PER_EPOCH, RayAsha


def decided(epochs: int, grace: int, factor: float, every: int) -> list[int]:
    """Epochs after which Ray Tune stops a trial whose score falls there, and only there, below that
    of another trial.
    """
    return [epoch for epoch in reports(epochs, every) if stops(epoch, epochs, grace, factor, every)]


def reports(epochs: int, every: int) -> list[int]:
    return [epoch for epoch in range(1, epochs) if epoch % every == 0]


def stops(at: int, epochs: int, grace: int, factor: float, every: int) -> bool:
    asha = RayAsha(epochs, grace, factor, ["other", "falling"])
    for epoch in reports(epochs, every):
        asha.stops("other", epoch, 1.0)
    assert not any(asha.stops("falling", epoch, 2.0) for epoch in reports(at, every))
    return asha.stops("falling", at, 0.0)


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "every", "expected"),
    [
        (20, 2, 1.5, 1, [2, 3, 5, 7, 11, 16]),
        (20, 2, 1.5, 5, [5, 10, 15]),
        (12, 2, 2, 1, [2, 4, 8]),
        (40, 1, 2, 4, [4, 8, 16, 32]),
        (10, 10, 3, 1, []),
        (9, 3, 3, 1, [3]),
        (8, 3, 4, 5, [5]),
        (4, 3, 4, 5, []),
        (125, 1, 5, 1, [1, 5, 25]),
        (6, 5, 1.2, 1, [5]),
    ],
)
def test_rungs_by_hand_and_by_ray(
    epochs: int, grace: int, factor: float, every: int, expected: list[int]
) -> None:
    assert rungs.rung_epochs(epochs, grace, factor, every, IMAGES_PER_EPOCH) == expected
    assert decided(epochs, grace, factor, every) == expected


def test_rungs_of_any_sweep_are_where_ray_tune_decides() -> None:
    draws = random.Random(0)
    for _ in range(150):
        epochs = draws.randint(1, 40)
        grace, every = draws.randint(1, epochs), draws.choice((1, 1, 2, 3, 5, 7))
        factor = draws.choice((1.1, 1.2, 4 / 3, 1.5, 1.7, 2, 2.5, 3, 4))
        case = (epochs, grace, factor, every)
        assert rungs.rung_epochs(*case, IMAGES_PER_EPOCH) == decided(*case), case


def test_rungs_of_a_config() -> None:
    base = Experiment(optim=Optim(epochs=20), selection=Selection(every_epochs=5))
    sweep = Sweep(
        base=base, space={"align.weight": [0, 1]}, asha=Asha(grace_epochs=2, reduction_factor=1.5)
    )
    assert rungs.of_sweep(sweep) == [5, 10, 15]
