"""Validations in tasks beside the training: the rows, the weights and the choice of the best ones
are those of workers that validate between two epochs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ray.util.state import list_tasks

from dra_ray import config
from dra_ray import runs as run_folder
from dra_ray.cluster import wait_until
from dra_ray.plan import ready
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.training.step import State
from dra_ray.workloads import train
from dra_ray.workloads.session import InProcess
from tests.cluster.small import experiment
from tests.support.rows import without_times

EPOCHS, EVERY = 4, 4


class Killed(Exception):
    """What stands for the end of a process."""


class Ending(InProcess):
    """A worker that dies right after its checkpoint of step `at`."""

    def __init__(self, run: Store, at: int) -> None:
        super().__init__(run, lambda row: None)
        self._at = at

    def report(self, state: State, row: Mapping[str, Any], at_once: bool = False) -> None:
        super().report(state, row, at_once)
        if state.step == self._at:
            raise Killed


def wanted(teacher: Store, **changes: Any) -> config.Experiment:
    small = {
        "optim__epochs": EPOCHS,
        "align__weight": 0.0,
        "selection__weights": "better",
        "resources__validation": "beside",
    }
    return experiment(teacher, **small | changes)


def trained(given: config.Experiment, run: Store, at: int = -1) -> Store:
    """A run of this process that dies `at` a step, or ends."""
    tree = given.model_dump(mode="json")
    run_folder.begin_run(run, "train", tree, given.digest(), ready.facts(given))
    session = Ending(run, at)
    if at < 0:
        train.train(given, run, session)
    else:
        with pytest.raises(Killed):
            train.train(given, run, session)
    train.complete_rows(run)
    return run


def rows(run: Store) -> list[dict[str, Any]]:
    return without_times((run / "metrics.jsonl").read_jsonl())


def tasks(run: Store) -> list[str]:
    """The states of the run's validations by tasks."""
    return [task.state for task in list_tasks(filters=[("name", "=", f"{run.name}:validation")])]


def require_equal(run: Store, other: Store) -> None:
    assert rows(run) == rows(other)
    ours, theirs = ((each / checkpoint.WEIGHTS).read_tensors() for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def between(ray_cluster: Any, teacher: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run whose worker validates between two epochs."""
    root = Store(str(tmp_path_factory.mktemp("between")))
    return trained(wanted(teacher, resources__validation="workers"), root / "between")


def test_rows_and_weights_are_those_of_workers(between: Store, teacher: Store, tmp_path) -> None:
    run = Store(str(tmp_path)) / "in-task"
    train.fit(wanted(teacher), run)
    require_equal(run, between)
    assert [row["epoch"] for row in rows(run)] == list(range(1, EPOCHS + 1))
    # the last is the workers', who have nothing else to do; others too where there was no room
    assert wait_until(lambda: tasks(run).count("FINISHED") >= 1, 30.0), tasks(run)


def test_a_run_that_dies_meanwhile_validates_again(
    between: Store, teacher: Store, tmp_path
) -> None:
    """The weights that wait for their verdicts are in the checkpoint."""
    given = wanted(teacher, resources__checkpoint_steps=EVERY)
    steps = rows(between)[0]["step"]
    for number, at in enumerate(
        (steps, steps + EVERY - steps % EVERY)
    ):  # of the validation itself, and a later one
        run = trained(given, Store(str(tmp_path)) / f"dies-{number}", at=at)
        assert not (run / "metrics.jsonl").exists() or not rows(run)
        require_equal(trained(given, run), between)


def test_without_room_the_workers_validate(
    between: Store, teacher: Store, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the start; and those that take a run over whose validation is under way."""
    crowded = wanted(teacher, resources__custom={"none-has-it": 1.0})
    elsewhere = wanted(teacher, resources__labels={"pool": "nowhere"})
    steps = rows(between)[0]["step"]
    never = trained(crowded, Store(str(tmp_path)) / "never")
    begun = trained(wanted(teacher), Store(str(tmp_path)) / "begun", at=steps)
    require_equal(never, between)
    require_equal(trained(elsewhere, Store(str(tmp_path)) / "elsewhere"), between)
    require_equal(trained(crowded, begun), between)
    assert not tasks(never)
    assert not tasks(Store(str(tmp_path)) / "elsewhere")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_two_workers_agree_on_what_a_task_found(ray_cluster: Any, teacher: Store, tmp_path) -> None:
    runs = {}
    for way in ("workers", "beside"):
        runs[way] = Store(str(tmp_path)) / f"two-{way}"
        train.fit(wanted(teacher, resources__workers=2, resources__validation=way), runs[way])
    require_equal(runs["beside"], runs["workers"])
    assert wait_until(lambda: "FINISHED" in tasks(runs["beside"]), 30.0), tasks(runs["beside"])
    assert not tasks(runs["workers"])
