"""PGD against students that draw random numbers: gradients averaged over passes, and scores over
fresh passes.

AutoAttack's version rand takes an image for broken when one pass misclassifies it, so that
randomness itself counts as an attack. Here an adversarial image is found first (Athalye et al.,
arXiv 1707.07397: expectation over transformation), and then judged by passes that the attack has
not seen. Raise `eot` until the score stays: 1, 5, 20, 50.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dra_ray import config
from dra_ray.attacks import pgd


@dataclasses.dataclass(frozen=True)
class Score:
    """`mean` float [B]: the share of fresh passes that classify the image rightly; `worst` bool
    [B]: all of them do.
    """

    mean: Tensor
    worst: Tensor


def eot_pgd(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: config.Threat,
    noise: Tensor,
    steps: int,
    *,
    eot: int,
    passes: int = 10,
) -> Score:
    """PGD on the cross-entropy with each gradient summed over `eot` passes, scored over `passes`
    fresh ones.

    Args:
        x: float [B,C,H,W] in [0,1]; labels: int64 [B].
        noise: [restarts,B,C,H,W], as `attacks.noise_like` draws it; the worst start of an image
            counts.
    """
    scores = []
    for one in noise:
        images = pgd.strongest(student, x, labels, threat, one, steps, eot=eot)
        with pgd.evaluating(student), torch.no_grad():
            scores.append(torch.stack([student(images).argmax(1) == labels for _ in range(passes)]))
    right = torch.stack(scores)  # [restarts, passes, B]
    return Score(right.float().mean(1).amin(0), right.all(1).all(0))
