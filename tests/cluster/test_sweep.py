"""A whole sweep: early stopping, finals, freed slots, and a replica killed in the middle without a
trace in the results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from dra_ray import cluster, config, runs
from dra_ray.pool import service
from dra_ray.storage import Store
from dra_ray.sweeps import orders
from dra_ray.workloads import sweep
from tests.cluster import apart
from tests.cluster.small import experiment, replica_pids

EPOCHS = 4


def settings(teacher: Store) -> config.Sweep:
    base = experiment(
        teacher, optim__epochs=EPOCHS, pool__downscale_delay_s=2.0, pool__look_back_period_s=2.0
    )
    space = {"align.weight": [0.0, 1.0, 4.0], "align.sigma": [0.1, 0.5]}
    return config.Sweep(
        base=base,
        space=space,
        asha=config.Asha(grace_epochs=1, reduction_factor=2, max_concurrent=3),
    )


def scores(run: Store) -> dict[tuple[str, int], tuple[float, float]]:
    """(clean, robust) by trial and epoch, from the trials' own files: what ASHA decided and when
    does not enter.
    """
    found = {}
    for trial in (run / "trials").names():
        for row in (run / "trials" / trial / "metrics.jsonl").read_jsonl():
            found[trial, row["epoch"]] = (
                row["clean_accuracy"],
                row["robust_accuracy"],
                row["loss"],
            )
    return found


@pytest.mark.slow
def test_a_sweep_and_the_same_with_a_killed_replica(
    ray_cluster: Any, teacher: Store, tmp_path: Path
) -> None:
    quiet, disturbed = Store(str(tmp_path)) / "quiet", Store(str(tmp_path)) / "disturbed"
    free = ray.available_resources()["CPU"]
    manifest = sweep.run(settings(teacher), quiet)

    killed: list[int] = []

    def kill_a_replica(row: runs.RungRow) -> None:
        """At the first score: trials are at work, and more are to come."""
        if not killed and (pids := replica_pids()):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

    again = sweep.run(settings(teacher), disturbed, kill_a_replica)
    assert killed
    assert runs.read_manifest(disturbed) == again
    assert again.is_done

    one, two = scores(quiet), scores(disturbed)
    shared = one.keys() & two.keys()
    assert {trial for trial, _ in shared} == set(manifest.trials)
    assert {key: one[key] for key in shared} == {key: two[key] for key in shared}
    for run, finals in ((quiet, manifest.finals), (disturbed, again.finals)):
        rows = (run / "rungs.jsonl").read_jsonl()
        assert "stop" in {row["decision"] for row in rows}
        assert all((trial, EPOCHS) in scores(run) for trial in finals.values()), (
            "a finalist did not reach the full budget"
        )
    assert (disturbed / "pool.jsonl").read_jsonl()[-1]["retries"] >= 0
    # the slots of stopped trials come back, and nothing of the pool stays
    assert cluster.wait_until(lambda: ray.available_resources().get("CPU", 0) >= free - 1e-6, 30), (
        ray.available_resources()
    )
    assert service.app_name(settings(teacher).base.teacher) not in service.applications()


@pytest.mark.slow
def test_a_point_that_is_added_later_finds_the_pool_of_its_own_teacher(
    ray_cluster: Any, teacher: Store, tmp_path: Path
) -> None:
    """A layer that no trial had when the sweep began."""
    layers = ["enc.8x8_block0", "dec.8x8_block1"]
    base = experiment(teacher, optim__epochs=1, pool__timeout_s=30.0)
    asha = config.Asha(grace_epochs=1)
    few = config.Sweep(base=base, space={"teacher.layer": layers}, asha=asha, trials=1)
    run = Store(str(tmp_path)) / "sweep"
    (first,) = sweep.run(few, run).trials.values()
    (other,) = set(layers) - {first["teacher.layer"]}
    orders.give(run, orders.Order("add", point={"teacher.layer": other}))
    manifest = sweep.run(few, run)
    assert [fields["teacher.layer"] for fields in manifest.trials.values()] == [
        first["teacher.layer"],
        other,
    ]
    last = {row["trial"]: row["decision"] for row in (run / "rungs.jsonl").read_jsonl()}
    assert set(last.values()) == {"done"}, last
    assert (run / service.log_name(1)).read_jsonl()[-1]["images"] > 0


@pytest.mark.slow
def test_a_sweep_without_room_says_what_is_missing(
    ray_cluster: Any, teacher: Store, tmp_path: Path
) -> None:
    wide = config.override(settings(teacher), {"base.resources.cpus_per_worker": 4.0})
    start = time.monotonic()
    with pytest.raises(
        sweep.RunError,
        match="a trial needs 4 CPU for 1 workers, but this machine has 3.8 beside the 0.2 of "
        "the teacher pool",
    ):
        sweep.run(wide, Store(str(tmp_path)) / "run")
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_sweep_on_a_full_disk_says_so_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    changes = {"align.weight": 0, "optim.epochs": 6, "threat.steps": 2, "selection.steps": 2}
    sets = [part for key, value in changes.items() for part in ("--set", f"base.{key}={value}")]
    command = [sys.executable, "-m", "dra_ray", "sweep", "digits-sweep", "--no-check", *sets]
    command += ["--set", "space={optim.lr: [0.1, 0.2, 0.05]}", "--storage", str(small)]
    environment = apart.environment()
    try:
        full = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert full.returncode == 1
        assert "No space left on device" in full.stderr
        assert full.stderr.splitlines()[-1].startswith("error: 3 of 3 trials of ")
        assert "start the same command again" in full.stderr.splitlines()[-1]
        larger = ["mount", "-o", "remount,size=100m", str(small)]
        subprocess.run(larger, check=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_validation_of_which_a_killed_driver_did_not_hear_is_heard_of(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """Its checkpoint is committed, so the trial that is resumed does not repeat it: of a trial that
    is at work, and of one that has ended.
    """
    base = experiment(Store("none"), teacher__uri=None, align__weight=0.0, optim__epochs=3)
    settings = config.Sweep(
        base=base,
        space={"optim.lr": [0.05, 0.1]},
        scheduler="none",
        asha=config.Asha(max_concurrent=1),
    )
    quiet = Store(str(tmp_path)) / "quiet"
    sweep.run(settings, quiet)
    whole = course(quiet)
    assert [epoch for _, epoch, _, _ in whole] == [1, 2, 3, 1, 2, 3]
    for left in (4, 5):  # rows, up to the first or second epoch of the second trial
        run = Store(str(tmp_path)) / f"unheard-{left}"
        shutil.copytree(quiet.uri, run.uri)
        rows = (run / "rungs.jsonl").read_jsonl()
        (run / "rungs.jsonl").write_jsonl(rows[:left])
        runs.update_manifest(run, runs.Facts(status="running"))
        sweep.run(settings, run)
        assert course(run) == whole


DRIVER = """
import sys
from dra_ray import cluster, config
from dra_ray.storage import Store
from dra_ray.sweeps import orders
from dra_ray.workloads import sweep

