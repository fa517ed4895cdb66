"""Sample a class-balanced image set from a teacher, one Ray task per shard.

Image i has class i % K and is made from seed + i in a fixed batch, whoever makes it; so the shards
are the same to the byte for any number of workers, and a job that was killed goes on where it
stopped. With `select`, the images so made are candidates, in a folder of their own with their
scores; the set is what is kept of them, class by class.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import torch
from pydantic import JsonValue
from torch import Tensor

from dra_ray import cluster, data, runs
from dra_ray.config import Synthesis
from dra_ray.data import rows
from dra_ray.errors import ConfigError, DataError, StorageError
from dra_ray.runs import SyntheticProgress
from dra_ray.storage import Lease, Store, sha256
from dra_ray.students import Student
from dra_ray.students import checkpoint as student_checkpoint
from dra_ray.teachers import checkpoint
from dra_ray.teachers.network import Network, image_sampler
from dra_ray.teachers.sheet import sheet
from dra_ray.workloads import tasks

log = logging.getLogger("dra_ray")
SHEET_CLASSES, SHEET_ROWS = 10, 8
CANDIDATES = "candidates"  # folder of the images to select from


def run(
    config: Synthesis,
    store: Store,
    progress: Callable[[SyntheticProgress], None] | None = None,
) -> runs.Manifest:
    """Write `config.images` images to `store` as a set in rows and return its manifest; what is
    there already is kept. A set of fewer images of the same config grows: its shards stay.

    Ray must have been initialised. `progress` gets a row after every shard. Raises `ConfigError`
    when `store` holds another set or the teacher makes no labelled images, `RunError` when a shard
    cannot be made.
    """
    check(config)
    assert config.teacher
    store, teacher = store.resolved(), Store(config.teacher).resolved()
    net = checkpoint.load(teacher)
    teacher_digest = checkpoint.digest(teacher)
    if config.select:
        config = config.model_copy(
            update={
                "select": config.select.model_copy(
                    update={"run": Store(config.select.run).resolved().uri}
                )
            }
        )
    digest = _digest(config, teacher_digest, net)
    described = config.model_dump(mode="json") | {"teacher_digest": teacher_digest}
    facts = runs.Facts(teacher_digest=teacher_digest)
    _grow(config, store, described, digest, teacher_digest, net)
    need, what = (1, config.cpus_per_worker, config.gpus_per_worker), f"synthesis '{store.name}'"
    manifest = runs.begin_run(
        store, "synthetic", described, digest, facts, lambda: cluster.require(*need, what)
    )
    if manifest.is_done:
        return manifest
    with Lease(store):
        log.info("waiting for the first shard of images")
        started = time.monotonic()
        parts = _parts(config, store, net.num_classes)
        made = _make_all(config, store, teacher, parts, started, progress)
        shards = [shard for shard, _ in made]
        if config.select:
            scores = [scores for _, scores in made if scores is not None]
            shards = _keep(config, store, net.num_classes, np.concatenate(scores))
        counts = np.bincount(np.arange(config.images) % net.num_classes, minlength=net.num_classes)
        shape = (net.resolution, net.resolution, net.channels)
        sampler = _sampler(config, net)
        source: dict[str, JsonValue] = {"teacher_digest": teacher_digest, "sampler": sampler}
        rows.write_index(store, shards, shape, counts, source)
        (store / runs.SAMPLES).write_bytes(_samples(store, net.num_classes))
        return runs.update_manifest(
            store,
            runs.Facts(
                status="done",
                images=config.images,
                counts={str(label): int(count) for label, count in enumerate(counts)},
                sampler=sampler,
                shards={shard.name: shard.sha256 for shard in shards},
                elapsed_s=round(time.monotonic() - started, 3),
            ),
        )


def check(config: Synthesis) -> None:
    """`ConfigError` unless its teacher makes images with labels, as `config` says; reads the
    teacher's card alone.
    """
    if config.teacher is None:
        raise ConfigError(
            "teacher is not set; make one with `dra teacher train` and pass --set teacher=URI"
        )
    with torch.device("meta"):
        net = checkpoint.build(checkpoint.read_card(Store(config.teacher)), config.teacher)
    sampler = image_sampler(net, str(config.teacher))
    if not net.num_classes:
        raise ConfigError(
            f"teacher='{config.teacher}' knows no classes; images need labels, so train it with "
            "classes"
        )
    sampler.check_sampling(config)


def _digest(config: Synthesis, teacher_digest: str, net: Network) -> str:
    """What the bytes depend on is the teacher and the judge themselves, not where they lie."""
    found = config.model_copy(update={"teacher": teacher_digest})
    if config.select:
        _, experiment = student_checkpoint.load(Store(config.select.run))
        shape = data.outline(experiment.data).shape
        if (shape.num_classes, shape.channels, shape.resolution) != (
            net.num_classes,
            net.channels,
            net.resolution,
        ):
            raise ConfigError(
                f"select.run='{config.select.run}' was trained on other classes or sizes than the "
                "teacher; give a run on its data"
            )
        weights = sha256((Store(config.select.run) / student_checkpoint.WEIGHTS).read_bytes())
        found = found.model_copy(
            update={"select": config.select.model_copy(update={"run": weights})}
        )
    return found.digest()


def _grow(
    config: Synthesis,
    store: Store,
    described: Mapping[str, Any],
    digest: str,
    teacher_digest: str,
    net: Network,
) -> None:
    """Let a set that differs in having fewer images alone go on. What is kept of candidates depends
    on all of them, so that a set with `select` does not grow.
    """
    manifest = runs.read_manifest(store)
    if manifest is None or manifest.kind != "synthetic" or config.select:
        return
    there = manifest.config.get("images")
    if isinstance(there, int) and there < config.images:
        smaller = config.model_copy(update={"images": there})
        if manifest.digest == _digest(smaller, teacher_digest, net):
            runs.adopt(store, described, digest)


def _parts(config: Synthesis, store: Store, num_classes: int) -> list[range]:
    """Which images every shard has: those of a set that grows, and then up to the next multiple of
    `shard_images` each.
    """
    total, parts = _made(config, num_classes), list[range]()
    if not config.select and (store / rows.INDEX).exists():
        for shard in rows.read_index(store).shards:
            begin = parts[-1].stop if parts else 0
            parts.append(range(begin, begin + shard.images))
    while (begin := parts[-1].stop if parts else 0) < total:
        end = (begin // config.shard_images + 1) * config.shard_images
        parts.append(range(begin, min(end, total)))
    return parts


def _made(config: Synthesis, num_classes: int) -> int:
    """How many images are sampled: the set's, or with `select` enough candidates of every class."""
    if config.select is None:
        return config.images
    return num_classes * math.ceil(math.ceil(config.images / num_classes) / config.select.keep)


