"""Sets of labelled images in rows of one size, for any number of images at any URI.

    index.json        how many images, of which shape and classes, from where, and of every shard
                      its images and its SHA-256
    shard-00000.npy   numpy records with the fields "image" uint8 [H,W,C] and "label" int32, and
                      whatever else belongs to an image

Others read a shard by `numpy.load(shard, mmap_mode="r")["image"]`. Images lie in an order in which
the first N stand for the whole set, so a smaller set is the beginning of a larger one.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor

from dra_ray import runs
from dra_ray.data.pictures import Digest, Shape, checked_labels, require_rows
from dra_ray.errors import DataError, StorageError
from dra_ray.storage import Held, Store, StoredArray

INDEX = "index.json"
AT_ONCE = 8  # shards that a process copies to its node at the same time
ROWS_AT_ONCE = 128  # that are brought into order while a processor's cache has them
OPEN = 128  # shards that a process keeps open while nobody says which it will need
INDEX_BYTES = 2**28  # of an index; one of 300 million images has 4 MB


class Shard(runs.Record):
    name: str
    images: int = Field(ge=1)
    sha256: str


class Index(runs.Record):
    """What a set holds; all that a driver reads of it."""

    format: Literal["dra-rows-1"]
    shape: tuple[int, int, int]  # H, W, C
    num_classes: int = Field(ge=1)
    counts: dict[str, int]  # images by class
    shards: list[Shard]
    source: dict[str, JsonValue]  # where the images come from

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """Pixels of an image."""
        return math.prod(self.shape)


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.npy"


def is_set(store: Store) -> bool:
    return not store.uri.endswith(".npz") and (store / INDEX).exists()


def read_index(store: Store) -> Index:
    """`DataError` where there is no index, and for one that is damaged or contradicts itself."""
    file = store / INDEX
    if not file.exists():
        raise DataError(
            f"'{store}' has no {INDEX}, so it is no set in rows; `dra data convert` makes one"
        )
    index = runs.parse(Index, file.read_json(at_most=INDEX_BYTES), f"'{file}'")
    if sum(index.counts.values()) != index.images or min(index.shape) < 1:
        raise DataError(
            f"'{file}' counts {sum(index.counts.values()):,} images by class and {index.images:,} "
            "by shard; write the set again"
        )
    return index


def write_index(
    store: Store,
    shards: Sequence[Shard],
    shape: tuple[int, int, int],
    counts: np.ndarray,
    source: Mapping[str, JsonValue],
) -> Index:
    """The set is there once this is written; `counts` [K] are its images by class."""
    index = Index(
        format="dra-rows-1",
        shape=shape,
        num_classes=len(counts),
        counts={str(label): int(count) for label, count in enumerate(counts)},
        shards=list(shards),
        source=dict(source),
    )
    (store / INDEX).write_json(index.on_disk())
    return index


# -- shards ----------------------------------------------------------------------------------------
def records(
    image: np.ndarray, label: np.ndarray, order: np.ndarray | None = None, **further: np.ndarray
) -> np.ndarray:
    """Rows of `image` uint8 [n,H,W,C], `label` [n] and further columns [n], in this `order` of
    theirs.
    """
    columns = {"image": image, "label": label.astype(np.int32)} | dict(sorted(further.items()))
    kinds = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    rows = np.empty(len(image), dtype=np.dtype(kinds))
    chosen = np.arange(len(image)) if order is None else order
    for begin in range(0, len(image), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        for name, column in columns.items():
            rows[name][part] = column[chosen[part]]
    return rows


def require_shard(file: Store, rows: np.ndarray | StoredArray, shape: Sequence[int]) -> None:
    """`DataError` naming `file` unless its rows are images [H,W,C] of `shape` with labels."""
    fields: Mapping[str, Any] = rows.dtype.fields or {}
    image, label = fields.get("image"), fields.get("label")
    if (
        len(rows.shape) != 1
        or image is None
        or label is None
        or (image[0].base, image[0].shape) != (np.dtype(np.uint8), tuple(shape))
        or not np.issubdtype(label[0], np.integer)
    ):
        raise DataError(
            f"'{file}' holds {rows.dtype} {list(rows.shape)}, not records of image uint8 "
            f"{list(shape)} and label; write the set again"
        )


def require_listed(file: Store, rows: np.ndarray | StoredArray, shard: Shard, index: Index) -> None:
    """`DataError` naming `file` unless its rows are what `index` says of `shard`."""
    require_shard(file, rows, index.shape)
    if rows.shape != (shard.images,):
        raise DataError(
            f"'{file}' holds {rows.shape[0]:,} images, but its index says {shard.images:,}; write "
            "the set again"
        )


# -- reading ---------------------------------------------------------------------------------------
class _Open(NamedTuple):
    held: Held
    rows: StoredArray

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Records at `numbers` int64 [n] of the shard."""
        found = np.empty(len(numbers), self.rows.dtype)
        out = found.view(np.uint8).reshape(len(numbers), -1)
        self.held.read_rows(self.rows.offset, numbers, out)
        return found


