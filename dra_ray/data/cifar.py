"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are passed around: the official pickles, npz,
npy or parquet.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dra_ray import config, storage
from dra_ray.data import decode
from dra_ray.data.pictures import OFFICIAL, Parts, Shape, Split, checked
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
MOST_BYTES = 2**30  # of any one file and of an unpacked archive; the official ones unpack to 187 MB
ENCODED_BYTES = 2**20  # of an image file inside a parquet file; the official ones have 2 to 3 kB


def read(settings: config.Data) -> Parts:
    """What `settings.uri` holds, the first of these that is there:

    the official archive or its unpacked folder (also inside the folder `uri`); one `.npz` with
    `image`, `label`, `test_image` and `test_label`, or a folder with `train.npz` and `test.npz`, or
    with `train_images.npy`, `train_labels.npy`, `test_images.npy` and `test_labels.npy` (images
    uint8 [N,H,W,C] in both); or a folder with `train-*.parquet` and `test-*.parquet` as on Hugging
    Face, also one folder deeper. CIFAR-100's labels are the fine ones.

    Raises `DataError` for anything else, for damaged files, and where images, labels and classes do
    not fit.
    """
    name, uri, shape = settings.name, settings.uri, OFFICIAL[settings.name][0]
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
    return Parts(found("train", shape), found("test", shape))


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
    """The files of the archive that hold images, in memory; nothing is written to disk."""
    bases, unpacked_bytes, members = set(ARCHIVES[name][2] + ARCHIVES[name][3]), 0, {}
    packed = _small(store)
    try:
        with _decompressed(packed) as stream, storage.open_tar(stream) as archive:
            for member in archive:
                unpacked_bytes += (
                    member.size
                )  # before the next header is looked for, which decompresses this member
                if unpacked_bytes > MOST_BYTES:
                    raise tarfile.ReadError(f"it declares {unpacked_bytes:,} bytes of files")
                storage.require_plausible(str(store), unpacked_bytes, len(packed))
                base = member.name.rsplit("/", 1)[-1]
                if base in bases and member.isfile() and not storage.is_clutter(member.name):
                    members[base] = storage.tar_content(archive, member)
    except DataError:
        raise
    except Exception as error:  # damaged compressed data fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"'{store}' is not a whole tar archive ({reason}); fetch {ARCHIVES[name][0]} again"
        ) from None
    return {f"{store}/{base}": content for base, content in members.items()}


def _decompressed(packed: bytes) -> io.BufferedIOBase:
    """A stream of what gzip, bzip2 or xz packed, told by the first bytes, or of the bytes
    themselves."""
    stream = io.BytesIO(packed)
    if packed.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)
    if packed.startswith(b"BZh"):
        return bz2.BZ2File(stream)
    return lzma.LZMAFile(stream) if packed.startswith(b"\xfd7zXZ") else stream


def _small(file: Store) -> bytes:
    """The bytes of a file of at most MOST_BYTES."""
    file_bytes = file.size()
    if file_bytes > MOST_BYTES:
        raise DataError(
            f"'{file}' has {file_bytes:,} bytes, more than any file of CIFAR; check data.uri"
        )
    return file.read_bytes()


def _files(name: str, store: Store) -> dict[str, bytes]:
    names = set(store.names())
    return {
        str(store / base): _small(store / base)
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
        pixels, numbers = _batch(name, data, source)
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 2
            or pixels.shape[1] != shape.channels * shape.resolution**2
            or len(pixels) != len(numbers)
        ):
            raise DataError(
                f"'{source}': data {pixels.dtype} {list(pixels.shape)} with {len(numbers)} labels "
                f"is not a batch of {name}; fetch it again"
            )
        images.append(pixels.reshape(-1, shape.channels, shape.resolution, shape.resolution))
        labels += numbers
    return checked(np.concatenate(images), labels, by_name[wanted[0]][0], shape)


def _batch(name: str, data: bytes, source: str) -> tuple[np.ndarray, list[Any]]:
    """The pixels and labels of a pickled batch, in any protocol, with keys of text or bytes, and
    labels as a list or an array."""
    batch, key = (
        storage.unpickle(data, source, STAND_INS),
        "fine_labels" if name == "cifar100" else "labels",
    )
    try:
        values = (
            {_text(name): value for name, value in batch.items()} if isinstance(batch, dict) else {}
        )
        pixels, numbers = values.get("data"), values.get(key)
        if isinstance(pixels, _Array) and isinstance(numbers, list | _Array):
            labels = (
                numbers.array().tolist()
                if isinstance(numbers, _Array)
                else [_number(number) for number in numbers]
            )
            if isinstance(labels, list):
                return pixels.array(), labels
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"'{source}' holds an array that cannot be read ({error}); fetch {ARCHIVES[name][0]} "
            "again"
        ) from None
    raise DataError(
        f"'{source}' is not a batch of {name} with 'data' and '{key}'; fetch {ARCHIVES[name][0]} "
        "again"
    )


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _number(value: Any) -> Any:
    return value.array().item() if isinstance(value, _Scalar) else value


