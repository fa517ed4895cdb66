"""A student's verdicts on held-out images, a chunk at a time: every image's noise is its own, and
chunks are the same for any number of workers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dra_ray import config, data
from dra_ray.attacks import pgd
from dra_ray.data import random

CHUNK = 128  # images


def judge_chunk(
    student: nn.Module,
    experiment: config.Experiment,
    pixels: Tensor,
    classes: Tensor,
    number: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Of chunk `number`, uint8 [B,C,H,W] of classes int64 [B]: bool [B] correct, and [B] correct
    under PGD-k. The student is in eval mode and on `device`.
    """
    selection, threat = experiment.selection, experiment.threat
    x, labels = data.to_float(pixels.to(device)), classes.to(device)
    noise = pgd.noise_like(
        pixels.shape,
        threat,
        random.generator(experiment.shared_seed, random.Stream.VALIDATION, number),
    )
    with torch.no_grad():
        correct = student(x).argmax(1) == labels
    withstood = pgd.evaluate_pgd(
        student,
        x,
        labels,
        threat,
        noise.to(device),
        selection.steps,
        loss=selection.loss,
        step=selection.step_255 / 255 if selection.step_255 else None,
        # the average is never compiled, the raw weights may be
        shrinking=experiment.compute.compile == "off" or selection.weights == "average",
    )
    return correct, withstood
