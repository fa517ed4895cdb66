"""Image files to uint8 arrays, on several threads: Pillow decodes and resizes without holding
Python's lock.

What becomes of a file is what torchvision's ImageFolder makes of it, `convert("RGB")`: transparency
is dropped, grey is repeated, of an animation or of several pages the first counts, and the EXIF
orientation is not applied. Unlike there, grey of more than 8 bits is scaled from its full range to
0..255 (Pillow would cut it off at 255: white), and pixels without a range of their own (32-bit
integers, floating point) or that Pillow cannot convert (LAB) are refused.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dra_ray.errors import DataError
from dra_ray.storage import require_plausible

log = logging.getLogger("dra_ray")
THREADS = min(8, os.cpu_count() or 1)
# those that Pillow decodes by itself and knows by their first bytes; EPS and the like start other
# programs
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "PPM", "TIFF", "JPEG2000", "QOI")
SUFFIXES = (
    *(
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".gif",
        ".bmp",
        ".webp",
        ".avif",
        ".tif",
        ".tiff",
    ),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".qoi"),
)
# of images too, but not read here; to pass over them in silence would train on fewer images, or on
# fewer classes
OTHER_SUFFIXES = (
    *(
        ".heic",
        ".heif",
        ".jxl",
        ".tga",
        ".pcx",
        ".psd",
        ".ico",
        ".icns",
        ".cur",
        ".dds",
        ".sgi",
        ".rgb",
        ".ras",
        ".xbm",
        ".xpm",
    ),
    *(
        ".svg",
        ".eps",
        ".exr",
        ".hdr",
        ".pfm",
        ".fits",
        ".dng",
        ".cr2",
        ".nef",
        ".arw",
        ".dcm",
        ".dib",
        ".mpo",
    ),
)
MOST_PIXELS = 2**26  # ImageNet's largest has 61 million; Pillow itself refuses from 179 million on
MOST_SIDE = 2**16  # as JPEG's; Pillow keeps a pointer for every row
MOST_FILE_BYTES = 2**28
# modes that Pillow converts to RGB as it should
EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}

# of sizes (MOST_PIXELS is lower, and raises) and of damaged EXIF data, which nothing here reads
warnings.filterwarnings("ignore", module=r"PIL\.")


# what files of these begin with, whether or not they can be read
_STARTS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def picture(data: bytes, name: str) -> Image.Image:
    """An RGB image of the bytes of an image file, by the rules above.

    Raises `DataError` naming the file where it cannot be decoded, has a mode that is refused, or
    has more than MOST_PIXELS, before they are decoded.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > MOST_PIXELS or max(image.size) > MOST_SIDE:
            raise DataError(
                f"'{name}' has {image.width:,} x {image.height:,} pixels, more than "
                f"{MOST_PIXELS:,} or {MOST_SIDE:,} a side; "
                "make it smaller or remove it"
            )
        require_plausible(name, 3 * image.width * image.height, len(data))
        return _rgb(image, name)
    except DataError:
        raise
    except UnidentifiedImageError:
        format_ = next((of for of, start in _STARTS.items() if data.startswith(start)), None)
        why = (
            f"it begins as {format_}, but is damaged or of a kind that is not read, such as "
            "16-bit floating point"
            if format_
            else f"its first bytes are of no format that is read: {', '.join(_formats())}"
        )
        raise DataError(
            f"'{name}' cannot be decoded as an image ({why}); save it as PNG or JPEG, or remove it"
        ) from None
    # Pillow's decoders raise SyntaxError, struct.error and their own kinds, beside OSError
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"'{name}' cannot be decoded as an image ({reason}); fetch it again or remove it"
        ) from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    signed = _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ())
    if image.mode in EIGHT_BITS and not signed:
        return image.convert("RGB")
    if image.mode in PREMULTIPLIED:
        return image.convert(PREMULTIPLIED[image.mode]).convert("RGB")
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    ):  # whose range is 16 bits
        return _scaled(image, name).convert("RGB")
    what = (
        "signed integers"
        if signed
        else {"I": "32-bit integers", "F": "floating-point numbers", "LAB": "CIELAB colours"}.get(
            image.mode, "of a kind that is not read"
        )
    )
    raise DataError(
        f"'{name}' has pixels of mode {image.mode} ({what}), which are not converted; save it as "
        "8-bit RGB or grey"
    )


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """8-bit grey of 16-bit grey, or of the bits that a TIFF says it uses."""
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
    grey = np.asarray(image).astype(np.int64)
    if 0 < grey.max() < largest >> 4 and grey.size > 1:
        _warn_of_dark(name, int(grey.max()), largest)
    grey = (grey.clip(0, largest) * 255 + largest // 2) // largest
    return Image.fromarray(
        (255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey).astype(np.uint8)
    )


def _warn_of_dark(name: str, brightest: int, largest: int) -> None:
    """Once a process: which range a file was written with, it does not say."""
    if _warned.is_set():
        return
    _warned.set()
    log.warning(
        "'%s' uses grey levels up to %s of %s and is read as dark as that; if it was written "
        "with fewer bits, as 12-bit cameras do, scale its levels to the whole range",
        name,
        f"{brightest:,}",
        f"{largest:,}",
    )


_warned = threading.Event()

# of TIFF 6.0
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2


def centre(data: bytes, name: str, resolution: int) -> np.ndarray:
    """uint8 [3,resolution,resolution]: the centre of the image whose shorter side was resized to
    256/224 of that, bicubic.
    """
    image = picture(data, name)
    shorter = round(resolution * 256 / 224)
    scale = [
        shorter * side // min(image.size) for side in image.size
    ]  # the longer side rounded down, as torchvision does
    if scale[0] * scale[1] > MOST_PIXELS:
        raise DataError(
            f"'{name}' has {image.width:,} x {image.height:,} pixels, too long a strip to resize "
            f"to {shorter} a side; remove it"
        )
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
