"""Image files to uint8 arrays, on several threads: Pillow decodes and resizes without holding
Python's lock.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dra_ray.errors import DataError

THREADS = min(8, os.cpu_count() or 1)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def picture(data: bytes, name: str) -> Image.Image:
    """An RGB image of the bytes of an image file; `DataError` naming it when it cannot be decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and their own kinds, beside OSError
        raise DataError(
            f"'{name}' cannot be decoded as an image ({error}); fetch it again or remove it"
        ) from None


def centre(data: bytes, name: str, resolution: int) -> np.ndarray:
    """uint8 [3,resolution,resolution]: the centre of the image whose shorter side was resized to
    256/224 of that, bicubic.
    """
    image = picture(data, name)
    shorter = round(resolution * 256 / 224)
    scale = [
        shorter * side // min(image.size) for side in image.size
    ]  # the longer side rounded down, as torchvision does
    image = image.resize((scale[0], scale[1]), Image.Resampling.BICUBIC)
    left, top = (round((side - resolution) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution))).transpose(
        2, 0, 1
    )


def batch(
    decode: Callable[[int], np.ndarray], positions: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    """uint8 [b,*shape] of what `decode` makes of each position."""
    made = torch.empty((len(positions), *shape), dtype=torch.uint8)

    def fill(row: int) -> None:
        made[row] = torch.from_numpy(np.ascontiguousarray(decode(positions[row])))

    for _ in _pool().map(fill, range(len(positions))):
        pass
    return made


def same_size(files: Sequence[bytes], source: str, resolution: int) -> np.ndarray:
    """uint8 [N,3,resolution,resolution] of the bytes of N image files; `DataError` for one of
    another size.
    """

    def pixels(row: int) -> np.ndarray:
        image = picture(files[row], f"{source}, row {row}")
        if image.size != (resolution, resolution):
            raise DataError(
                f"'{source}', row {row}: the image has {image.size} pixels, not {resolution} a "
                "side; check data.uri and data.name"
            )
        return np.asarray(image).transpose(2, 0, 1)

    return batch(pixels, range(len(files)), (3, resolution, resolution)).numpy()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
