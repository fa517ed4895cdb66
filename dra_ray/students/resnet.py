"""ResNet-18 for small images (He et al., arXiv 1512.03385, with a 3x3 stem and no max-pooling), as
CIFAR baselines have it.

State-dict names are those of the CIFAR-10 weights inside the installed package pyautoattack,
`pyautoattack/examples/model_test.pt`: a standard, not a robust model, with images that are not
normalised (`model.normalise: false`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray.students.student import Normalise, Student


class Block(nn.Module):
    """3x3, BN, ReLU, 3x3, BN, add, ReLU; the shortcut is 1x1 and BN where the shape changes."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)
        self.shortcut = nn.Sequential()
        if wide_in != wide_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def _stage(wide_in: int, wide_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(wide_in, wide_out, stride), Block(wide_out, wide_out, 1))


class ResNet18(Student):
    """Two blocks each of 64, 128, 256 and 512 channels; PyTorch's own initial weights.

    Args:
        mean, std: of the data per channel, in [0,1] units; their number is the number of image
        channels.
    """

    classifier = "linear."

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.feature_dim = 512
        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 1)
        self.layer2 = _stage(64, 128, 2)
        self.layer3 = _stage(128, 256, 2)
        self.layer4 = _stage(256, 512, 2)
        self.linear = nn.Linear(512, num_classes)

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.feature_map(x).mean((2, 3))
        return self.linear(features), features

    def feature_map(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalise(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(out))))
