"""Training on sets in rows, from a disk and from an S3 store with faults: a kill changes nothing,
scales of one set are nested, and the whole of the main job lives there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.util.state import list_actors

from dra_ray import config
from dra_ray import runs as run_folder
from dra_ray.data import rows
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.workloads import train
from tests.cluster import apart
from tests.cluster.small import experiment
from tests.support.s3 import Proxy, faulty_store

IMAGES, SHARD = 600, 50


@pytest.fixture(scope="module")
def store() -> Iterator[Proxy]:
    with faulty_store("streaming") as server:
        yield server


def a_set(to: Store, images: int = IMAGES) -> Store:
    """Random digits, shuffled by nature."""
    drawn = np.random.default_rng(0)
    shards, counts = [], np.zeros(10, np.int64)
    for number in range(images // SHARD):
        image = drawn.integers(0, 256, (SHARD, 8, 8, 1)).astype(np.uint8)
        label = drawn.integers(0, 10, SHARD)
        counts += np.bincount(label, minlength=10)
        digest = (to / rows.shard_name(number)).write_npy(rows.records(image, label))
        shards.append(rows.Shard(name=rows.shard_name(number), images=SHARD, sha256=digest))
    rows.write_index(to, shards, (8, 8, 1), counts, {})
    return to


def streaming(uri: Store, workers: int, replace: bool, **changes: Any) -> config.Experiment:
    """Of which no image lives on the device, and of which a window is a sixth of the set."""
    settings = {
        "align__weight": 0.0,
        "model__name": "wrn-10-1",
        "optim__epochs": 6,
        "synthetic__uri": uri.uri,
        "synthetic__images": IMAGES,
        "synthetic__window_images": IMAGES // 6,
        "synthetic__replace": replace,
        "resources__workers": workers,
        "resources__resident_gib": 0.0,
        "resources__metrics_steps": 3,
        "resources__checkpoint_steps": 4,
    }
    return experiment(Store("none"), **(settings | {"teacher__uri": None} | changes))


def weights(run: Store) -> dict[str, bytes]:
    found = (run / checkpoint.WEIGHTS).read_tensors()
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def losses(run: Store) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in (run / "steps.jsonl").read_jsonl()]


def _kill_once(run: Store, killed: list[int]) -> None:
    """SIGKILL a training worker once a validation is behind it."""
    while not killed:
        time.sleep(0.02)
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_jsonl()) >= 2:
            for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000):
                if actor.class_name == "RayTrainWorker" and not killed:
                    os.kill(actor.pid, signal.SIGKILL)
                    killed.append(actor.pid)
        manifest = run_folder.read_manifest(run)
        if manifest and manifest.is_done:
            return


def undisturbed_and_killed(root: Store, remote: Store, workers: int, replace: bool) -> None:
    """Run by a process with a cluster of its own, whose workers know the store."""
    disk, name = a_set(root / "set"), f"{workers}-{replace}"
    quiet = root / f"quiet-{name}"
    train.fit(streaming(disk, workers, replace), quiet)
    assert len(losses(quiet)) > 5
    for uri, folder in ((disk, root), (a_set(remote / "set"), remote)):
        run, killed = folder / f"killed-{name}", list[int]()
        killer = threading.Thread(target=_kill_once, args=(run, killed), daemon=True)
        killer.start()
        train.fit(streaming(uri, workers, replace), run)
        killer.join()
        assert killed, run
        assert weights(run) == weights(quiet), run
        assert losses(run) == losses(quiet), run
    resident = root / f"resident-{name}"
    train.fit(streaming(disk, workers, replace, resources__resident_gib=4.0), resident)
    assert weights(resident) == weights(quiet), "where images live changes no batch"


DRIVER = """
import sys
from dra_ray import cluster
from dra_ray.storage import Store
from tests.cluster.test_streaming import undisturbed_and_killed

with cluster.connect():
    for workers in (1, 2):
        for replace in (True, False):
            undisturbed_and_killed(Store(sys.argv[1]), Store(sys.argv[2]), workers, replace)
            print(workers, replace, flush=True)
