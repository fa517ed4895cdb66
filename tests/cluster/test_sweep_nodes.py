"""A sweep on a cluster of its own, one of whose nodes is killed and another drained meanwhile."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from dra_ray import config, runs
from dra_ray.storage import Store
from tests.cluster.head import BIN, Head, lose, started, until
from tests.cluster.small import experiment

NODE: dict[str, Any] = {"num_cpus": 1, "resources": '{"student": 1}'}
WAIT_S = 300
EPOCHS = 60


def reports(sweep: Store) -> list[runs.RungRow]:
    return runs.read_rows(sweep / runs.RUNGS, runs.RungRow)


def outcome(sweep: Store) -> dict[str, tuple[float | None, float | None, bytes]]:
    """Of every trial that was trained to its end: last accuracies, and weights."""
    return {
        row.trial: (
            row.clean_accuracy,
            row.robust_accuracy,
            (sweep / runs.TRIALS / row.trial / runs.MODEL).read_bytes(),
        )
        for row in reports(sweep)
        if row.decision == "done"
    }


def drain(head: Head) -> None:
    """A spot node's notice, to one that has a trial; it is gone 15 s later."""
    actors = head.get("/api/v0/actors?limit=1000&detail=1").json()["data"]["result"]["result"]
    trials = [each for each in actors if each["class_name"] == "ImplicitFunc"]
    node = next(each["node_id"] for each in trials if each["state"] == "ALIVE")
    command = [str(BIN / "ray"), "drain-node", "--address", head.gcs, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", "15"]
    subprocess.run(command, env=head.inside, check=True)


@pytest.mark.slow
def test_a_sweep_ends_as_undisturbed_where_a_node_is_killed_and_one_drained(
    teacher: Store, tmp_path: Path
) -> None:
    base = experiment(
        teacher,
        align__weight=0.0,
        optim__epochs=EPOCHS,
        selection__every_epochs=10,
        resources__custom={"student": 1},
        resources__checkpoint_steps=10,
    )
    asha = config.Asha(grace_epochs=10, max_concurrent=2)
    space = {"optim.lr": [0.05, 0.1, 0.2, 0.3]}
    study = config.Sweep(base=base, space=space, asha=asha, scheduler="none")
    (tmp_path / "sweep.yaml").write_text(config.to_yaml(study))
    calm, disturbed = (Store(str(tmp_path)) / name for name in ("calm", "disturbed"))

    def submit(run: Store) -> list[str]:
        where = ["--storage", str(tmp_path), "--name", run.name]
        return ["submit", "sweep", str(tmp_path / "sweep.yaml"), *where]

    with started(cpus=1) as head:
        nodes = [head.node(**NODE) for _ in range(2)]
        done = head.dra(*submit(calm))
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(outcome(calm)) == 4
        begun = head.dra(*submit(disturbed), "--no-follow")
        until(lambda: len(reports(disturbed)) >= 2, WAIT_S, "two validations")
        lose(nodes[0])
        head.node(**NODE)
        so_far = len(reports(disturbed))
        until(lambda: len(reports(disturbed)) >= so_far + 3, WAIT_S, "validations after the loss")
        drain(head)
        head.node(**NODE)
        followed = head.dra("jobs", "follow", begun.stdout.strip())
        assert followed.returncode == 0, followed.stdout + followed.stderr
    assert outcome(disturbed) == outcome(calm)
