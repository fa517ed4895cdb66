"""A set in rows as tar shards in WebDataset's layout, for other loaders."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from dra_ray.data import rows
from dra_ray.storage import Store


def to_tar(store: Store, to: Store, progress: Callable[[int, int], None] | None = None) -> int:
    """Write every shard of the set at `store` as a tar in the folder `to`, with KEY.png and KEY.cls
    of every image, where KEY is its position; the number of shards. A tar that is there stays.

    Raises what reading the set raises.
    """
    index = rows.read_index(store)
    begin = 0
    for number, shard in enumerate(index.shards):
        file = to / f"{to.name}-train-{number:05d}.tar"
        if not file.exists():
            found = (store / shard.name).read_npy()
            rows.require_listed(store / shard.name, found, shard, index)
            file.write_bytes(_tar(found, begin))
        begin += shard.images
        if progress:
            progress(begin, index.images)
    return len(index.shards)


def _tar(found: np.ndarray, begin: int) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for offset, row in enumerate(found):
            pixels = row["image"]
            png = io.BytesIO()
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(png, "PNG")
            for ending, content in (("png", png.getvalue()), ("cls", str(row["label"]).encode())):
                member = tarfile.TarInfo(f"{begin + offset:010d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return whole.getvalue()
