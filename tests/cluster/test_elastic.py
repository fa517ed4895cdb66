"""An elastic run on a cluster of its own: with one worker when a node is lost, with two when one
comes, and at once after its driver was killed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dra_ray import config, runs
from dra_ray.storage import Store
from tests.cluster.head import JOB_S, drivers, lose, started, until
from tests.cluster.small import experiment

CHECKPOINT_STEPS = 20


@pytest.mark.slow
def test_it_shrinks_grows_and_resumes(teacher: Store, tmp_path: Path) -> None:
    """Losing at most the steps since a checkpoint each time."""
    wanted = experiment(
        teacher,
        align__weight=0.0,
        optim__epochs=10_000,
        resources__workers=2,
        resources__min_workers=1,
        resources__cpus_per_worker=1,
        resources__checkpoint_steps=CHECKPOINT_STEPS,
        resources__metrics_steps=1,
    )
    (tmp_path / "elastic.yaml").write_text(config.to_yaml(wanted))
    run = Store(str(tmp_path)) / "run"
    submit = ["submit", "train", str(tmp_path / "elastic.yaml")]
    submit += ["--storage", str(tmp_path), "--name", "run", "--no-follow"]

    def starts() -> list[Any]:
        manifest = runs.read_manifest(run)
        return list(manifest.world_sizes) if manifest else []

    def steps() -> int:
        rows = runs.read_rows(run / runs.STEPS, runs.StepRow)
        return rows[-1].step if rows else 0

    def trains_on(count: int, what: str) -> int:
        """Wait until the last of `count` starts has made 30 steps; the step before that start."""
        before = steps()
        until(lambda: len(starts()) == count, 200, what)
        begun = starts()[-1].step
        until(lambda: steps() > begun + 30, 100, f"steps after {what}")
        return before

    with started(cpus=0) as head:
        nodes = [head.node(num_cpus=1) for _ in range(2)]
        assert head.dra(*submit).returncode == 0
        trains_on(1, "the first start")
        if starts()[-1].workers == 1:  # the second node was late
            trains_on(2, "the second worker")
        so_far = len(starts())
        for number, change in enumerate(("a lost node", "a new node", "a killed driver"), so_far):
            if change == "a lost node":
                lose(nodes.pop())
            elif change == "a new node":
                nodes.append(head.node(num_cpus=1))
            else:
                (driver,) = drivers("run")
                os.kill(driver, signal.SIGKILL)
                until(lambda: head.dra(*submit).stdout.strip().endswith("-2"), JOB_S, "its end")
            before = trains_on(number + 1, change)
            start = starts()[-1]
            print(change, before, start)
            assert start.workers == (1 if change == "a lost node" else 2)
            assert start.step >= before - CHECKPOINT_STEPS - 5, "two checkpoints are kept"
        assert head.dra("jobs", "stop", "run").returncode == 0