class _Dtype:
    """A pickled type of numbers: its code, such as "u1", and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        """Byte order is all that a plain type adds."""
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"

    def dtype(self) -> np.dtype[Any]:
        """Raises `ValueError` for anything but integers and floats of 1 to 8 bytes."""
        if self.code not in (
            "u1",
            "u2",
            "u4",
            "u8",
            "i1",
            "i2",
            "i4",
            "i8",
            "f2",
            "f4",
            "f8",
        ) or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"its type is {str(self.code)[:20]}")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """A pickled array. Only its parts are kept, so that numpy's own `__setstate__` never sees the
    file."""

    def __init__(self, *_: Any) -> None:
        self._parts: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state  # of numpy.ndarray.__reduce__
        self._parts = (raw, dtype, shape, "F" if fortran else "C")

    @classmethod
    def from_buffer(cls, raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
        """By the arguments of numpy's `_frombuffer`, which protocol 5 names."""
        array = cls()
        array._parts = (raw, dtype, shape, order)
        return array

    def array(self) -> np.ndarray:
        """Raises `ValueError` or `TypeError` where the parts do not fit each other."""
        if not self._parts:
            raise ValueError("it is empty")
        raw, dtype, shape, order = self._parts
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray | str):
            raise ValueError("it holds no numbers")
        if not isinstance(shape, tuple) or not all(
            isinstance(side, int) and side >= 0 for side in shape
        ):
            raise ValueError("its shape is not one of whole numbers")
        numbers = np.frombuffer(
            raw.encode("latin1") if isinstance(raw, str) else raw, dtype.dtype()
        )  # Python 2's str
        if math.prod(shape) != numbers.size:
            raise ValueError(f"it has {numbers.size:,} numbers, not {shape}")
        return numbers.reshape(shape, order="F" if order == "F" else "C")


class _Scalar(_Array):
    """A pickled number of numpy's."""

    def __init__(self, dtype: Any = None, raw: Any = None) -> None:
        self._parts = (raw, dtype, (), "C")


def _encode(text: Any, encoding: Any) -> str:
    """Python 3 writes bytes in Python 2's protocols as the encoding of a text. It is encoded only
    when it is used, since a few bytes of a hostile file can ask for it any number of times."""
    if not isinstance(text, str):
        raise ValueError("it encodes something that is no text")
    return text


# all that the files of numpy 1 and 2 name in protocols 0 to 5
_IN_CORE: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": _Array,
    "multiarray.scalar": _Scalar,
    "numeric._frombuffer": _Array.from_buffer,
}
STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
}
STAND_INS |= {
    f"{core}.{name}": stand_in
    for core in ("numpy.core", "numpy._core")
    for name, stand_in in _IN_CORE.items()
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
        encoded, numbers = _columns(file, shape)
        images.append(decode.same_size(encoded, str(file), shape.resolution))
        labels += numbers
    return checked(np.concatenate(images), labels, files[0], shape)


def _columns(file: Store, shape: Shape) -> tuple[list[bytes], list[int]]:
    """Encoded images and labels of a Hugging Face parquet file."""
    import pyarrow
    import pyarrow.parquet

    data = _small(file)
    try:
        declared = pyarrow.parquet.read_metadata(pyarrow.BufferReader(data))
        pixels = declared.num_rows * shape.channels * shape.resolution**2
        unpacked_bytes = sum(
            declared.row_group(index).total_byte_size for index in range(declared.num_row_groups)
        )
        storage.require_plausible(str(file), max(pixels, unpacked_bytes), len(data))
        # as a dictionary, so that an image which the file holds once and repeats in every row is in
        # memory once
        leaves = {declared.schema.column(index).path for index in range(declared.num_columns)}
        encoded_leaves = sorted(leaves & {"img", "image", "img.bytes", "image.bytes"})
        table = pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(data), read_dictionary=encoded_leaves
        )
        names = table.schema_arrow.names
        image = next((column for column in ("img", "image") if column in names), None)
        label = next((column for column in ("fine_label", "label") if column in names), None)
        if image is None or label is None:
            raise DataError(
                f"'{file}' has columns {names}; expected img or image, and fine_label or label"
            )
        columns = table.read(columns=[image, label])
        encoded = _encoded(columns.column(image), f"'{file}': column '{image}'")
        return encoded, columns.column(label).to_pylist()
    except DataError:
        raise
    except (
        Exception
    ) as error:  # pyarrow raises its own kinds, OSError and ValueError for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"'{file}' is not a readable parquet file ({reason}); fetch it again"
        ) from None


def _encoded(column: Any, what: str) -> list[bytes]:
    """The bytes of image files in a chunked column of pyarrow, plain or in the field `bytes` of
    structs."""
    import pyarrow

    rows: list[bytes] = []
    for chunk in column.chunks:
        if pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
            chunk = chunk.field("bytes")
        if (
            not pyarrow.types.is_dictionary(chunk.type)
            or not pyarrow.types.is_binary(chunk.type.value_type)
            or chunk.null_count
        ):
            raise DataError(
                f"{what} does not hold the bytes of image files; fetch the parquet files of the "
                "data set again"
            )
        largest = max((len(value.as_buffer()) for value in chunk.dictionary), default=0)
        if largest > ENCODED_BYTES:
            raise DataError(
                f"{what} holds an image file of {largest:,} bytes, more than a small image has; "
                "check data.uri"
            )
        distinct = chunk.dictionary.to_pylist()
        rows += [distinct[index] for index in chunk.indices.to_pylist()]
    return rows
