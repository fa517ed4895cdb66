"""Sets of others as sources of a set in rows, and the order in which their images are written."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dra_ray import config
from dra_ray.data import folders
from dra_ray.data.pictures import Pictures
from dra_ray.data.random import Stream, derive, generator
from dra_ray.errors import DataError
from dra_ray.storage import Store, StoredArray, combined, is_clutter

STAGED = "staged"  # folder of what was inflated
MOST_CLASSES = 100_000
# of neighbours in one file of a source: which, and the CRC-32 of their bytes there
CHECKS = np.dtype(
    [("part", "i4"), ("first", "i8"), ("images", "i8"), ("image", "u4"), ("label", "u4")]
)


class Source(Protocol):
    """N labelled images at positions 0 to N - 1."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        ...

    def __len__(self) -> int: ...

    def read(self, runs: list[range]) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n,H,W,C] and labels int64 [n] at the positions of `runs`, which ascend, one
        after another.
        """
        ...

    def checksums(self, runs: list[range], images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """CHECKS of what `read` gave for `runs`, from the images and labels that were written."""
        ...

    def problem(self, checks: np.ndarray, counts: np.ndarray) -> str | None:
        """What shows that all that was written, its checksums in any order and its images by class
        [K], is not the source; None where it is.
        """
        ...


def check(settings: config.Conversion) -> None:
    """Raise what `open_source` raises of a source that is not there or of no known form; reads
    names and, of an `.npz` file, headers.
    """
    if files := _npz_files(settings):
        files[0].npz_arrays()


def _npz_files(settings: config.Conversion) -> list[Store]:
    store = Store(settings.source).resolved()
    if store.uri.endswith(".npz"):
        return [store]
    names = store.names()
    files = [store / name for name in names if name.endswith(".npz") and not is_clutter(name)]
    if not files and not names:
        raise DataError(f"source='{store}' is no folder, or it is empty; check the URI")
    if not files and settings.resolution is None:
        raise DataError(
            f"source='{store}' holds no .npz files; of images in files or tar shards say "
            "--resolution, to how many pixels a side they are brought"
        )
    return files


def open_source(settings: config.Conversion, staged: Store) -> Source:
    """What `settings.source` holds: one `.npz` file, a folder of them, or class folders or tar
    shards with images to decode. Compressed `.npz` files are inflated into `staged` first.

    Raises `DataError` where it is none of these, or its parts do not fit each other.
    """
    store = Store(settings.source).resolved()
    if files := _npz_files(settings):
        return Npz.of(files, staged)
    data = config.Data(name="folder", uri=store.uri, resolution=settings.resolution)
    return Decoded(folders.read(data).train)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """`Source` of images that are decoded when they are read."""

    pictures: Pictures

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pictures.picture_shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, runs: list[range]) -> tuple[np.ndarray, np.ndarray]:
        chosen = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        images, labels = self.pictures.take(chosen)
        return images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()

    def checksums(self, runs: list[range], images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """None: storage checks files of images whole, by what it knows of them."""
        return np.empty(0, CHECKS)

    def problem(self, checks: np.ndarray, counts: np.ndarray) -> str | None:
        same = np.array_equal(counts, self.pictures.labels.bincount().numpy())
        return None if same else "it has other images by class"


class Part(NamedTuple):
    """One file of a set: where its images uint8 [n,H,W,C] and labels [n] lie uncompressed."""

    image: StoredArray
    label: StoredArray


@dataclasses.dataclass(frozen=True)
class Npz:
    """`Source` of `.npz` files in DM-AT's layout, one after another, wherever they are; cheap to
    pickle, and never in memory whole.
    """

    parts: list[Part]

    @classmethod
    def of(cls, files: list[Store], staged: Store) -> Npz:
        parts = [_part(file, staged / f"part-{index:05d}") for index, file in enumerate(files)]
        shapes = {part.image.shape[1:]: file for part, file in zip(parts, files, strict=True)}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise DataError(
                f"'{first}' has images {list(one)} and '{second}' {list(other)}; convert them one "
                "by one"
            )
        return cls(parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.parts[0].image.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return sum(len(part) for part in self._ranges())

    def _ranges(self) -> list[range]:
        ends = np.cumsum([part.label.shape[0] for part in self.parts]).tolist()
        return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def read(self, runs: list[range]) -> tuple[np.ndarray, np.ndarray]:
        inside = [
            [
                range(max(run.start, own.start) - own.start, min(run.stop, own.stop) - own.start)
                for run in runs
            ]
            for own in self._ranges()
        ]
        images, labels = (
            _joined([_read(array, own) for array, own in zip(arrays, inside, strict=True)])
            for arrays in zip(*self.parts, strict=True)
        )
        return images, labels.astype(np.int64)

    def checksums(self, runs: list[range], images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        found = []
        begins = np.cumsum([0, *(len(run) for run in runs)]).tolist()
        for number, (part, own) in enumerate(zip(self.parts, self._ranges(), strict=True)):
            for run, begin in zip(runs, begins, strict=False):
                piece = range(max(run.start, own.start), min(run.stop, own.stop))
                if not piece:
                    continue
                at = begin + piece.start - run.start
                rows = slice(at, at + len(piece))
                of_labels = labels[rows].astype(part.label.dtype)
                crcs = (zlib.crc32(images[rows].data), zlib.crc32(of_labels.data))
                found.append((number, piece.start - own.start, len(piece), *crcs))
        return np.array(found, CHECKS)

    def problem(self, checks: np.ndarray, counts: np.ndarray) -> str | None:
        for number, part in enumerate(self.parts):
            own = np.sort(checks[checks["part"] == number], order="first")
            ends = own["first"] + own["images"]
            whole = part.label.shape[0]
            if not np.array_equal(own["first"], [0, *ends[:-1]]) or ends[-1:].tolist() != [whole]:
                return f"images of '{part.image.path}' are missing or there twice"
            for array, name in ((part.image, "image"), (part.label, "label")):
                if not _is_what_was_read(array, own[name], own["images"]):
                    return f"'{array.path}' has another CRC-32 of its {name}s"
        return None


def _is_what_was_read(array: StoredArray, crcs: np.ndarray, images: np.ndarray) -> bool:
    if array.crc32 is None:
        return True
    header = Store(array.path).read_ranges([(array.offset - array.header, array.header)])
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    whole = combined(
        np.concatenate([[zlib.crc32(header.data)], crcs]).astype(np.uint32),
        np.concatenate([[len(header)], images * row_bytes]),
    )
    return whole == array.crc32


def _part(file: Store, staged: Store) -> Part:
    arrays = file.npz_arrays()
    if arrays is None:
        arrays = file.inflate(staged)
    if not {"image", "label"} <= arrays.keys():
        raise DataError(f"'{file}' has keys {sorted(arrays)}; expected 'image' and 'label'")
    image, label = arrays["image"], arrays["label"]
    if (
        image.dtype != np.uint8
        or len(image.shape) != 4
        or label.shape != image.shape[:1]
        or not np.issubdtype(label.dtype, np.integer)
        or not math.prod(image.shape)
    ):
        raise DataError(
            f"'{file}': images {image.dtype} {list(image.shape)} with labels {label.dtype} "
            f"{list(label.shape)} are no images uint8 [N,H,W,C] with a class number each"
        )
    return Part(image, label)


def _read(array: StoredArray, rows: list[range]) -> np.ndarray:
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    ranges = [(array.offset + run.start * row_bytes, len(run) * row_bytes) for run in rows if run]
    content = Store(array.path).read_ranges(ranges) if ranges else np.empty(0, np.uint8)
    return content.view(array.dtype).reshape(-1, *array.shape[1:])


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    filled = [array for array in arrays if len(array)] or arrays[:1]
    return filled[0] if len(filled) == 1 else np.concatenate(filled)


def are_classes(labels: np.ndarray) -> bool:
    return not len(labels) or bool(0 <= labels.min() <= labels.max() < MOST_CLASSES)


def counts(labels: np.ndarray, source: object) -> np.ndarray:
    """Images by class; `DataError` for labels that are no classes."""
    if not are_classes(labels):
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"'{source}' has the label {worst}; classes are numbered from 0 on")
    return np.bincount(labels)


# -- the order -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Order:
    """Which images of a source every shard gets, so that each shard is a sample of the whole.

    The source is cut into blocks of `block` images, which are read at once, and these into strata
    of as many blocks as there are shards. Each shard gets one block of every stratum, by a random
    rotation, and its images in a random order. Of a source in the order of its classes every
    shard so has the classes in their shares, to a block; no list is longer than a shard.
    """

    images: int
    shard_images: int
    block: int
    seed: int

    @property
    def shards(self) -> int:
        """One that would have no block of a source with few is left out."""
        return min(-(-self.images // self.shard_images), self._blocks)

    @property
    def _blocks(self) -> int:
        return -(-self.images // self.block)

    def blocks(self, shard: int) -> list[range]:
        """Positions in the source of a shard's images, ascending."""
        found = []
        for stratum in range(-(-self._blocks // self.shards)):
            place = (shard + derive(self.seed, Stream.CONVERT_BLOCKS, stratum)) % self.shards
            block = stratum * self.shards + place
            if block < self._blocks:
                first = block * self.block
                found.append(range(first, min(first + self.block, self.images)))
        return found

    def shuffled(self, shard: int, count: int) -> np.ndarray:
        """In which order a shard's `count` images are written."""
        drawn = generator(self.seed, Stream.CONVERT_ROWS, shard)
        return torch.randperm(count, generator=drawn).numpy()
