"""Where trials are compared, against the decisions of Ray Tune's own ASHA on the same reports."""

from __future__ import annotations

import dataclasses
import random

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from dra_ray.config import Asha, Experiment, Optim, Selection, Sweep
from dra_ray.sweeps import rungs

IMAGES_PER_EPOCH = 1181


@dataclasses.dataclass
class Trial:
    trial_id: str


def decided(epochs: int, grace: int, factor: float, every: int) -> list[int]:
    """Epochs after which Ray Tune stops a trial whose score falls there, and only there, below that
    of another trial.
    """
    return [epoch for epoch in reports(epochs, every) if stops(epoch, epochs, grace, factor, every)]


def reports(epochs: int, every: int) -> list[int]:
    return [epoch for epoch in range(1, epochs) if epoch % every == 0]


def stops(at: int, epochs: int, grace: int, factor: float, every: int) -> bool:
    asha = ASHAScheduler(
        time_attr="images_seen",
        metric="score",
        mode="max",
        max_t=epochs * IMAGES_PER_EPOCH,
        grace_period=grace * IMAGES_PER_EPOCH,
        reduction_factor=factor,
        stop_last_trials=False,
    )

    def report(trial: Trial, epoch: int, score: float) -> str:
        row = {"images_seen": epoch * IMAGES_PER_EPOCH, "score": score}
        return asha.on_trial_result(None, trial, row)  # type: ignore[arg-type]

    other, falling = Trial("other"), Trial("falling")
    for trial in (other, falling):
        asha.on_trial_add(None, trial)  # type: ignore[arg-type]
    for epoch in reports(epochs, every):
        report(other, epoch, 1.0)
    early = [report(falling, epoch, 2.0) for epoch in reports(at, every)]
    assert set(early) <= {TrialScheduler.CONTINUE}
    return report(falling, at, 0.0) == TrialScheduler.STOP


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
