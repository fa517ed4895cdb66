"""Synthetic images: `.npz` files with `image` uint8 [N,H,W,C] and `label` int64 [N], the layout of
DM-AT's sets.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dra_ray.data import Images, rows
from dra_ray.data.pictures import (
    Digest,
    OnDisk,
    Pictures,
    checked_labels,
    in_memory,
    picture_bytes,
    require_rows,
)
from dra_ray.errors import DataError
from dra_ray.storage import Store, StoredArray, is_clutter

# sets up to this size are held in memory by every training worker; larger ones stay on the node's
# disk and in its page cache
MEMORY_BYTES = 2**30


def read(store: Store, images: int, like: Images) -> Pictures:
    """`images` images of a set in rows (see `rows`), its first ones, or of one `.npz` file, or of
    the folder's, in the order of their names.

    Of `.npz` files the first ones are taken where they stand for the whole set. Where the set lies
    in the order of its classes, as DM-AT's files do, or the first ones have other shares of the
    classes than the rest, the images are taken evenly spaced over the whole set, and where that
    misses classes too, evenly spaced within every class. All labels decide this, of all files.

    The result is a `Split` up to MEMORY_BYTES. More is read from the files as batches ask for it,
    if they are not compressed (50 million 32x32 images are 154 GB); remote files are then copied to
    the node's disk first (`Store.local_copy`).

    Raises `DataError` when there are fewer, or when shapes or labels do not fit the real images.
    """
    if rows.is_set(store):
        return rows.read(store, images, like.shape, like.name)
    one_file = store.uri.endswith(".npz")
    files = (
        [store]
        if one_file
        else [
            store / name for name in store.names() if name.endswith(".npz") and not is_clutter(name)
        ]
    )
    if not files:
        raise DataError(
            f"synthetic.uri='{store}' holds no index.json and no .npz files; make a set with `dra "
            "synthesize` or `dra data convert`"
        )
    whole = sum(file.size() for file in files) <= MEMORY_BYTES
    parts: list[_Part] = []
    count = 0
    for file in files:
        parts.append(_part(file, whole, like))
        count += len(parts[-1].labels)
    require_rows(count, images, store)
    records = Arrays([part.name for part in parts], [part.images for part in parts])
    everything = OnDisk(records, torch.cat([part.labels for part in parts]), range(count))
    chosen = everything[slice(images) if images == count else choose(everything.labels, images)]
    return in_memory(chosen) if picture_bytes(chosen) <= MEMORY_BYTES else chosen


# -- which images ----------------------------------------------------------------------------------
def choose(labels: Tensor, images: int) -> slice | Tensor:
    """Which `images` of those with `labels` int64 [N] to take, so that they have the classes of all
    in their shares."""
    if not _in_class_order(labels) and _stand_for(labels[:images], labels):
        return slice(images)
    spread = torch.arange(images) * len(labels) // images
    return spread if _stand_for(labels[spread], labels) else _within_classes(labels, images)


def _in_class_order(labels: Tensor) -> bool:
    """Fewer than half as many neighbours differ in class as in a shuffled order."""
    shares = labels.bincount().double() / max(len(labels), 1)
    differing = (
        (labels[1:] != labels[:-1]).double().mean() if len(labels) > 1 else torch.tensor(1.0)
    )
    return bool(differing < (1 - shares.square().sum()) / 2)


def _stand_for(chosen: Tensor, labels: Tensor) -> bool:
    """The classes of `chosen` lie no further from their shares than those of a random choice:
    Pearson's chi-squared is at most six deviations above its mean."""
    classes = int(labels.max()) + 1
    shares = labels.bincount(minlength=classes).double() * len(chosen) / len(labels)
    present, counts = shares > 0, chosen.bincount(minlength=classes).double()
    shares, counts = shares[present], counts[present]
    freedom = len(shares) - 1
    limit = freedom + 6 * (2 * freedom + (1 / shares).sum()).sqrt()
    return bool(((counts - shares).square() / shares).sum() <= limit)


def _within_classes(labels: Tensor, images: int) -> Tensor:
    """Positions int64 [images], ascending: of every class its share, by largest remainders, evenly
    spaced among its own."""
    counts = labels.bincount()
    taken, remainders = counts * images // len(labels), counts * images % len(labels)
    more = remainders.sort(descending=True, stable=True).indices[: images - int(taken.sum())]
    taken[more] += 1
    chosen = []
    for label, number in enumerate(taken.tolist()):
        own = (labels == label).nonzero()[:, 0]
        chosen.append(own[torch.arange(number) * len(own) // max(number, 1)])
    return torch.cat(chosen).sort().values


class _Part(NamedTuple):
    name: str
    images: np.ndarray | StoredArray
    labels: Tensor


def _part(file: Store, whole: bool, like: Images) -> _Part:
    """One file, its images left on disk where that is possible; a remote one is read at once if
    `whole`, else copied to the disk.
    """
    stored = None if whole and not file.is_local else file.local_copy().npz_arrays()
    arrays = file.read_npz() if stored is None else stored
    if not {"image", "label"} <= arrays.keys():
        raise DataError(f"'{file}' has keys {sorted(arrays)}; expected 'image' and 'label'")
    image, label = arrays["image"], arrays["label"]
    wanted = (like.resolution, like.resolution, like.channels)
    if (
        np.dtype(image.dtype) != np.uint8
        or image.shape[1:] != wanted
        or label.shape != image.shape[:1]
    ):
        raise DataError(
            f"'{file}': images {np.dtype(image.dtype)} {image.shape} with labels {label.shape} do "
            f"not fit '{like.name}' (uint8 {wanted}); "
            "check synthetic.uri"
        )
    numbers = label.read() if isinstance(label, StoredArray) else label
    return _Part(file.name, image, checked_labels(numbers, len(numbers), file, like.num_classes))


@dataclasses.dataclass(frozen=True)
class Arrays:
    """`Records` of arrays uint8 [n,H,W,C], one after another; `names` are those of their files."""

    names: list[str]
    arrays: list[np.ndarray | StoredArray]

    @property
    def picture_shape(self) -> tuple[int, ...]:
        height, width, channels = self.arrays[0].shape[1:]
        return channels, height, width

    def read(self, positions: list[int]) -> Tensor:
        wanted, (channels, height, width) = np.array(positions, dtype=np.int64), self.picture_shape
        made = np.empty((len(positions), height, width, channels), np.uint8)
        start = 0
        for array in self.arrays:
            inside = (wanted >= start) & (wanted < start + array.shape[0])
            if inside.any():
                pixels = array.map() if isinstance(array, StoredArray) else array
                made[inside] = pixels[wanted[inside] - start]
            start += array.shape[0]
        return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()

    def hash_into(self, digest: Digest) -> None:
        for name, array in zip(self.names, self.arrays, strict=True):
            digest.update(f"{name} {array.shape}\n".encode())
