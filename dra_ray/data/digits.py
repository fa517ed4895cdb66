"""scikit-learn's digits: 1,797 real 8x8 images in 10 classes, inside its wheel (UCI Optical
Recognition, test part).
"""

from __future__ import annotations

import gzip
import importlib.util
import io

import numpy as np
import torch

from dra_ray import config
from dra_ray.data.pictures import Parts, Split
from dra_ray.errors import DataError
from dra_ray.storage import Store

NUM_CLASSES = 10


def read(settings: config.Data) -> Parts:
    """All images uint8 [1797,1,8,8] (grey level g of 0..16 stored as round(g * 255 / 16)) and
    labels int64 [1797]; there is no test part.

    The file is read without importing scikit-learn, which would cost every worker two seconds.
    """
    if settings.uri:
        raise DataError(
            f"data.uri={settings.uri!r}, but data.name='digits' is inside scikit-learn and is read "
            "from there; leave data.uri out, or name the data set that is there"
        )
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "data.name='digits' is inside scikit-learn, which is not installed; run `pip install "
            "scikit-learn`"
        )
    file = Store(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(
        io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=","
    )  # 64 grey levels and the label
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = table[:, -1].astype(np.int64)
    everything = Split(torch.from_numpy(images), torch.from_numpy(labels))
    return Parts(everything, num_classes=NUM_CLASSES)
