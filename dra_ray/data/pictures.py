"""Labelled images behind one protocol: decoded in memory, or read from files when a batch asks for
them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dra_ray.config.data_sets import DATA_SETS
from dra_ray.errors import DataError

CHUNK = 4096  # images read at once where all are wanted


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a network must fit: classes, channels, pixels a side, and per-channel mean and deviation
    in [0,1] units.
    """

    num_classes: int
    channels: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# official sets: shape, and the sizes of their training and test parts
OFFICIAL: dict[str, tuple[Shape, int, int]] = {
    name: (
        Shape(given.num_classes, given.channels, given.resolution, given.mean, given.std),
        given.train,
        given.test,
    )
    for name, given in ((name, known.official) for name, known in DATA_SETS.items())
    if given is not None
}


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: Any, /) -> None: ...


class Pictures(Protocol):
    """N labelled images."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image."""
        ...

    @property
    def hashed(self) -> str:
        """What `hash_into` covers."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor) -> Pictures: ...

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """images uint8 [b,C,H,W] and labels int64 [b] at `indices` int64 [b], on the CPU. Safe to
        call from several threads.
        """
        ...

    def fetch(self, shards: Sequence[int]) -> None:
        """Bring near, in the background, what lies in shards with these numbers."""
        ...

    def close(self) -> None:
        """Let go of what `take` and `fetch` hold."""
        ...

    def hash_into(self, digest: Digest) -> None: ...


class InHand:
    """Of `Pictures` that hold nothing beyond themselves."""

    def fetch(self, shards: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Split(InHand):
    """`Pictures` in memory: images uint8 [N,C,H,W], labels int64 [N]."""

    images: Tensor
    labels: Tensor
    hashed = "pixels and labels"

    @property
    def picture_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Split:
        return Split(self.images[index], self.labels[index])

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def hash_into(self, digest: Digest) -> None:
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)


class Records(Protocol):
    """Images in files, by position; holds no open file, so that it can be sent to other
    processes.
    """

    @property
    def picture_shape(self) -> tuple[int, ...]: ...

    def read(self, positions: list[int]) -> Tensor:
        """uint8 [b,C,H,W]; raises `DataError` naming the file that cannot be decoded. Safe to call
        from several threads.
        """
        ...

    def hash_into(self, digest: Digest) -> None:
        """Names and sizes of the files."""
        ...


@dataclasses.dataclass(frozen=True)
class OnDisk(InHand):
    """`Pictures` read when they are asked for: image i is `records` number `positions[i]`, labels
    int64 [N].
    """

    records: Records
    labels: Tensor
    positions: range | Tensor
    hashed = "file names, file sizes and labels"

    @property
    def picture_shape(self) -> tuple[int, ...]:
        return self.records.picture_shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> OnDisk:
        return OnDisk(
            self.records,
            self.labels[index],
            self.positions[index] if isinstance(index, slice) else self._at(index),
        )

    def _at(self, indices: Tensor) -> Tensor:
        if isinstance(self.positions, Tensor):
            return self.positions[indices]
        return self.positions.start + self.positions.step * indices

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.records.read(self._at(indices).tolist()), self.labels[indices]

    def hash_into(self, digest: Digest) -> None:
        self.records.hash_into(digest)
        digest.update(
            str(self.positions).encode()
            if isinstance(self.positions, range)
            else self.positions.contiguous().numpy().data
        )
        digest.update(self.labels.contiguous().numpy().data)


class Parts(NamedTuple):
    """A data set as its reader gives it.

    test: None where it has no official test part, and `train` is all of it.
    num_classes: None where the data set has an official number.
    """

    train: Pictures
    test: Pictures | None = None
    num_classes: int | None = None


def in_memory(pictures: Pictures) -> Split:
    """All of `pictures`, decoded."""
    if isinstance(pictures, Split):
        return pictures
    images = torch.empty((len(pictures), *pictures.picture_shape), dtype=torch.uint8)
    labels = torch.empty(len(pictures), dtype=torch.int64)
    for rows in torch.arange(len(pictures)).split(CHUNK):
        images[rows], labels[rows] = pictures.take(rows)
    return Split(images, labels)


def reduced(pictures: Pictures, resolution: int) -> Split:
    """All of `pictures` at fewer pixels a side: each is the mean over the area that it covers, in
    which a pixel on its edge counts by the part that lies inside, rounded.
    """
    sides = [torch.arange(size + 1) for size in pictures.picture_shape[1:]]
    # edges in units in which an old pixel is `resolution` long and a new one is `size` long: whole
    # numbers, so that sums are exact and halves are halves
    rows, columns = (
        _overlaps(side[: resolution + 1] * (len(side) - 1), side * resolution) for side in sides
    )
    area = math.prod(pictures.picture_shape[1:])
    parts = [
        (rows @ images.double() @ columns.T / area).round_().byte()
        for images in in_memory(pictures).images.split(CHUNK)
    ]
    return Split(torch.cat(parts), pictures.labels)


def _overlaps(new: Tensor, old: Tensor) -> Tensor:
    """Length that every interval between neighbours of `new` shares with every one of `old`,
    float64 [new - 1, old - 1].
    """
    begin = torch.maximum(new[:-1, None], old[None, :-1])
    end = torch.minimum(new[1:, None], old[None, 1:])
    return (end - begin).clamp_min(0).double()


def picture_bytes(pictures: Pictures) -> int:
    """Bytes of all images as uint8."""
    return len(pictures) * math.prod(pictures.picture_shape)


def require_rows(count: int, images: int, source: object) -> None:
    """`DataError` where a synthetic set of `count` images has fewer than `images`."""
    if count < images:
        raise DataError(
            f"synthetic.images={images}, but '{source}' holds {count}; lower it or make more with "
            "`dra synthesize`"
        )


def checked(images: np.ndarray, labels: Any, source: object, shape: Shape) -> Split:
    """A `Split` of images uint8 [N,C,H,W] and N labels; `DataError` naming `source` unless they fit
    each other and `shape`.
    """
    wanted = (shape.channels, shape.resolution, shape.resolution)
    if images.dtype != np.uint8 or images.shape[1:] != wanted:
        raise DataError(
            f"'{source}': images are {images.dtype} {list(images.shape)}, not uint8 with (C, H, W) "
            f"= {wanted}; check data.uri and data.name"
        )
    return Split(
        torch.from_numpy(np.ascontiguousarray(images)),
        checked_labels(labels, len(images), source, shape.num_classes),
    )


def checked_labels(labels: Any, count: int, source: object, num_classes: int) -> Tensor:
    """int64 [count]; `DataError` naming `source` unless there are as many, and all are classes."""
    # numpy would expand lists of lists, which a few bytes of a file can nest into any number of
    # labels
    plain = not isinstance(labels, list) or all(
        isinstance(label, int | float | np.number) for label in labels
    )
    array = np.asarray(labels) if plain else np.empty(len(labels), object)
    if (
        array.ndim != 1
        or len(array) != count
        or not (np.issubdtype(array.dtype, np.integer) or not count)
    ):
        raise DataError(
            f"'{source}': {count} images, but labels are {array.dtype} {list(array.shape)}; every "
            "image needs one class number"
        )
    if count and not (array.min() >= 0 and array.max() < num_classes):
        reach = int(array.min() if array.min() < 0 else array.max())
        raise DataError(
            f"'{source}': labels reach {reach}, but there are {num_classes} classes; check "
            "data.uri and data.name"
        )
    return torch.from_numpy(array.astype(np.int64))
