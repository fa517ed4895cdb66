"""The ReLU Wide ResNet of TRADES (arXiv 1901.08573) and of most WRN-34-10 baselines.

State-dict names are those of the released checkpoints, so they load strictly. Unlike DM-AT's
network it pads evenly, has BatchNorm's usual momentum of 0.1, and its authors feed it images that
are not normalised (`model.normalise: false`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray.students.student import Normalise, Student, spread_convolutions


class Block(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, add."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide_in)
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(wide_in, wide_out, 1, stride, bias=False) if wide_in != wide_out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    def __init__(self, blocks: int, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                Block(wide_out if i else wide_in, wide_out, 1 if i else stride)
                for i in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ReluWideResNet(Student):
    """relu-wrn-depth-width: n=(depth-4)/6 blocks in each of three groups of 16w, 32w and 64w
    channels.

    Args:
        mean, std: of the data per channel, in [0,1] units; their number is the number of image
        channels.
    """

    classifier = "fc."
    # the authors' class owns a fourth group that its forward never calls; their checkpoints hold
    # its weights
    unused = ("sub_block1.",)

    def __init__(
        self, depth: int, width: int, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.feature_dim = 64 * width
        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), 16, 3, padding=1, bias=False)
        self.block1 = Group(blocks, 16, 16 * width, 1)
        self.block2 = Group(blocks, 16 * width, 32 * width, 2)
        self.block3 = Group(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(self.feature_dim)
        self.fc = nn.Linear(self.feature_dim, num_classes)
        spread_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.feature_map(x).mean((2, 3))
        return self.fc(features), features

    def feature_map(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(self.normalise(x)))))
        return F.relu(self.bn1(out))
