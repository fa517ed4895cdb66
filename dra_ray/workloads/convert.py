"""Write a set of others in rows (see `data.rows`), one Ray task per shard.

A shard is a pure function of the source and the config, and is there whole or not at all: a
conversion that was killed goes on where it stopped. The set is there once its index is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import ray

from dra_ray import cluster, runs
from dra_ray.config import Conversion
from dra_ray.config.conversion import SHARD_BYTES
from dra_ray.data import conversion, rows
from dra_ray.errors import DataError, StorageError
from dra_ray.runs import SyntheticProgress
from dra_ray.storage import Lease, Store, sha256
from dra_ray.workloads import tasks


class Made(NamedTuple):
    shard: rows.Shard
    counts: np.ndarray  # images by class


def run(
    config: Conversion,
    store: Store,
    progress: Callable[[SyntheticProgress], None] | None = None,
) -> runs.Manifest:
    """Write `config.source` to `store` and return the manifest; what is there already is kept.

    Ray must have been initialised. `progress` gets a row after every shard. Raises what
    `conversion.open_source` raises, `ConfigError` when `store` holds another set, `RunError` when a
    shard cannot be written, and `DataError` when what was written is not what was read.
    """
    store = store.resolved()
    config = config.model_copy(update={"source": Store(config.source).resolved().uri})
    what, need = f"conversion '{store.name}'", (1, config.cpus_per_worker, 0.0)
    manifest = runs.begin_run(
        store,
        "synthetic",
        config.model_dump(mode="json"),
        config.digest(),
        None,
        lambda: cluster.require(*need, what),
    )
    if manifest.is_done:
        return manifest
    with Lease(store):
        started = time.monotonic()
        source = conversion.open_source(config, store / conversion.STAGED)
        order = order_of(config, source)
        made = _make_all(config, store, source, order, started, progress)
        counts = _verified(store, source, made)
        index = rows.write_index(
            store,
            [each.shard for each in made],
            source.shape,
            counts,
            {"converted_from": config.source, "seed": config.seed, "order": "shuffled"},
        )
        (store / conversion.STAGED).remove()
        return runs.update_manifest(
            store,
            runs.Facts(
                status="done",
                images=index.images,
                counts=index.counts,
                shards={shard.name: shard.sha256 for shard in index.shards},
                elapsed_s=round(time.monotonic() - started, 3),
            ),
        )


def order_of(config: Conversion, source: conversion.Source) -> conversion.Order:
    shard_images = config.shard_images or max(SHARD_BYTES // int(np.prod(source.shape)), 1)
    # a block that is of one class moves its share in a shard by no more than chance does
    block = config.block_images or min(16, max(math.isqrt(shard_images) // 4, 1))
    return conversion.Order(len(source), shard_images, block, config.seed)


def _make_all(
    config: Conversion,
    store: Store,
    source: conversion.Source,
    order: conversion.Order,
    started: float,
    progress: Callable[[SyntheticProgress], None] | None,
) -> list[Made]:
    task = ray.remote(_make).options(num_cpus=config.cpus_per_worker, max_retries=3)
    shared = ray.put(source)
    return tasks.in_order(
        order.shards,
        lambda index: task.remote(store.uri, shared, order, index),
        config.workers,
        f"conversion '{store.name}'",
        store,
        tasks.told(progress, order.shard_images, len(source), started),
    )


def _make(store_uri: str, source: conversion.Source, order: conversion.Order, index: int) -> Made:
    """Ray task: write shard `index`, or take the one that is there; what it is said to hold is
    what is read back.
    """
    file = Store(store_uri) / rows.shard_name(index)
    blocks = order.blocks(index)
    count = sum(map(len, blocks))
    if not _is_whole(file, count, source):
        images, labels = source.read(blocks)
        conversion.counts(labels, file)
        chosen = order.shuffled(index, count)
        file.write_npy(rows.records(images[chosen], labels[chosen]))
    written = file.read_npy()
    shard = rows.Shard(name=file.name, images=len(written), sha256=sha256(file.read_bytes()))
    return Made(shard, conversion.counts(written["label"], file))


def _is_whole(file: Store, count: int, source: conversion.Source) -> bool:
    try:
        found = file.read_npy()
        rows.require_shard(file, found, source.shape)
    except (DataError, StorageError):
        return False
    return len(found) == count


def _verified(store: Store, source: conversion.Source, made: list[Made]) -> np.ndarray:
    """Images by class of all shards, int64 [K]; `DataError` unless they are the source's."""
    counts = np.zeros(max(len(each.counts) for each in made), np.int64)
    for each in made:
        counts[: len(each.counts)] += each.counts
    of_source = np.zeros_like(counts)
    for labels in source.labels():
        part = conversion.counts(labels, "the source")
        of_source = np.pad(of_source, (0, max(len(part) - len(of_source), 0)))
        of_source[: len(part)] += part
    if not np.array_equal(counts, of_source):
        raise DataError(
            f"'{store}' holds {counts.sum():,} images and its source {of_source.sum():,}, or other "
            "classes; the source or a shard changed meanwhile: delete the folder and convert again"
        )
    return counts
