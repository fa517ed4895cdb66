"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are passed around: the official pickles, npz,
npy or parquet.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dra_ray import storage
from dra_ray.data import decode
from dra_ray.data.pictures import Shape, Split, checked
from dra_ray.errors import DataError
from dra_ray.storage import Store

# of the official archives: their file name, the folder inside, the files of the training part and
# of the test part
ARCHIVES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
    ),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",)),
}
Arrays = Mapping[str, Any]


def read(name: str, uri: str | None, shape: Shape) -> tuple[Split, Split]:
    """(train, test) of what `uri` holds, the first of these that is there:

    the official archive or its unpacked folder (also inside the folder `uri`); one `.npz` with
    `image`, `label`, `test_image` and `test_label`, or a folder with `train.npz` and `test.npz`, or
    with `train_images.npy`, `train_labels.npy`, `test_images.npy` and `test_labels.npy` (images
    uint8 [N,H,W,C] in both); or a folder with `train-*.parquet` and `test-*.parquet` as on Hugging
    Face, also one folder deeper. CIFAR-100's labels are the fine ones.

    Raises `DataError` for anything else, for damaged files, and where images, labels and classes do
    not fit.
    """
    archive, folder = ARCHIVES[name][:2]
    accepted = (
        f"give {archive} (the 'python version' on the data set's home page), its unpacked folder "
        f"{folder}, an .npz, or a folder with train and test "
        "files as .npz, .npy or .parquet"
    )
    if not uri:
        raise DataError(
            f"data.uri is not set, but data.name='{name}' is read from files; {accepted}"
        )
    store = Store(uri)
    if not store.exists():
        raise DataError(f"data.uri='{uri}' does not exist; {accepted}")
    found = _found(name, store)
    if found is None:
        raise DataError(f"data.uri='{uri}' holds no {name}; {accepted}")
    return found("train", shape), found("test", shape)


Reader = Callable[[str, Shape], Split]


def _found(name: str, store: Store) -> Reader | None:
    """How to read a part of what lies at `store`."""
    archive, folder, train, _ = ARCHIVES[name]
    if store.name.endswith((".tar.gz", ".tgz", ".tar")):
        members = _unpacked(name, store)
        return lambda part, shape: _pickled(name, part, members, shape)
    if store.name.endswith(".npz"):
        arrays = store.read_npz()
        return lambda part, shape: _from_npz(
            store, arrays, "test_" if part == "test" else "", shape
        )
    names = set(store.names())
    if (name == "cifar100" and "meta" in names) or (name == "cifar10" and set(train) & names):
        unpacked = _files(name, store)
        return lambda part, shape: _pickled(name, part, unpacked, shape)
    if inside := {archive, folder} & names:
        return _found(name, store / (folder if folder in inside else archive))
    if {"train.npz", "test.npz"} <= names:
        return lambda part, shape: _from_npz(
            store / f"{part}.npz", (store / f"{part}.npz").read_npz(), "", shape
        )
    if {"train_images.npy", "test_images.npy"} <= names:
        return lambda part, shape: _from_npy(store, part, shape)
    for place in (store, *(store / below for below in sorted(names) if "." not in below)):
        parquet = [file for file in place.names() if file.endswith(".parquet")]
        if parquet:
            return lambda part, shape: _from_parquet(
                [place / file for file in parquet if file.startswith(part)],
                f"{place}/{part}",
                shape,
            )
    return None


# -- the official pickles --------------------------------------------------------------------------
def _unpacked(name: str, store: Store) -> dict[str, bytes]:
    """The wanted files of the archive, in memory; nothing is written to disk."""
    wanted = set(ARCHIVES[name][2] + ARCHIVES[name][3])
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(store.read_bytes())) as archive:
            for member in archive:
                base = member.name.rsplit("/", 1)[-1]
                if base in wanted and (content := archive.extractfile(member)):
                    members[base] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"'{store}' is not a whole tar archive ({error}); fetch {ARCHIVES[name][0]} again"
        ) from None
    return {f"{store}/{base}": content for base, content in members.items()}


def _files(name: str, store: Store) -> dict[str, bytes]:
    names = set(store.names())
    return {
        str(store / base): (store / base).read_bytes()
        for base in ARCHIVES[name][2] + ARCHIVES[name][3]
        if base in names
    }