def _sampler(config: Synthesis, net: Network) -> dict[str, Any]:
    facts = image_sampler(net, str(config.teacher)).sampler_facts(config)
    return facts | config.model_dump(mode="json", include={"batch", "seed"})


Made = tuple[rows.Shard, np.ndarray | None]  # a shard, and its images' scores


def _make_all(
    config: Synthesis,
    store: Store,
    teacher: Store,
    parts: list[range],
    started: float,
    progress: Callable[[SyntheticProgress], None] | None,
) -> list[Made]:
    """Every shard; at most `config.workers` are being made at the same time."""
    settings = config.model_dump(mode="json")
    task = ray.remote(_make).options(
        num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_retries=3
    )
    return tasks.in_order(
        len(parts),
        lambda index: task.remote(settings, store.uri, teacher.uri, index, parts[index]),
        config.workers,
        f"synthesis '{store.name}'",
        store,
        tasks.told(progress, config.shard_images, parts[-1].stop, started),
    )


def _make(
    settings: dict[str, Any], store_uri: str, teacher_uri: str, index: int, part: range
) -> Made:
    """Ray task: make shard `index`, of the images `part`, unless it is there and whole."""
    tasks.prepare()
    config = Synthesis(**settings)
    folder = Store(store_uri) / CANDIDATES if config.select else Store(store_uri)
    file = folder / rows.shard_name(index)
    net = checkpoint.load(Store(teacher_uri))
    numbers = np.arange(part.start, part.stop)
    wanted = {"label": numbers % net.num_classes, "seed": numbers + config.seed}
    picture = (net.resolution, net.resolution, net.channels)
    if not _is_whole(file, wanted, picture, scored=bool(config.select)):
        device = "cuda" if config.gpus_per_worker else "cpu"
        judge = (
            student_checkpoint.load(Store(config.select.run))[0].to(device)
            if config.select
            else None
        )
        file.write_npy(rows.records(**_sample(config, net.to(device), judge, part), **wanted))
    scores = file.read_npy()["score"] if config.select else None
    return _described(file, len(part)), scores


