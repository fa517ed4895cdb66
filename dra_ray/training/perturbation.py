"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dra_ray.attacks.pgd import untracked
from dra_ray.training import workers


@contextmanager
def perturbed(student: nn.Module, gamma: float, loss_fn: Callable[[], Tensor]) -> Iterator[None]:
    """The student with weights a step up the slope of `loss_fn` (section 3.2, one step); afterwards
    its own weights, to the bit.

    Every weight w with two or more dimensions, and gradient g of the loss, becomes w + gamma *
    |w|/|g| * g: biases, norms and embeddings stay. `loss_fn` is a scalar of the student's outputs
    at fixed adversarial images; BatchNorm's buffers do not see it. Forward and backward belong
    inside the block, the optimiser's step after it. Workers move alike: gradients are summed over
    them.
    """
    weights = [
        p
        for name, p in student.named_parameters()
        if p.dim() > 1 and "weight" in name and p.requires_grad
    ]
    with torch.enable_grad(), untracked(student):
        slopes = torch.autograd.grad(loss_fn(), weights, allow_unused=True, materialize_grads=True)
    gradients = workers.totals(slopes)  # only directions matter, so the sum does for the mean
    saved = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(
                    gradient * (gamma * weight.norm() / (gradient.norm() + 1e-20))
                )  # 1e-20: where there is no slope
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)
