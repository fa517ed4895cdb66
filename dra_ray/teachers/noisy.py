"""The control for diffusion features: a classifier of noisy images with a diffusion teacher's
encoder (arXiv 2602.19931, section 5.6).

Same layers, same noisy inputs and same preconditioning of the input as the teacher, but trained
with cross-entropy, and without labels as input, which would leak the answer. Its pooled feature is
a target like any other teacher's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dra_ray.config import UNet
from dra_ray.teachers.edm import Linear, UNetEncoder


class NoisyClassifier(UNetEncoder):
    """The U-Net up to and with `layer` (default: the usual feature layer), its spatial average, and
    a linear head.

    `num_classes` is of the head; the attribute of that name is 0, as of every network that takes no
    labels. The other arguments, and what is raised, are `UNetEncoder`'s.
    """

    kind = "noisy-classifier"
    optional = (*UNetEncoder.optional, "layer")

    def __init__(
        self,
        config: UNet,
        resolution: int,
        channels: int,
        num_classes: int,
        sigma_data: float = 0.5,
        *,
        layer: str | None = None,
        **options: Any,
    ) -> None:
        without_inputs = config.model_copy(update={"augment_dim": 0, "label_dropout": 0.0})
        super().__init__(without_inputs, resolution, channels, 0, sigma_data, **options)
        self.model.cut_after(self.check_layer(layer))
        self.head = Linear(self.feature_dim(), num_classes)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits [B,K] of noisy images `x` float32 [B,C,H,W] whose noise has deviation
        `sigma` [B].
        """
        return self.head(self.features(x, sigma))

    def classify(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self(x, sigma)

    @property
    def architecture(self) -> dict[str, Any]:
        return super().architecture | {
            "num_classes": self.head.out_features,
            "layer": self.model.default_layer,
        }


def noisy_loss(
    net: nn.Module,
    clean: Tensor,
    sigma: Tensor,
    noise: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy per image [B].

    `clean` float32 [B,C,H,W] in [-1,1], `sigma` [B] (one value for all, or drawn as
    `diffusion.draw_sigma` does), `noise` standard normal like `clean`, `labels` int64 [B].
    """
    logits = net(clean + sigma.reshape(-1, 1, 1, 1) * noise, sigma)
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


@torch.no_grad()
def noisy_accuracy(
    net: nn.Module, clean: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor, batch: int = 256
) -> float:
    """Part of the images whose class is found under noise; the control stops training where this
    reaches the teacher's probe.
    """
    parts = zip(*(tensor.split(batch) for tensor in (clean, sigma, noise, labels)), strict=True)
    right = [
        net(x + level.reshape(-1, 1, 1, 1) * draw, level).argmax(1) == truth
        for x, level, draw, truth in parts
    ]
    return float(torch.cat(right).double().mean())