base = config.override(config.Experiment(), {
    "model.name": "wrn-10-1", "optim.epochs": 4, "optim.batch": 128, "threat.steps": 3,
    "selection.steps": 3, "align.weight": 0.0, "resources.cpus_per_worker": 0.5,
})
study = config.Sweep(
    base=base,
    space={"optim.lr": {"log_uniform": [0.01, 0.4]}},
    search={"method": "tpe", "startup_trials": 2},
    trials=5,
    scheduler="asha",
    asha={"grace_epochs": 1, "reduction_factor": 2, "max_concurrent": 1},
)
run = Store(sys.argv[1])
with cluster.connect():
    if "second" in sys.argv:
        cluster.wait_until((run / "lease.json").exists, 200)
    sweep.run(study, run)
"""


def course(run: Store) -> list[tuple[str, int, float | None, str]]:
    rows = runs.read_rows(run / "rungs.jsonl", runs.RungRow)
    return [(row.trial, row.epoch, row.robust_accuracy, row.decision) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_driver_killed_three_times_ends_as_one_that_was_not(
    place: str, tmp_path: Path, s3_bucket: str
) -> None:
    """Same suggestions, same rungs, same finals. And a second driver beside a living one is refused
    and does not disturb it.
    """
    root = Store(str(tmp_path) if place == "disk" else f"{s3_bucket}/{tmp_path.name}")
    environment = apart.environment()

    def driver(run: Store, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, run.uri, *more],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    quiet, disturbed = root / "quiet", root / "disturbed"
    # at once: the second needs seconds to start, and is to find the first at work
    first, second = driver(quiet), driver(quiet, "second")
    assert second.wait(200) != 0
    assert second.stderr
    assert "LeaseError" in second.stderr.read()
    assert first.wait(400) == 0, first.stderr
    for rows in (2, 5, 8):
        process = driver(disturbed)
        assert cluster.wait_until(lambda rows=rows: len(course(disturbed)) >= rows, 200)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (runs.read_manifest(disturbed) or runs.Manifest()).is_done
    last = driver(disturbed)
    assert last.wait(400) == 0, last.stderr
    assert course(disturbed) == course(quiet)
    one, two = runs.read_manifest(quiet), runs.read_manifest(disturbed)
    assert one
    assert two
    assert (one.trials, one.finals) == (two.trials, two.finals)
    assert two.is_done