def _described(file: Store, images: int) -> rows.Shard:
    return rows.Shard(name=file.name, images=images, sha256=sha256(file.read_bytes()))


def _sample(
    config: Synthesis, net: Network, judge: Student | None, part: range
) -> dict[str, np.ndarray]:
    """`image` uint8 [n,H,W,C] of the images `part`, and `score` float32 [n] if there is a judge.

    Batches begin at multiples of their size, and are made in full and cut, so that no image depends
    on how many there are.
    """
    images, scores = [], []
    sampler = image_sampler(net, str(config.teacher))
    before = part.start % config.batch
    chosen = slice(before, before + len(part))
    for start in range(part.start - before, part.stop, config.batch):
        numbers = range(start, start + config.batch)
        labels = torch.tensor([number % net.num_classes for number in numbers])
        seeds = [config.seed + number for number in numbers]
        images.append(sampler.sample_images(config, seeds, labels))
        if judge:
            scores.append(confidence(judge, images[-1], labels))
    made = {"image": torch.cat(images)[chosen].permute(0, 2, 3, 1).contiguous().numpy()}
    return made | ({"score": torch.cat(scores)[chosen].numpy()} if judge else {})


@torch.no_grad()
def confidence(judge: Student, images: Tensor, labels: Tensor) -> Tensor:
    """Softmax of the own class, float32 [B] on the CPU, for `images` uint8 [B,C,H,W]."""
    device = next(judge.parameters()).device
    return judge(data.to_float(images.to(device))).softmax(1).cpu().gather(1, labels[:, None])[:, 0]


# -- selection -------------------------------------------------------------------------------------
def best(scores: np.ndarray, num_classes: int, images: int) -> np.ndarray:
    """Positions int64 [images] of the candidates that are kept, given `scores` [N] of candidates
    whose classes are i % K.

    Of every class those with the highest scores (of equal ones the first), in the candidates'
    order; classes alternate again.
    """
    positions = np.empty(images, dtype=np.int64)
    for label in range(min(num_classes, images)):
        own = np.arange(label, len(scores), num_classes)
        wanted = len(range(label, images, num_classes))
        positions[label::num_classes] = own[
            np.sort(np.argsort(-scores[own], kind="stable")[:wanted])
        ]
    return positions


def _keep(
    config: Synthesis, store: Store, num_classes: int, scores: np.ndarray
) -> list[rows.Shard]:
    """Write the set from the candidates."""
    kept, shards = best(scores, num_classes, config.images), []
    read = functools.lru_cache(maxsize=16)(
        lambda index: (store / CANDIDATES / rows.shard_name(index)).read_npy()["image"]
    )
    for start in range(0, config.images, config.shard_images):
        mine, file = (
            kept[start : start + config.shard_images],
            store / rows.shard_name(start // config.shard_images),
        )
        wanted = {"label": mine % num_classes, "seed": mine + config.seed, "score": scores[mine]}
        picture = read(int(mine[0]) // config.shard_images).shape[1:]
        if not _is_whole(file, wanted, picture):
            image = np.stack(
                [read(int(at) // config.shard_images)[at % config.shard_images] for at in mine]
            )
            file.write_npy(rows.records(image, **wanted))
        shards.append(_described(file, len(mine)))
    return shards


def _is_whole(
    file: Store, wanted: dict[str, np.ndarray], picture: tuple[int, ...], scored: bool = False
) -> bool:
    """The file holds `wanted` and as many images [H,W,C] of shape `picture`, and if `scored` a
    score for each.
    """
    try:
        found = file.read_npy()
        rows.require_shard(file, found, picture)
    except (DataError, StorageError):
        return False
    names = {"image", *wanted} | ({"score"} if scored else set())
    return set(found.dtype.names or ()) == names and all(
        np.array_equal(found[name], value) for name, value in wanted.items()
    )


def _samples(store: Store, num_classes: int) -> bytes:
    """PNG of the first 8 images of each of the first classes, a column each."""
    classes = min(num_classes, SHEET_CLASSES)
    found = (store / rows.shard_name(0)).read_npy()
    shown = found["image"][found["label"] < classes][: SHEET_ROWS * classes]
    return sheet(torch.from_numpy(shown).permute(0, 3, 1, 2), columns=classes)
