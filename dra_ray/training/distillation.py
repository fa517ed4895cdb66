"""CaDistill (Xu et al., arXiv 2506.09955): canonical samples of some training images teach a
student beside the labels. The paper names an alignment loss, a clustering loss and CKA; these forms
and all weights are our guesses (UNVERIFIED).

The samples' forward pass uses their own BatchNorm statistics and leaves the running ones alone, so
that these stay those of real images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.data import augment, canonical, random
from dra_ray.data.canonical import CanonicalBatch, CanonicalImages
from dra_ray.students import Student
from dra_ray.training import losses


def prepare(
    experiment: config.Experiment, samples: CanonicalImages, number: int, mine: slice
) -> CanonicalBatch:
    """A worker's slice of the canonical samples of step `number`, augmented as real images are;
    `mine` is its slice of the real batch.
    """
    batch, seed = experiment.distill.per_step, experiment.shared_seed
    size = experiment.optim.batch
    part = slice(mine.start * batch // size, mine.stop * batch // size)
    at = canonical.indices(samples.members, batch, seed, number)[part]
    changes = augment.parameters(
        batch, experiment.data, random.generator(seed, random.Stream.CANONICAL_AUGMENT, number)
    )
    images, labels = samples.pictures.take(at)
    images = augment.apply(images, experiment.data, changes[part])
    return CanonicalBatch(images, labels, samples.features[at])


def weight_at(distill: config.Distill, epoch: int) -> float:
    """In epoch 0, 1, ..."""
    rise = min(1.0, (epoch + 1) / distill.warmup_epochs) if distill.warmup_epochs else 1.0
    return distill.weight * rise


class Distiller(nn.Module):
    """The losses of a run's canonical samples, with the projection that contrast compares in.

    Args:
        feature_dim: of the student.
    """

    def __init__(self, distill: config.Distill, feature_dim: int) -> None:
        super().__init__()
        self.distill = distill
        self.head = nn.Sequential(
            nn.Linear(feature_dim, feature_dim),
            nn.BatchNorm1d(feature_dim),
            nn.ReLU(),
            nn.Linear(feature_dim, distill.projection),
        )

    def forward(
        self, student: Student, features: Tensor, labels: Tensor, batch: CanonicalBatch
    ) -> Tensor:
        """The weighted sum, a scalar, given the student's features [b,F] of the real images and
        their labels int64 [b]; the same up to rounding however the batch is shared among workers,
        but for BatchNorm.
        """
        distill = self.distill
        device = features.device
        theirs, own_labels = batch.features.to(device), batch.labels.to(device)
        x = data.to_float(batch.images.to(device))
        with running_statistics_kept(student):
            logits, taught = student.with_features(x)
        loss = features.new_zeros(())
        if distill.align or distill.cluster:
            real, canonicals = self._projected(features, taught)
        if distill.align:
            loss = loss + distill.align * losses.supervised_contrast(
                real, labels, canonicals, own_labels, distill.temperature
            )
        if distill.cluster:
            loss = loss + distill.cluster * losses.clustering(
                canonicals, own_labels, distill.temperature
            )
        if distill.cka:
            loss = loss + distill.cka * losses.cka(taught, theirs)
        if distill.samples:
            loss = loss + distill.samples * F.cross_entropy(logits, own_labels)
        return loss

    def _projected(self, real: Tensor, canonicals: Tensor) -> tuple[Tensor, Tensor]:
        """Of unit length; both in one batch, so that they share their BatchNorm."""
        both = F.normalize(self.head(torch.cat([real, canonicals])), dim=1)
        return both[: len(real)], both[len(real) :]


@contextlib.contextmanager
def running_statistics_kept(student: nn.Module) -> Iterator[None]:
    """BatchNorm takes nothing of the batches inside into its running statistics."""
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
