"""Between images as bytes and the range that diffusion networks see."""

from __future__ import annotations

import torch
from torch import Tensor


def to_signed(images: Tensor) -> Tensor:
    """uint8 [B,C,H,W] to float32 in [-1,1], the range that teachers see."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1,1] to uint8, clipped: the inverse of `to_signed`."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
