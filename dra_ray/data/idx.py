"""Fashion-MNIST's idx files (Xiao et al. 2017, arXiv 1708.07747), as Debian's package
dataset-fashion-mnist installs them.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from dra_ray import config
from dra_ray.config.data_sets import DATA_SETS
from dra_ray.data.pictures import Parts, Split
from dra_ray.errors import DataError
from dra_ray.storage import Store, require_plausible

NUM_CLASSES = 10


def read(settings: config.Data) -> Parts:
    """The four files of the folder `settings.uri`, which may end in .gz. Raises `DataError` for
    anything but whole idx files.
    """
    uri = settings.uri
    if not uri or not Store(uri).exists():
        wrong = f"data.uri='{uri}' does not exist" if uri else "data.uri is not set"
        raise DataError(
            f"{wrong}; install Debian's package dataset-fashion-mnist, which is at "
            f"{DATA_SETS['fashion-mnist'].usual['uri']}, or give the folder with the idx files"
        )
    return Parts(_part(Store(uri), "train"), _part(Store(uri), "t10k"))


def _part(folder: Store, part: str) -> Split:
    images, labels = (
        _array(folder, f"{part}-images-idx3-ubyte", 3),
        _array(folder, f"{part}-labels-idx1-ubyte", 1),
    )
    if len(images) != len(labels):
        raise DataError(f"'{folder}': {len(images)} {part} images, but {len(labels)} labels")
    if len(labels) and int(labels.max()) >= NUM_CLASSES:
        raise DataError(
            f"'{folder}': {part} labels reach {int(labels.max())}, but there are {NUM_CLASSES} "
            "classes"
        )
    return Split(images[:, None], labels.long())


def _array(folder: Store, base: str, dimensions: int) -> Tensor:
    """uint8 of the shape in the header: magic 0x0000 0x08 dimensions, then one big-endian uint32
    per dimension.
    """
    names = folder.names()
    name = next((base + ending for ending in ("", ".gz") if base + ending in names), None)
    if name is None:
        raise DataError(f"'{folder}' has no {base} or {base}.gz")
    file = folder / name
    stored = file.read_bytes()
    try:
        with (
            gzip.GzipFile(fileobj=io.BytesIO(stored))
            if name.endswith(".gz")
            else io.BytesIO(stored) as stream
        ):
            magic, *shape = struct.unpack(f">{1 + dimensions}I", stream.read(4 * (1 + dimensions)))
            count = math.prod(shape)
            if magic == 0x0800 + dimensions:
                require_plausible(str(file), count, len(stored))
                body = np.frombuffer(
                    stream.read(count + 1), np.uint8
                )  # one more, to see that nothing follows
                if body.size == count:
                    return torch.from_numpy(body.reshape(shape).copy())
    except (OSError, EOFError, OverflowError, zlib.error, struct.error) as error:
        raise DataError(f"'{file}' is truncated or damaged ({error}); fetch it again") from None
    raise DataError(
        f"'{file}' is not an idx file of {dimensions} dimensions, or not whole; fetch it again"
    )
