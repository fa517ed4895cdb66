"""Pre-activation Wide ResNets with SiLU and normalisation inside: DM-AT's (arXiv 2302.04638; Gowal
et al., arXiv 2010.03593) and RaWRN (Peng et al., arXiv 2308.16258).

State-dict names are those of the released checkpoints, so they load strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dra_ray.students.student import Normalise, Student, spread_convolutions


class SqueezeExcitation(nn.Module):
    """x times a gate per channel: mean over the image, 1x1, ReLU, 1x1, sigmoid (Hu et al., arXiv
    1709.01507).
    """

    def __init__(self, wide: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(wide, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """BN, SiLU, 3x3, BN, SiLU, 3x3, squeeze-and-excitation where wanted, add. A stride of 2 pads
    right and bottom only where a side is even, which is all that DM-AT has, and evenly where it is
    odd: the output then fits the shortcut's, as with TensorFlow's "SAME".
    """

    def __init__(self, wide_in: int, wide_out: int, stride: int, squeeze: float) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(wide_in, momentum=0.01)
        # with its zeros inside the convolution, where they are the same on every side: no copy
        self.conv_0 = nn.Conv2d(wide_in, wide_out, 3, stride, padding=stride % 2, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(wide_out, momentum=0.01)
        self.conv_1 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(wide_in, wide_out, 1, stride, bias=False) if wide_in != wide_out else None
        )
        self.se = SqueezeExcitation(wide_out, round(squeeze * wide_out)) if squeeze else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        padded = active = F.silu(self.batchnorm_0(x))
        if self.stride == 2:
            padded = _fitted(active)
        out = self.conv_0(padded)
        out = self.conv_1(F.silu(self.batchnorm_1(out)))
        if self.se is not None:
            out = self.se(out)
        return out + (x if self.shortcut is None else self.shortcut(active))


class _Padded(torch.autograd.Function):
    """Images [B,C,H,W] with the zeros of a stride of 2. The gradient is a view of what comes back,
    where `F.pad`'s is a copy, and in a compiled step one under a mask.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        top, left = height % 2, width % 2
        ctx.inner = (..., slice(top, top + height), slice(left, left + width))
        return F.pad(x, (left, 1, top, 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[ctx.inner]


@fx.wrap  # as one call, since torch.fx cannot look into an autograd function
def _fitted(x: Tensor) -> Tensor:
    padded: Tensor = _Padded.apply(x)
    return padded


class Group(nn.Module):
    def __init__(
        self, blocks: int, wide_in: int, wide_out: int, stride: int, squeeze: float
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(
                Block(wide_out if i else wide_in, wide_out, 1 if i else stride, squeeze)
                for i in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class PreActivationNet(Student):
    """Stem, three groups of blocks (the last two halve the image), BN, SiLU, mean over the image,
    linear.

    Args:
        widths: channels of the stem and of the three groups.
        depths: blocks of the three groups.
        mean, std: of the data per channel, in [0,1] units; their number is the number of image
        channels. squeeze: width of squeeze-and-excitation relative to its block's; 0 for none.
    """

    classifier = "logits."

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        squeeze: float = 0.0,
    ) -> None:
        super().__init__()
        self.feature_dim = widths[-1]
        self.normalise = Normalise(mean, std)
        self.init_conv = nn.Conv2d(len(mean), widths[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(Group(depths[i], widths[i], widths[i + 1], 2 if i else 1, squeeze) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(self.feature_dim, momentum=0.01)
        self.logits = nn.Linear(self.feature_dim, num_classes)
        spread_convolutions(self)
        nn.init.zeros_(self.logits.bias)

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.feature_map(x).mean((2, 3))
        return self.logits(features), features

    def feature_map(self, x: Tensor) -> Tensor:
        return F.silu(self.batchnorm(self.layer(self.init_conv(self.normalise(x)))))


class WideResNet(PreActivationNet):
    """DM-AT's wrn-depth-width: n=(depth-4)/6 blocks in each of three groups of 16w, 32w and 64w
    channels.
    """

    def __init__(
        self, depth: int, width: int, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        blocks = (depth - 4) // 6
        super().__init__(
            (16, 16 * width, 32 * width, 64 * width), (blocks,) * 3, num_classes, mean, std
        )


class RaWRN(PreActivationNet):
    """RaWRN-70-16: WRN-70-16's budget spent on a wider stem, a deep middle and
    squeeze-and-excitation (arXiv 2308.16258, CIFAR model).
    """

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__((96, 216, 432, 864), (30, 31, 10), num_classes, mean, std, squeeze=0.25)
