"""Contact sheets: a grid of images as one PNG, enlarged so that small ones can be judged by eye."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

CELL_PIXELS = 48
GAP_PIXELS = 2
BACKGROUND = 128


def sheet(images: Tensor, columns: int) -> bytes:
    """PNG bytes of uint8 `images` [N,C,H,W] (C 1 or 3), row by row in `columns` columns, each
    enlarged to about 48 pixels.
    """
    zoom = max(1, CELL_PIXELS // images.shape[-1])
    large = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    count, channels, height, width = large.shape
    rows = -(-count // columns)
    canvas = torch.full(
        (channels, rows * (height + GAP_PIXELS), columns * (width + GAP_PIXELS)),
        BACKGROUND,
        dtype=torch.uint8,
    )
    for index, image in enumerate(large):
        top, left = index // columns * (height + GAP_PIXELS), index % columns * (width + GAP_PIXELS)
        canvas[:, top : top + height, left : left + width] = image
    pixels = canvas.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()
