"""Sample a class-balanced image set from a teacher, one Ray task per shard.

Image i has class i % K and is made from seed + i in a fixed batch, whoever makes it; so the shards are the same to the
byte for any number of workers, and a job that was killed goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from dra_ray import cluster, storage
from dra_ray.config import Synthesis
from dra_ray.errors import ConfigError, DataError, DraError, RunError, StorageError
from dra_ray.storage import Store, sha256
from dra_ray.teachers import checkpoint, diffusion
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.sheet import sheet

SHEET_CLASSES, SHEET_ROWS = 10, 8


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.npz"


def run(config: Synthesis, store: Store, progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Write `config.images` images to `store` and return its manifest; what is there already is kept.

    Ray must have been initialised. `progress` gets {"images", "images_total", "elapsed_s"} after every shard. Raises
    `ConfigError` when `store` holds another set, `RunError` when a shard cannot be made.
    """
    if config.teacher is None:
        raise ConfigError("teacher is not set; make one with `dra teacher train` and pass --set teacher=URI")
    store, teacher = store.resolved(), Store(config.teacher).resolved()
    net = checkpoint.load(teacher, EDM)
    teacher_digest = checkpoint.digest(teacher)
    if not net.num_classes:
        raise ConfigError(f"teacher='{config.teacher}' knows no classes; images need labels, so train it with classes")
    # what the bytes depend on is the teacher itself, not where it lies
    digest = config.model_copy(update={"teacher": teacher_digest}).digest()
    described = config.model_dump(mode="json") | {"teacher_digest": teacher_digest}
    manifest = storage.begin_run(store, "synthetic", described, digest, teacher_digest=teacher_digest)
    if manifest["status"] == "done":
        return manifest
    cluster.require(1, config.cpus_per_worker, config.gpus_per_worker, f"synthesis '{store.name}'")
    started = time.monotonic()
    hashes = _make_all(config, store, teacher, started, progress)
    counts = np.bincount(np.arange(config.images) % net.num_classes, minlength=net.num_classes)
    (store / "samples.png").write_bytes(_samples(config, store, net.num_classes))
    return storage.update_manifest(
        store,
        status="done",
        images=config.images,
        counts={str(label): int(count) for label, count in enumerate(counts)},
        sampler={"name": "heun"} | config.model_dump(include={"steps", "sigma_min", "sigma_max", "rho", "batch", "seed"}),
        shards={shard_name(index): hashes[index] for index in sorted(hashes)},
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _make_all(config: Synthesis, store: Store, teacher: Store, started: float, progress: Callable[[dict[str, Any]], None] | None) -> dict[int, str]:
    """SHA-256 of every shard; at most `config.workers` are being made at the same time."""
    waiting = list(range(-(-config.images // config.shard_images)))
    task = ray.remote(_make).options(num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_retries=3)
    running: dict[Any, int] = {}
    hashes: dict[int, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < config.workers:
                index = waiting.pop(0)
                running[task.remote(config.model_dump(mode="json"), store.uri, teacher.uri, index)] = index
            for ref in ray.wait(list(running), num_returns=1)[0]:
                hashes[running.pop(ref)] = ray.get(ref)
            if progress:
                done = min(len(hashes) * config.shard_images, config.images)
                progress({"images": done, "images_total": config.images, "elapsed_s": round(time.monotonic() - started, 3)})
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, DraError):
            raise cause from None
        raise RunError(f"synthesis '{store.name}' failed ({str(cause).strip().splitlines()[-1]}); repeat the command to go on in {store}") from error
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    return hashes


def _make(settings: dict[str, Any], store_uri: str, teacher_uri: str, index: int) -> str:
    """Ray task: make shard `index` unless it is there and whole; returns its SHA-256."""
    torch.set_num_threads(1)
    config, file = Synthesis(**settings), Store(store_uri) / shard_name(index)
    net = checkpoint.load(Store(teacher_uri), EDM)
    first, last = index * config.shard_images, min((index + 1) * config.shard_images, config.images)
    numbers = np.arange(first, last)
    wanted = {"label": numbers % net.num_classes, "seed": numbers + config.seed}
    if not _is_whole(file, wanted, net):
        device = "cuda" if config.gpus_per_worker else "cpu"
        file.write_npz(image=_sample(config, net.to(device), first, last), **wanted)
    return sha256(file.read_bytes())


def _sample(config: Synthesis, net: EDM, first: int, last: int) -> np.ndarray:
    """Images uint8 [last-first,H,W,C]; a short last batch is made in full and cut, so that no image depends on `images`."""
    levels = diffusion.noise_levels(config.steps, config.sigma_min, config.sigma_max, config.rho)
    parts = []
    for start in range(first, last, config.batch):
        numbers = range(start, start + config.batch)
        labels = torch.tensor([number % net.num_classes for number in numbers])
        parts.append(diffusion.sample(net, [config.seed + number for number in numbers], labels, levels))
    return torch.cat(parts)[: last - first].permute(0, 2, 3, 1).contiguous().numpy()


def _is_whole(file: Store, wanted: dict[str, np.ndarray], net: EDM) -> bool:
    try:
        arrays = file.read_npz()
    except (DataError, StorageError):
        return False
    if arrays.keys() != {"image", *wanted} or not all(np.array_equal(arrays[key], value) for key, value in wanted.items()):
        return False
    shape = (len(wanted["label"]), net.resolution, net.resolution, net.channels)
    return arrays["image"].shape == shape and arrays["image"].dtype == np.uint8


def _samples(config: Synthesis, store: Store, num_classes: int) -> bytes:
    """PNG of the first 8 images of each of the first classes, a column each."""
    classes = min(num_classes, SHEET_CLASSES)
    arrays = (store / shard_name(0)).read_npz()
    shown = arrays["image"][arrays["label"] < classes][: SHEET_ROWS * classes]
    return sheet(torch.from_numpy(shown).permute(0, 3, 1, 2), columns=classes)