class RowSet:
    """`Pictures`: the first `count` images of a set; nothing of a shard is read before a batch
    asks for it.

    Shards that are elsewhere are copied whole to the node's cache, checked by their SHA-256 and
    shared with the other processes of the node; those in use there are held, see `Store.held`.
    """

    hashed = "SHA-256 of the shards"

    def __init__(
        self, store: Store, index: Index, count: int, positions: Tensor | None = None
    ) -> None:
        self.store, self.index, self._positions = store, index, positions
        self._count = count
        sizes = [shard.images for shard in index.shards]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Future[_Open]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._kept = OPEN

    def __getstate__(self) -> dict[str, Any]:
        return {
            "args": (self.store, self.index, self._count, self._positions),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["args"])  # type: ignore[misc]

    @property
    def picture_shape(self) -> tuple[int, ...]:
        height, width, channels = self.index.shape
        return channels, height, width

    @property
    def offsets(self) -> np.ndarray:
        """int64: the first position of every shard that the images lie in, and their end."""
        return np.append(self._first[self._first < self._count], self._count)

    @property
    def labels(self) -> Tensor:
        """int64 [N], read from all shards: for sets that are read whole anyway."""
        return torch.cat(
            [self.take(rows)[1] for rows in torch.arange(len(self)).split(OPEN * 1024)]
        )

    def __len__(self) -> int:
        return self._count if self._positions is None else len(self._positions)

    def __getitem__(self, index: slice | Tensor) -> RowSet:
        positions = torch.arange(self._count) if self._positions is None else self._positions
        return RowSet(self.store, self.index, self._count, positions[index])

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        positions = indices if self._positions is None else self._positions[indices]
        order = positions.argsort(stable=True).numpy()
        ordered = positions.numpy()[order]
        of_shard = np.searchsorted(self._first, ordered, side="right") - 1
        shards, begins = np.unique(of_shard, return_index=True)
        ends = [*begins[1:].tolist(), len(ordered)]
        images = np.empty((len(ordered), *self.index.shape), np.uint8)
        labels = np.empty(len(ordered), np.int64)
        for group in range(0, len(shards), OPEN):  # a process may not open any number of files
            part = slice(group, group + OPEN)
            numbers = shards[part].tolist()
            near = self._near(numbers)
            for number, pending, begin, end in zip(
                numbers, near, begins[part].tolist(), ends[part], strict=True
            ):
                rows = pending.result().read(ordered[begin:end] - self._first[number])
                places = order[begin:end]
                images[places], labels[places] = rows["image"], rows["label"]
        return (
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            checked_labels(labels, len(labels), self.store, self.index.num_classes),
        )

    def fetch(self, shards: Sequence[int]) -> None:
        """Bring near, in the background, the shards with these numbers, and let go of others."""
        self._kept = len(shards)
        self._near(shards)

    def _near(self, shards: Sequence[int]) -> list[Future[_Open]]:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shards")
            near = []
            for shard in shards:
                pending = self._open.get(shard)
                if pending is None or (pending.done() and pending.exception()):
                    pending = self._threads.submit(self._opened, shard)
                self._open[shard] = pending
                self._open.move_to_end(shard)
                near.append(pending)
            while len(self._open) > max(self._kept, len(shards)):
                _, old = self._open.popitem(last=False)
                if not old.cancel():
                    old.add_done_callback(_release)
            return near

    def _opened(self, number: int) -> _Open:
        shard = self.index.shards[number]
        file = self.store / shard.name
        held = file.held(shard.sha256)
        try:
            rows = Store(held.path).npy_array()
            require_listed(file, rows, shard, self.index)
        except (DataError, StorageError):
            held.release()
            raise
        return _Open(held, rows)

    def close(self) -> None:
        """Let go of all shards."""
        with self._lock:
            for pending in self._open.values():
                if not pending.cancel():
                    pending.add_done_callback(_release)
            self._open.clear()
            if self._threads is not None:
                self._threads.shutdown(wait=True, cancel_futures=True)
                self._threads = None

    def hash_into(self, digest: Digest) -> None:
        """The shards that the images lie in stand for them."""
        for shard in self.index.shards[: len(self.offsets) - 1]:
            digest.update(f"{shard.images} {shard.sha256}\n".encode())
        digest.update(str(self._count).encode())
        if self._positions is not None:
            digest.update(self._positions.contiguous().numpy().data)


def _release(pending: Future[_Open]) -> None:
    if not pending.cancelled() and not pending.exception():
        pending.result().held.release()


def read(store: Store, images: int, like: Shape, name: str) -> RowSet:
    """The first `images` images of the set at `store`, for students of `like`'s shape.

    Raises `DataError` where it has fewer, or images of another shape or more classes than the real
    ones of the data set `name`.
    """
    index = read_index(store)
    require_rows(index.images, images, store)
    wanted = (like.resolution, like.resolution, like.channels)
    if index.shape != wanted or index.num_classes > like.num_classes:
        raise DataError(
            f"'{store}': images {list(index.shape)} of {index.num_classes} classes do not fit "
            f"'{name}' ({list(wanted)}, {like.num_classes} classes); check synthetic.uri"
        )
    return RowSet(store, index, images)
