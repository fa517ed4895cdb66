"""Training on Ray Train: pool equals local; a finished run is not run again; a killed one ends as
if nothing had happened.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.state import list_actors

from dra_ray import config
from dra_ray import runs as run_folder
from dra_ray.cluster import wait_until
from dra_ray.errors import ConfigError, RunError
from dra_ray.pool import sources as feature_sources
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.training import step
from dra_ray.workloads import session, train
from tests.cluster.small import experiment
from tests.support.rows import without_times


def rows(run: Store, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    file = run / name  # steps.jsonl is not there before the first row
    return without_times(file.read_jsonl() if file.exists() else [])


@pytest.fixture(scope="module")
def runs(
    ray_cluster: Any, teacher: Store, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Store]:
    """The same experiment with the pool and with the teacher in process."""
    root = Store(str(tmp_path_factory.mktemp("runs")))
    for kind in ("pool", "local"):
        train.fit(experiment(teacher, pool__kind=kind), root / kind)
    return {kind: root / kind for kind in ("pool", "local")}


def test_pool_equals_local(runs: dict[str, Store]) -> None:
    assert rows(runs["pool"]) == rows(runs["local"])
    assert all(row["loss_align"] > 0 for row in rows(runs["pool"]))
    pooled, local = ((runs[kind] / checkpoint.WEIGHTS).read_tensors() for kind in ("pool", "local"))
    assert all(torch.equal(pooled[name], local[name]) for name in local)


def test_a_finished_run_says_so_and_tells_all_about_itself(
    runs: dict[str, Store], teacher: Store
) -> None:
    manifest = run_folder.read_manifest(runs["pool"])
    assert manifest
    assert manifest.is_done
    assert manifest.world_sizes[0].workers == 1
    assert manifest.data["train"] == 1241
    assert manifest.versions["ray"]
    before = (runs["pool"] / "metrics.jsonl").read_bytes()
    row = train.fit(experiment(teacher), runs["pool"])
    assert row.epoch == 2
    assert (runs["pool"] / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="optim.lr"):
        train.fit(experiment(teacher, optim__lr=0.05), runs["pool"])
    student, again = checkpoint.load(runs["pool"])
    assert again.digest() == experiment(teacher).digest()
    assert not student.training


def test_a_teacher_that_may_have_seen_the_test_images_is_refused(
    ray_cluster: Any, teacher: Store, tmp_path
) -> None:
    card = (teacher / "card.json").read_json()
    other = Store(str(tmp_path)) / "teacher"
    (other / "card.json").write_json(card | {"data": config.Data(split_seed=7).model_dump()})
    with pytest.raises(
        ConfigError, match=r"data.split_seed=0, but the teacher .* was trained with 7"
    ):
        train.fit(experiment(other), Store(str(tmp_path)) / "run")
    assert not (Store(str(tmp_path)) / "run").exists()


def test_training_a_bit_teaches_a_bit(runs: dict[str, Store]) -> None:
    first, last = rows(runs["pool"])[0], rows(runs["pool"])[-1]
    assert last["loss"] < first["loss"]
    assert last["clean_accuracy"] > 0.15


class _Killed(Exception):
    """What stands for the end of a process."""


def test_a_run_moves_between_ray_train_and_a_single_process(
    runs: dict[str, Store], teacher: Store, tmp_path
) -> None:
    """A trial trains in its own process: same numbers, and each goes on where the other stopped."""
    root, wanted = Store(str(tmp_path)), experiment(teacher, pool__kind="local")

    def killed(row: Mapping[str, Any]) -> None:
        raise _Killed

    with pytest.raises(_Killed):
        train.fit_in_process(wanted, root / "local", killed)
    assert [row["epoch"] for row in rows(root / "local")] == [1]
    seen: list[Any] = []
    resumed = config.override(wanted, {"resources.max_failures": 5})  # not in the digest
    train.fit_in_process(resumed, root / "local", seen.append)
    assert [row["epoch"] for row in seen] == [2]
    manifest = run_folder.read_manifest(root / "local")
    assert manifest
    assert manifest.config == resumed.with_sources().model_dump(mode="json")
    _equal(root / "local", runs["local"])

    begun = root / "begun" / "local"
    with pytest.raises(_Killed):
        train.fit_in_process(wanted, begun, killed)
    train.fit(wanted, begun)
    _equal(begun, runs["local"])

    shutil.copytree(runs["local"].uri, (root / "copied" / "local").uri)
    copied = root / "copied" / "local"
    snapshot = copied / "checkpoints" / "local" / session.SNAPSHOT
    first = session.read_snapshot(copied)["checkpoint_results"][0]
    snapshot.write_json(
        session.read_snapshot(copied)
        | {"checkpoint_results": [first], "latest_checkpoint_result": first}
    )
    run_folder.update_manifest(copied, run_folder.Facts(status="running"))
    train.fit_in_process(wanted, copied, seen.append)
    assert [row["epoch"] for row in seen] == [2, 2]
    _equal(copied, runs["local"])


def _once_it_has_a_checkpoint(run: Store, pids: Callable[[], list[int]], killed: list[int]) -> None:
    """SIGKILL the first of `pids()` once two of the run's validations are behind it; gives up where
    the run has ended before that.
    """
    found: list[int] = []
    while not killed:
        time.sleep(0.02)
        validations = rows(run) if (run / "metrics.jsonl").exists() else []
        if validations and not found:
            found = pids()  # takes a while
        if len(validations) >= 2 and found:
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])
        manifest = run_folder.read_manifest(run)
        if manifest and manifest.is_done:
            return


def _train_workers() -> list[int]:
    return [
        actor.pid
        for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
        if actor.class_name == "RayTrainWorker"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_changes_nothing(
    ray_cluster: Any,
    teacher: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    workers: int,
) -> None:
    """SIGKILL of a worker, and of a driver, half-way: metrics, weights, averages and optimiser as
    undisturbed, to the bit.
    """
    wanted = experiment(
        teacher,
        optim__epochs=8,
        pool__kind="local",
        resources__workers=workers,
        resources__metrics_steps=3,
        resources__checkpoint_steps=4,
    )
    root = Store(str(tmp_path))
    quiet, worker, driver = root / "quiet", root / "worker", root / "driver"
    train.fit(wanted, quiet)

    killed: list[int] = []
    killer = threading.Thread(
        target=_once_it_has_a_checkpoint, args=(worker, _train_workers, killed)
    )
    killer.start()
    train.fit(wanted, worker)
    killer.join()
    assert killed
    assert "it starts again from its last checkpoint, 1 of at most" in caplog.text
    _equal(worker, quiet)

    (root / "wanted.json").write_json(wanted.model_dump(mode="json"))
    command = [
        sys.executable,
        "-m",
        "dra_ray",
        "train",
        (root / "wanted.json").uri,
        "--storage",
        root.uri,
        "--name",
        "driver",
    ]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["address"]}
    first = subprocess.Popen(command, env=environment)
    _once_it_has_a_checkpoint(driver, lambda: [first.pid], [])
    assert first.wait() == -signal.SIGKILL
    assert not run_folder.read_manifest(driver).is_done  # type: ignore[union-attr]
    subprocess.run(command, env=environment, check=True)
    _equal(driver, quiet)


@pytest.mark.slow
def test_an_elastic_run_whose_driver_was_killed_starts_again_at_once(
    ray_cluster: Any, teacher: Store, tmp_path: Path
) -> None:
    """Ray would keep the room of all its workers for three minutes, in which nothing else has
    room.
    """
    endless = {"optim__epochs": 10_000, "optim__batch": 96, "align__weight": 0.0}
    room = {"resources__workers": 3, "resources__min_workers": 2, "resources__cpus_per_worker": 1}
    root = Store(str(tmp_path))
    tree = experiment(teacher, **endless, **room).model_dump(mode="json")
    (root / "experiment.json").write_json(tree)
    place = ["--storage", root.uri, "--name", "run"]
    command = [sys.executable, "-m", "dra_ray", "train", (root / "experiment.json").uri, *place]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["address"]}

    def starts() -> int:
        manifest = run_folder.read_manifest(root / "run")
        return len(manifest.world_sizes) if manifest else 0

    first = subprocess.Popen(command, env=environment)
    assert wait_until(lambda: starts() == 1 and (root / "run" / "metrics.jsonl").exists(), 120)
    first.kill()
    first.wait()
    second, begun = subprocess.Popen(command, env=environment), time.monotonic()
    assert wait_until(lambda: starts() == 2, 150)
    print(f"again after {time.monotonic() - begun:.0f} s")
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130


def _equal(run: Store, reference: Store) -> None:
    assert rows(run) == rows(reference)
    assert rows(run, "steps.jsonl") == rows(reference, "steps.jsonl")
    one, two = _last_state(run), _last_state(reference)
    for name in ("student", "average", "head"):
        assert all(torch.equal(one[name][key], two[name][key]) for key in two[name])
    for index, kept in two["optimizer"]["state"].items():
        assert torch.equal(
            one["optimizer"]["state"][index]["momentum_buffer"], kept["momentum_buffer"]
        )


def _last_state(run: Store) -> dict[str, Any]:
    newest = session.read_snapshot(run)["latest_checkpoint_result"]["checkpoint_dir_name"]
    return (run / "checkpoints" / run.name / newest / "state.pt").read_torch()


def test_what_can_never_start_is_told_at_once(ray_cluster: Any, teacher: Store, tmp_path) -> None:
    with pytest.raises(
        RunError, match=r"needs 64 CPU for 64 workers, but this machine has 3.8 beside the 0.2"
    ):
        train.fit(
            experiment(teacher, resources__workers=64, resources__cpus_per_worker=1),
            Store(str(tmp_path)) / "run",
        )
    assert ray.is_initialized()


def test_alignment_reaches_the_student(runs: dict[str, Store], teacher: Store) -> None:
    """Lambda changes the weights: the alignment gradient flows through the adversarial feature."""
    images = train.data.load(config.Data())
    wanted = experiment(teacher, pool__kind="local")
    sources = feature_sources.sources(wanted, "cpu")
    cpu, everything = torch.device("cpu"), slice(0, 128)
    state, _ = step.initial_state(wanted, images.shape, sources, cpu)
    assert state.aligner is not None
    before = {name: p.clone() for name, p in state.student.named_parameters()}
    batch = images.train.images[:128], images.train.labels[:128]
    wanted = config.override(wanted, {"loss.beta": 0.0})
    step.step(state, wanted, step.prepare(wanted, *batch, 0, everything, sources), everything)
    with_align = {name: p.clone() for name, p in state.student.named_parameters()}
    other, _ = step.initial_state(wanted, images.shape, sources, cpu)
    assert all(torch.equal(p, before[name]) for name, p in other.student.named_parameters()), (
        "the start does not depend on lambda"
    )
    step.step(other, wanted, step.prepare(wanted, *batch, 0, everything, ()), everything)
    assert any(not torch.equal(p, with_align[name]) for name, p in other.student.named_parameters())


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_checkpoint(
    ray_cluster: Any, teacher: Store, tmp_path
) -> None:
    """It is not tried again: it would end alike."""
    run = Store(str(tmp_path)) / "run"
    wanted = experiment(
        teacher, align__weight=0.0, optim__lr=1e12, optim__epochs=3, resources__metrics_steps=5
    )
    with pytest.raises(
        RunError,
        match=r"stopped: the loss is (nan|inf) at step 5; no checkpoint was written yet; lower "
        r"optim.lr",
    ):
        train.fit(wanted, run)
    assert not run_folder.read_manifest(run).is_done  # type: ignore[union-attr]
