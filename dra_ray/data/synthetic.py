"""Synthetic images: `.npz` files with `image` uint8 [N,H,W,C] and `label` int64 [N], the layout of
DM-AT's sets.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dra_ray.data import Images
from dra_ray.data.pictures import Digest, OnDisk, Pictures, checked_labels, in_memory, picture_bytes
from dra_ray.errors import DataError
from dra_ray.storage import Store, StoredArray

# sets up to this size are held in memory by every training worker; larger ones stay on the node's
# disk and in its page cache
MEMORY_BYTES = 2**30


def read(store: Store, images: int, like: Images) -> Pictures:
    """`images` images of one `.npz` file, or of the folder's, in the order of their names.

    Where neighbouring images mostly share their class, as in DM-AT's files, which are sorted by
    class, the images are taken evenly spaced over the whole set, which keeps its share of every
    class; otherwise, as in the shards of `dra synthesize`, the first ones are taken. The first
    file's labels decide.

    The result is a `Split` up to MEMORY_BYTES. More is read from the files as batches ask for it,
    if they are not compressed (50 million 32x32 images are 154 GB); remote files are then copied to
    the node's disk first (`Store.local_copy`).

    Raises `DataError` when there are fewer, or when shapes or labels do not fit the real images.
    """
    files = (
        [store]
        if store.uri.endswith(".npz")
        else [store / name for name in store.names() if name.endswith(".npz")]
    )
    if not files:
        raise DataError(
            f"synthetic.uri='{store}' holds no .npz shards; make them with `dra synthesize`"
        )
    whole = sum(file.size() for file in files) <= MEMORY_BYTES
    parts: list[_Part] = []
    count, spread = 0, False
    for file in files:
        if count >= images and not spread:
            break
        parts.append(_part(file, whole, like))
        count += len(parts[-1].labels)
        spread = spread or (len(parts) == 1 and _in_class_order(parts[0].labels))
    if count < images:
        raise DataError(
            f"synthetic.images={images}, but '{store}' holds {count}; lower it or make more with "
            "`dra synthesize`"
        )
    records = Arrays([part.name for part in parts], [part.images for part in parts])
    found = OnDisk(records, torch.cat([part.labels for part in parts]), range(count))
    chosen = (
        found[torch.arange(images) * count // images]
        if spread and images < count
        else found[:images]
    )
    return in_memory(chosen) if picture_bytes(chosen) <= MEMORY_BYTES else chosen


def _in_class_order(labels: Tensor) -> bool:
    """Fewer than half of neighbouring images differ in class."""
    return len(labels) > 1 and bool((labels[1:] != labels[:-1]).float().mean() < 0.5)


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
