"""Diffusion Representation Alignment (arXiv 2602.19931, section 4.2), in one place: what a step
asks of teachers, what becomes of the answers, and the loss that pulls the student towards them.

    pending = [source.submit(request) for source, request in zip(sources, requests(...))]
    features = ...                       # of the adversarial images, after the attack
    loss = aligner(features, pending)    # of projector(features) and transform(answer), per term

`config.Align.targets` are the terms, with a source and a pending answer each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.data import random
from dra_ray.teachers import targets
from dra_ray.teachers.diffusion import draw_sigma
from dra_ray.teachers.source import FeatureSource, Pending, Request
from dra_ray.training import losses, workers
from dra_ray.training.projector import projector


def requests(
    experiment: config.Experiment, images: Tensor, labels: Tensor, step: int, mine: slice
) -> list[Request]:
    """What each term asks for a worker's slice of a step's batch: a pure function, in which each
    slice continues the batch's seeds and noise levels.
    """
    return [
        Request.seeded(
            images,
            labels,
            _levels(experiment, term, number, step)[mine],
            _noise_seed(experiment.shared_seed, number, step) + mine.start,
        )
        for number, term in enumerate(experiment.align.targets)
    ]


def _levels(experiment: config.Experiment, term: config.Term, number: int, step: int) -> Tensor:
    """Noise levels float32 [batch] of a term."""
    size = experiment.optim.batch
    if term.sigma is not None:
        return torch.full((size,), term.sigma)
    path = _path(random.Stream.EXTRA_SIGMA, number, step)
    return draw_sigma(size, random.generator(experiment.shared_seed, *path))


def _noise_seed(seed: int, number: int, step: int) -> int:
    """Of the batch's first image; that of position p is p more."""
    if number == 0:
        return random.derive(seed, random.Stream.TEACHER_NOISE, step) // 2
    return random.derive(seed, *_path(random.Stream.EXTRA_NOISE, number, step)) // 2


def _path(stream: random.Stream, number: int, step: int) -> tuple[int, ...]:
    """A stream of each term's own; the second term's are as they were when there were two."""
    return (stream, step) if number == 1 else (stream, step, number)


def weight_at(align: config.Align, epoch: int, epochs: int) -> float:
    """Lambda in epoch 0, 1, ... of so many."""
    rise = min(1.0, (epoch + 1) / align.warmup_epochs) if align.warmup_epochs else 1.0
    done = epoch / epochs
    fall = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return align.weight * rise * fall[align.decay]


class Aligner(nn.Module):
    """Projectors, target transforms and loss of a run's alignment. Terms of one layer share a
    projector.

    Args:
        feature_dim: of the student.
        widths: of the features of each term's source.
    """

    def __init__(self, align: config.Align, feature_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.align = align
        self.transforms = nn.ModuleList(targets.transform(align, width) for width in widths)
        layers = list(dict.fromkeys(term.layer for term in align.targets))
        self.places = [layers.index(term.layer) for term in align.targets]
        self.projectors = nn.ModuleList(
            projector(feature_dim, align.target_width(width), align.hidden, align.activation)
            for width in (widths[self.places.index(place)] for place in range(len(layers)))
        )

    def measure(self, sources: Sequence[FeatureSource], images: data.Pictures, seed: int) -> None:
        """Statistics of the targets, where their transform needs any: measured on training images
        before the first step, the same for all workers.
        """
        for term, source, transform in zip(
            self.align.targets, sources, self.transforms, strict=True
        ):
            if isinstance(transform, targets.Transform):
                count = self.align.statistics_images
                request = targets.request(images, term.sigma, count, seed)
                transform.fit(targets.measured(source, request, self.align))
        workers.share_(list(self.transforms.buffers()))

    def forward(self, features: Tensor, answers: Sequence[Pending]) -> Tensor:
        """The alignment loss of student features [B,F], or their map [B,F,H,W] where targets are
        tokens, a scalar: its terms by their shares.
        """
        loss = features.new_zeros(())
        for term, place, transform, answer in zip(
            self.align.targets, self.places, self.transforms, answers, strict=True
        ):
            answered = answer.result().to(features.device)
            projected = self.projectors[place](targets.positions(resampled(features, answered)))
            target = transform(targets.untransformed(answered, self.align))
            loss = loss + term.share * self._loss(projected, target)
        return loss

    def _loss(self, projected: Tensor, target: Tensor) -> Tensor:
        if self.align.loss == "infonce":
            return losses.info_nce(projected, target, self.align.temperature)
        return (losses.cka if self.align.loss == "cka" else losses.alignment)(projected, target)


def resampled(features: Tensor, like: Tensor) -> Tensor:
    """A map [B,F,H,W] with as many positions as `like` [B,D,h,w]: means over areas where it has
    more, bilinear where it has fewer. Pooled features as they are.
    """
    if features.ndim == 2 or features.shape[2:] == like.shape[2:]:
        return features
    height, width = like.shape[2:]
    if features.shape[2] >= height:
        return F.adaptive_avg_pool2d(features, (height, width))
    return F.interpolate(features, (height, width), mode="bilinear", align_corners=False)