def _pickled(name: str, part: str, members: Mapping[str, bytes], shape: Shape) -> Split:
    """A part of the official archive: one dict per file, with `data` uint8 [n,3072] (channel by
    channel) and its labels.
    """
    by_name = {source.rsplit("/", 1)[-1]: (source, data) for source, data in members.items()}
    wanted = ARCHIVES[name][2] if part == "train" else ARCHIVES[name][3]
    missing = [base for base in wanted if base not in by_name]
    if missing:
        raise DataError(
            f"data.uri lacks {', '.join(missing)} of {name}; unpack or fetch {ARCHIVES[name][0]} "
            "again"
        )
    images, labels = [], []
    for base in wanted:
        source, data = by_name[base]
        batch = storage.unpickle(data, source, STAND_INS)
        key = "fine_labels" if name == "cifar100" else "labels"
        if (
            not isinstance(batch, dict)
            or not isinstance(batch.get("data"), _Array)
            or not isinstance(batch.get(key), list)
        ):
            raise DataError(
                f"'{source}' is not a batch of {name} with 'data' and '{key}'; fetch "
                f"{ARCHIVES[name][0]} again"
            )
        pixels = batch["data"].value
        if (
            pixels.ndim != 2
            or pixels.shape[1] != shape.channels * shape.resolution**2
            or len(pixels) != len(batch[key])
        ):
            raise DataError(
                f"'{source}': data {list(pixels.shape)} with {len(batch[key])} labels is not a "
                f"batch of {name}; fetch it again"
            )
        images.append(pixels.reshape(-1, shape.channels, shape.resolution, shape.resolution))
        labels += batch[key]
    return checked(np.concatenate(images), labels, by_name[wanted[0]][0], shape)


class _Array:
    """A pickled uint8 array. Its bytes are all that is used, so that numpy's own `__setstate__`
    never sees the file.
    """

    def __init__(self, *_: Any) -> None:
        self.value = np.empty((0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state  # of numpy.ndarray.__reduce__
        if not isinstance(dtype, _Dtype) or dtype.code != "u1":
            raise ValueError("an array is not uint8")
        data = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's str
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which one byte has not."""


# all that the official files name, and `_codecs.encode`, by which Python 3 writes bytes in Python
# 2's protocol
STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
}


# -- npz, npy, parquet -----------------------------------------------------------------------------
def _from_npz(source: Store, arrays: Arrays, prefix: str, shape: Shape) -> Split:
    missing = [key for key in (f"{prefix}image", f"{prefix}label") if key not in arrays]
    if missing:
        raise DataError(f"'{source}' has keys {sorted(arrays)}; expected '{missing[0]}' too")
    return _channels_first(arrays[f"{prefix}image"], arrays[f"{prefix}label"], source, shape)


def _from_npy(store: Store, part: str, shape: Shape) -> Split:
    images, labels = store / f"{part}_images.npy", store / f"{part}_labels.npy"
    if not labels.exists():
        raise DataError(f"'{labels}' is missing beside '{images.name}'; add it")
    return _channels_first(images.read_npy(), labels.read_npy(), images, shape)


def _channels_first(images: np.ndarray, labels: np.ndarray, source: Store, shape: Shape) -> Split:
    if images.ndim != 4 or images.shape[3] != shape.channels:
        raise DataError(
            f"'{source}': images are {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, "
            f"{shape.channels}]; transpose them"
        )
    return checked(images.transpose(0, 3, 1, 2), labels, source, shape)


def _from_parquet(files: list[Store], wanted: str, shape: Shape) -> Split:
    if not files:
        raise DataError(
            f"data.uri: there is no {wanted}-*.parquet; add those files of the data set"
        )
    images, labels = [], []
    for file in files:
        encoded, numbers = _columns(file)
        images.append(decode.same_size(encoded, str(file), shape.resolution))
        labels += numbers
    return checked(np.concatenate(images), labels, files[0], shape)


def _columns(file: Store) -> tuple[list[bytes], list[int]]:
    """Encoded images and labels of a Hugging Face parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read_bytes()))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"'{file}' is not a readable parquet file ({str(error).splitlines()[0]}); fetch it "
            "again"
        ) from None
    image = next((column for column in ("img", "image") if column in table.column_names), None)
    label = next(
        (column for column in ("fine_label", "label") if column in table.column_names), None
    )
    if image is None or label is None:
        raise DataError(
            f"'{file}' has columns {table.column_names}; expected img or image, and fine_label or "
            "label"
        )
    rows = [
        row["bytes"] if isinstance(row, dict) else row for row in table.column(image).to_pylist()
    ]
    if not all(isinstance(row, bytes) for row in rows):
        raise DataError(
            f"'{file}': column '{image}' does not hold the bytes of image files; fetch the parquet "
            "files of the data set again"
        )
    return rows, table.column(label).to_pylist()