"""


@pytest.mark.slow
def test_a_kill_changes_no_batch(store: Proxy, tmp_path: Path) -> None:
    """With 1 and 2 workers, with and without replacement, on a disk and on S3 of which one reply in
    forty is wrong, half-way: weights and losses as undisturbed, to the bit.
    """
    store.every = 40
    try:
        remote = f"s3://streaming/{tmp_path.name}"
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path), remote],
            env=apart.environment(),
            capture_output=True,
            text=True,
        )
    finally:
        store.every = 0
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 4


BASE = """
kind: experiment
data: {{name: cifar10, uri: "{runs}/cifar.npz", validation_images: 50, test_images: 50}}
model: {{name: wrn-10-1}}
synthetic: {{uri: "{runs}/set", images: 600, window_images: 120}}
threat: {{steps: 1}}
align: {{weight: 0}}
optim: {{epochs: 2, batch: 50}}
selection: {{steps: 1, every_epochs: 1}}
resources: {{resident_gib: 0, cpus_per_worker: 0.9}}
"""
SWEEP = """
kind: sweep
base: {{extends: '{runs}/base.yaml'}}
space: {{synthetic.images: [150, 600]}}
scheduler: none
"""


def dra(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dra_ray", *arguments],
        env=apart.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_main_job_lives_on_a_store_with_faults(store: Proxy, tmp_path: Path) -> None:
    """Data, synthetic shards, checkpoints, runs and reports on s3://, of which one reply in 59
    fails: train, a sweep of two trials over the scale of one set, evaluate, report.
    """
    runs = f"s3://streaming/{tmp_path.name}"
    drawn = np.random.default_rng(0)
    Store(f"{runs}/source.npz").write_npz(
        image=drawn.integers(0, 256, (IMAGES, 32, 32, 3)).astype(np.uint8),
        label=np.sort(drawn.integers(0, 10, IMAGES)),
    )
    Store(f"{runs}/cifar.npz").write_bytes(Path(cifar(tmp_path / "cifar.npz")).read_bytes())
    Store(f"{runs}/base.yaml").write_text(BASE.format(runs=runs))
    Store(f"{runs}/sweep.yaml").write_text(SWEEP.format(runs=runs))
    store.every = 59
    try:
        converting = ["convert", f"{runs}/source.npz", "--name", "set", "--shard-images", "200"]
        dra("data", *converting, "--storage", runs)
        dra("data", "check", f"{runs}/set")
        dra("train", f"{runs}/base.yaml", "--storage", runs, "--name", "one")
        dra("evaluate", f"{runs}/one", "--level", "screen")
        dra("sweep", f"{runs}/sweep.yaml", "--storage", runs, "--name", "sweep")
        for run in ("one", "sweep"):
            dra("report", f"{runs}/{run}")
            assert (Store(runs) / run / "report.html").size() > 10_000
    finally:
        store.every = 0
    manifest = run_folder.read_manifest(Store(f"{runs}/sweep"))
    assert manifest
    assert manifest.is_done
    trials = [
        run_folder.read_manifest(Store(f"{runs}/sweep/trials/{name}")) for name in manifest.trials
    ]
    assert sorted(trial.synthetic["images"] for trial in trials if trial) == [150, 600]


@pytest.mark.slow
def test_more_than_4_gib_of_npz_convert_and_train(ray_cluster: Any, tmp_path: Path) -> None:
    """DM-AT's layout: one file with `image` and `label`, sorted by class, of more bytes than a zip
    without its extension can hold; no process ever holds it.
    """
    count, step = 1_500_000, 50_000
    file = tmp_path / "dm-at.npz"
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("image.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for begin in range(0, count, step):
                part = np.zeros((step, 32, 32, 3), np.uint8)
                part[:, 0, 0, :] = (
                    (begin + np.arange(step))[:, None] >> np.array([0, 8, 16])
                ) & 255
                member.write(part.tobytes())
        with archive.open("label.npy", "w") as member:
            np.save(member, np.arange(count) * 10 // count)
    assert file.stat().st_size > 2**32
    dra("data", "convert", str(file), "--storage", str(tmp_path), "--name", "rows")
    file.unlink()
    index = rows.read_index(Store(str(tmp_path / "rows")))
    assert index.counts == {str(label): count // 10 for label in range(10)}
    pictures = rows.RowSet(Store(str(tmp_path / "rows")), index, count)
    import torch

    chosen = torch.randint(count, (2000,), generator=torch.Generator().manual_seed(0))
    images, labels = pictures.take(chosen)
    numbers = (images[:, :, 0, 0].long() << torch.tensor([0, 8, 16])).sum(1)
    assert torch.equal(numbers * 10 // count, labels)
    assert len(numbers.unique()) > 1900
    first = pictures.take(torch.arange(5000))[1].bincount(minlength=10)
    assert (first - 500).abs().max() < 100, "its beginning is a sample"
    wanted = config.override(
        config.Experiment(),
        {
            "data.name": "cifar10",
            "data.uri": cifar(tmp_path / "cifar.npz"),
            "model.name": "wrn-10-1",
            "synthetic.uri": str(tmp_path / "rows"),
            "synthetic.images": count,
            "optim.epochs": 1,
            "optim.batch": 50,
            "threat.steps": 1,
            "selection.steps": 1,
            "align.weight": 0.0,
            "data.train_images": 100,
            "data.validation_images": 50,
        },
    )
    assert train.fit(wanted, Store(str(tmp_path / "run"))).epoch == 1


def cifar(file: Path) -> str:
    drawn = np.random.default_rng(0)
    parts = {
        name: drawn.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
        for name, size in (("image", 400), ("test_image", 100))
    }
    labels = {"label": np.arange(400) % 10, "test_label": np.arange(100) % 10}
    np.savez(file, **parts, **labels)
    return str(file)
