"""Make canonical samples of training images (CLARID, arXiv 2506.09955), one Ray task per shard.

Which images, and in what order, is a pure function of the config; every batch is whole, whoever
makes it, and a short last one is filled up and cut. So the shards are the same to the byte for any
number of workers, and a job that was killed goes on where it stopped.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import torch
from pydantic import JsonValue
from torch import Tensor

from dra_ray import cluster, data, runs
from dra_ray.config import Canonical, digest_of, override
from dra_ray.data import canonical as sets
from dra_ray.data import random
from dra_ray.errors import ConfigError, DataError, StorageError
from dra_ray.runs import SyntheticProgress
from dra_ray.storage import Lease, Store, sha256
from dra_ray.students import Student
from dra_ray.students import checkpoint as student_checkpoint
from dra_ray.teachers import canonical, checkpoint
from dra_ray.teachers.network import Network
from dra_ray.teachers.sheet import sheet
from dra_ray.workloads import tasks

log = logging.getLogger("dra_ray")
SHEET_CLASSES, SHEET_PAIRS = 10, 4
WITHOUT_JUDGE = -1


def run(
    config: Canonical,
    store: Store,
    progress: Callable[[SyntheticProgress], None] | None = None,
) -> runs.Manifest:
    """Write the canonical samples of `config` to `store` and return its manifest; what is there
    already is kept.

    Ray must have been initialised. `progress` gets a row after every shard. Raises `ConfigError`
    when `store` holds another set or the teacher makes no canonical samples, `RunError` when a
    shard cannot be made.
    """
    config = _resolved(config)
    images = check(config)
    assert config.teacher
    store, teacher = store.resolved(), Store(config.teacher)
    facts = runs.Facts(teacher_digest=checkpoint.digest(teacher), data=images.facts())
    need = (1, config.cpus_per_worker, config.gpus_per_worker)
    manifest = runs.begin_run(
        store,
        "canonical",
        config.model_dump(mode="json") | {"teacher_digest": facts.teacher_digest},
        _digest(config, str(facts.teacher_digest)),
        facts,
        lambda: cluster.require(*need, f"the set '{store.name}'"),
    )
    if manifest.is_done:
        return manifest
    order = sets.chosen(images.train.labels, config.share, config.seed)
    with Lease(store):
        log.info("waiting for the first shard of canonical samples")
        started = time.monotonic()
        settings, total = config.model_dump(mode="json"), len(order)
        task = ray.remote(_make).options(
            num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_retries=3
        )
        hashes = tasks.in_order(
            -(-total // config.shard_images),
            lambda index: task.remote(settings, store.uri, index),
            config.workers,
            f"the set '{store.name}'",
            store,
            tasks.told(progress, config.shard_images, total, started),
        )
        names = [sets.shard_name(index) for index in range(len(hashes))]
        labels = images.train.labels[order]
        counts = labels.bincount(minlength=images.num_classes).tolist()
        (store / runs.SAMPLES).write_bytes(_samples(store / names[0], images))
        return runs.update_manifest(
            store,
            runs.Facts(
                status="done",
                images=total,
                counts={str(label): count for label, count in enumerate(counts)},
                canonical=_outcome([store / name for name in names]),
                shards=dict(zip(names, hashes, strict=True)),
                elapsed_s=round(time.monotonic() - started, 3),
            ),
        )


def check(config: Canonical) -> data.Images:
    """The data, where the teacher can make canonical samples of it as `config` says and its judge
    knows it; `ConfigError` otherwise. Reads the teacher's card and the judge, not the teacher.
    """
    if config.teacher is None:
        raise ConfigError(
            "teacher is not set; make one with `dra teacher train` and pass --set teacher=URI"
        )
    with torch.device("meta"):
        net = checkpoint.build(checkpoint.read_card(Store(config.teacher)), config.teacher)
    canonical.check(net, config, config.teacher)
    images = data.load(config.data)
    shape = images.shape
    ours = (shape.num_classes, shape.channels, shape.resolution)
    theirs = (net.num_classes, net.channels, net.resolution)
    if ours != theirs:
        raise ConfigError(
            f"teacher='{config.teacher}' knows {theirs[0]} classes of images {theirs[1:]}, but "
            f"data.name='{config.data.name}' has {ours[0]} of {ours[1:]} (channels, pixels a "
            "side); give a teacher of this data"
        )
    if config.judge is not None:
        _, experiment = student_checkpoint.load(Store(config.judge))
        judged = data.outline(experiment.data).shape
        if (judged.num_classes, judged.channels, judged.resolution) != ours:
            raise ConfigError(
                f"judge='{config.judge}' was trained on other classes or sizes than "
                f"data.name='{config.data.name}'; give a run on this data"
            )
    return images


def _resolved(config: Canonical) -> Canonical:
    """With absolute URIs, since tasks run elsewhere."""
    uris = {"teacher": config.teacher, "judge": config.judge, "data.uri": config.data.uri}
    return override(
        config, {field: Store(uri).resolved().uri for field, uri in uris.items() if uri}
    )


def _digest(config: Canonical, teacher_digest: str) -> str:
    """What the bytes depend on is the teacher and the judge themselves, not where they lie."""
    tree = config.model_dump(mode="json") | {"teacher": teacher_digest}
    for field in ("workers", "cpus_per_worker", "gpus_per_worker"):
        del tree[field]
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "uri"}
    if config.judge is not None:
        tree["judge"] = sha256((Store(config.judge) / student_checkpoint.WEIGHTS).read_bytes())
    return digest_of(tree)


# -- a shard ---------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def _parts(settings: str) -> tuple[data.Images, Tensor, Network, Student | None]:
    """What every shard of a set needs; a worker keeps it from one to the next."""
    config = Canonical.model_validate_json(settings)
    assert config.teacher
    device = "cuda" if config.gpus_per_worker else "cpu"
    images = data.load(config.data)
    order = sets.chosen(images.train.labels, config.share, config.seed)
    judge = student_checkpoint.load(Store(config.judge))[0].to(device) if config.judge else None
    return images, order, checkpoint.load(Store(config.teacher)).to(device), judge


def _make(settings: Mapping[str, Any], store_uri: str, index: int) -> str:
    """Ray task: make shard `index` unless it is there and whole; its SHA-256."""
    tasks.prepare()
    config = Canonical.model_validate(settings)
    images, order, net, judge = _parts(config.model_dump_json())
    file = Store(store_uri) / sets.shard_name(index)
    mine = order[index * config.shard_images : (index + 1) * config.shard_images]
    if not _is_whole(file, mine, images.train.labels[mine]):
        parts = []
        for start in range(0, len(mine), config.batch):
            rows = mine[start : start + config.batch]
            parts.append(_batch(config, images, net, judge, rows))
        file.write_npz(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    return sha256(file.read_bytes())


def _batch(
    config: Canonical,
    images: data.Images,
    net: Network,
    judge: Student | None,
    positions: Tensor,
) -> dict[str, np.ndarray]:
    """The arrays of a shard for training images at `positions` int64 [n]; of a short batch the last
    image is repeated, and the repetitions cut off again.
    """
    count = len(positions)
    filled = torch.cat([positions, positions[-1:].expand(config.batch - count)])
    pixels, labels = images.train.take(filled)
    seeds = [random.derive(config.seed, random.Stream.CANONICAL, int(at)) for at in filled]
    made = canonical.canonicals(net, config, pixels, labels, seeds)
    judged = torch.full((count,), WITHOUT_JUDGE)
    if judge is not None:
        judged = _judged(judge, made.images)[:count]
    return {
        "image": made.images[:count].permute(0, 2, 3, 1).contiguous().numpy(),
        "label": labels[:count].numpy(),
        "index": positions.numpy(),
        "feature": made.features[:count].numpy(),
        "raw_feature": made.raw_features[:count].numpy(),
        "latent": made.latents[:count].numpy(),
        "count": made.counts[:count].numpy(),
        "gain": made.gains[:count].numpy(),
        "change": made.change[:count].numpy(),
        "judged": judged.numpy(),
    }


@torch.no_grad()
def _judged(judge: Student, images: Tensor) -> Tensor:
    """Classes int64 [B] on the CPU that a student sees in `images` uint8 [B,C,H,W]."""
    device = next(judge.parameters()).device
    seen: Tensor = judge.eval()(data.to_float(images.to(device))).argmax(1)
    return seen.cpu()


def _is_whole(file: Store, positions: Tensor, labels: Tensor) -> bool:
    """The file holds all arrays of these images."""
    try:
        arrays = file.read_npz()
    except (DataError, StorageError):
        return False
    keys = {"image", "label", "index", "feature", "raw_feature", "latent"}
    keys |= {"count", "gain", "change", "judged"}
    return (
        arrays.keys() == keys
        and np.array_equal(arrays["index"], positions.numpy())
        and np.array_equal(arrays["label"], labels.numpy())
        and all(len(array) == len(positions) for array in arrays.values())
    )


# -- what became of it -----------------------------------------------------------------------------
def _outcome(files: list[Store]) -> dict[str, JsonValue]:
    """Of the whole set: directions taken out, how far subspace iteration was from its end, and the
    share that the judge takes for their class.
    """
    counts, changes, judged = [], [], []
    for file in files:
        arrays = file.read_npz()
        counts.append(arrays["count"])
        changes.append(arrays["change"])
        judged.append((arrays["judged"] == arrays["label"])[arrays["judged"] != WITHOUT_JUDGE])
    taken, last, good = (np.concatenate(each) for each in (counts, changes, judged))
    outcome: dict[str, JsonValue] = {
        "directions_mean": round(float(taken.mean()), 3),
        "change_max": float(last.max()),
    }
    if len(good):
        outcome["accepted"] = round(float(good.mean()), 5)
    return outcome


def _samples(first: Store, images: data.Images) -> bytes:
    """PNG: of the first classes a few originals, each with its canonical sample below it."""
    arrays = first.read_npz()
    classes = min(images.num_classes, SHEET_CLASSES, len(arrays["label"]))
    count = len(arrays["label"]) // classes * classes
    shown = min(SHEET_PAIRS, count // classes) * classes
    made = torch.from_numpy(arrays["image"][:shown]).permute(0, 3, 1, 2)
    originals, _ = images.train.take(torch.from_numpy(arrays["index"][:shown]))
    rows = [
        row
        for start in range(0, shown, classes)
        for row in (originals[start : start + classes], made[start : start + classes])
    ]
    return sheet(torch.cat(rows), columns=classes)
