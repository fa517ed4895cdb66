"""Whether a set in rows is what its index says, and what that is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from dra_ray.data import rows
from dra_ray.data.pictures import checked_labels
from dra_ray.errors import DataError
from dra_ray.runs import SyntheticProgress
from dra_ray.storage import Store, sha256


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was read of a set, all as its index says.

    Attributes:
        prefix_z: of the class whose share in the first tenth of the images is furthest from its
            share in all, how many standard deviations of a random tenth it is off.
    """

    images: int
    shards: int
    bytes: int
    classes: int
    prefix_z: float
    seconds: float

    def as_row(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def check(
    store: Store,
    images: int | None = None,
    progress: Callable[[SyntheticProgress], None] | None = None,
) -> Checked:
    """Read every shard of the set, or those of its first `images`.

    Raises `DataError` naming the first shard that is not what the index says, and `StorageError`
    where it cannot be read.
    """
    index, started = rows.read_index(store), time.monotonic()
    wanted = min(images or index.images, index.images)
    done = size = 0
    parts: list[np.ndarray] = []
    for shard in index.shards:
        if done >= wanted:
            break
        file = store / shard.name
        content = file.read_bytes()
        if sha256(content) != shard.sha256:
            raise DataError(
                f"'{file}' has another SHA-256 than '{store / rows.INDEX}' says; write the set "
                "again"
            )
        found = file.npy_of(content)
        rows.require_listed(file, found, shard, index)
        labels = checked_labels(found["label"], len(found), file, index.num_classes)
        parts.append(np.bincount(labels, minlength=index.num_classes))
        done, size = done + shard.images, size + len(content)
        if progress:
            elapsed_s = round(time.monotonic() - started, 3)
            row = SyntheticProgress(
                images=min(done, wanted), images_total=wanted, elapsed_s=elapsed_s
            )
            progress(row)
    counts = np.stack(parts)
    if done == index.images and counts.sum(0).tolist() != list(index.counts.values()):
        raise DataError(f"'{store}' has other images by class than its index says; write it again")
    return Checked(
        done,
        len(parts),
        size,
        index.num_classes,
        round(prefix_z(counts), 2),
        round(time.monotonic() - started, 2),
    )


def prefix_z(counts: np.ndarray) -> float:
    """For images by shard and class [S,K]: see `Checked.prefix_z`; 0 where a tenth is no shard."""
    first = counts[: max(len(counts) // 10, 1)].sum(0)
    whole = counts.sum(0)
    drawn, total = int(first.sum()), int(whole.sum())
    if drawn == total:
        return 0.0
    shares = whole / total
    deviation = np.sqrt(drawn * shares * (1 - shares) * (total - drawn) / (total - 1))
    present = deviation > 0
    if not present.any():
        return 0.0
    return float((np.abs(first - drawn * shares)[present] / deviation[present]).max())


def described(index: rows.Index) -> dict[str, object]:
    """What an index says, for people."""
    height, width, channels = index.shape
    by_class = list(index.counts.values())
    return {
        "images": index.images,
        "shape": f"{height}x{width}x{channels}",
        "classes": index.num_classes,
        "fewest_of_a_class": min(by_class),
        "most_of_a_class": max(by_class),
        "shards": len(index.shards),
        "pixel_bytes": index.images * index.row_bytes,
        "source": ", ".join(f"{key} {value}" for key, value in index.source.items()),
    }
