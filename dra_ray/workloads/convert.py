"""Write a set of others in rows (see `data.rows`), one Ray task per shard.

A shard is a pure function of the source and the config, and is there whole or not at all: a
conversion that was killed goes on where it stopped. The set is there once its index is written,
after all that is in the shards was held against the checksums of the source.
"""

from __future__ import annotations

import logging
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
from dra_ray.storage import ATTEMPTS, Lease, Store, sha256
from dra_ray.workloads import tasks

log = logging.getLogger("dra_ray")


class Made(NamedTuple):
    shard: rows.Shard
    counts: np.ndarray  # images by class
    checks: np.ndarray  # `conversion.CHECKS` of what is written


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
    conversion.check(config)
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
        for attempt in range(ATTEMPTS):
            counts = _counts(made)
            problem = source.problem(np.concatenate([each.checks for each in made]), counts)
            if problem is None:
                break
            if attempt == ATTEMPTS - 1:
                raise DataError(
                    f"'{store}' is not what its source holds: {problem}; the source changes, or "
                    "its store gives wrong bytes: delete the folder and convert again"
                )
            log.warning("not what the source holds (%s): it is read again", problem)
            made = _make_all(config, store, source, order, started, None, again=True)
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
    *,
    again: bool = False,
) -> list[Made]:
    task = ray.remote(_make).options(num_cpus=config.cpus_per_worker, max_retries=3)
    shared = ray.put(source)
    return tasks.in_order(
        order.shards,
        lambda index: task.remote(store.uri, shared, order, index, again),
        config.workers,
        f"conversion '{store.name}'",
        store,
        tasks.told(progress, order.shard_images, len(source), started),
    )


def _make(
    store_uri: str, source: conversion.Source, order: conversion.Order, index: int, again: bool
) -> Made:
    """Ray task: write shard `index`, or take the one that is there, if not `again`."""
    file = Store(store_uri) / rows.shard_name(index)
    blocks = order.blocks(index)
    count = sum(map(len, blocks))
    chosen = order.shuffled(index, count)
    before = _there(file, count, source)
    if before is not None:  # in the source's order
        before = before[np.argsort(chosen)]
    if before is None or again:
        images, labels = _read(source, blocks, file, before, twice=again)
        digest = file.write_npy(rows.records(images, labels, chosen))
    else:
        images, labels = before["image"], before["label"].astype(np.int64)
        digest = sha256(file.read_bytes())
    return Made(
        rows.Shard(name=file.name, images=count, sha256=digest),
        conversion.counts(labels, file),
        source.checksums(blocks, np.ascontiguousarray(images), labels),
    )


def _read(
    source: conversion.Source,
    blocks: list[range],
    file: Store,
    before: np.ndarray | None,
    twice: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The source's images and labels at `blocks`.

    If `twice`, or where labels are no classes, two reads or a read and the rows `before` were
    alike: what comes wrong by chance does not come wrong twice in the same way.
    """
    reads = [] if before is None else [(before["image"], before["label"].astype(np.int64))]
    for _ in range(2 * ATTEMPTS):
        images, labels = source.read(blocks)
        if not twice and conversion.are_classes(labels):
            return images, labels
        for earlier in reads:
            if np.array_equal(earlier[0], images) and np.array_equal(earlier[1], labels):
                conversion.counts(labels, file)
                return images, labels
        reads.append((images, labels))
    raise DataError(
        f"'{file}': the same images of the source came {2 * ATTEMPTS} times, each time others; "
        "check the network and its store"
    )


def _there(file: Store, count: int, source: conversion.Source) -> np.ndarray | None:
    """The rows of a shard that is whole."""
    if not file.exists():
        return None
    try:
        found = file.read_npy()
        rows.require_shard(file, found, source.shape)
    except (DataError, StorageError):
        return None
    return found if len(found) == count else None


def _counts(made: list[Made]) -> np.ndarray:
    """Images by class of all shards, int64 [K]."""
    counts = np.zeros(max(len(each.counts) for each in made), np.int64)
    for each in made:
        counts[: len(each.counts)] += each.counts
    return counts
