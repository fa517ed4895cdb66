"""Projected gradient descent in the l-infinity ball, for training (KL) and for evaluation (cross-entropy)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient meanwhile: the input's gradient is the same and costs a third less."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics in train mode but leaves its running statistics alone."""
    tracking = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def random_start(x: Tensor, eps: float, noise: Tensor) -> Tensor:
    """A point of the ball around x, kept inside [0,1]; `noise` is uniform in [0,1), of x's shape."""
    return (x + eps * (2 * noise - 1)).clamp_(0, 1)


def pgd(loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, threat: config.Threat, steps: int) -> Tensor:
    """Ascend `loss` (of a batch, summed or averaged: only the sign counts) by `steps` signed steps from `start`.

    Madry et al. 2018, equation 2: x float [B,C,H,W] in [0,1]; the result is within eps of x and inside [0,1].
    """
    adversarial = start.detach()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(adversarial), adversarial)
        with torch.no_grad():
            adversarial = adversarial + threat.step * gradient.sign()
            adversarial = torch.min(torch.max(adversarial, x - threat.eps), x + threat.eps).clamp_(0, 1)
    return adversarial.detach()


def trades(student: nn.Module, x: Tensor, target: Tensor, threat: config.Threat, noise: Tensor) -> Tensor:
    """The training attack of TRADES in DM-AT's form: maximise KL(target || softmax f(x')).

    The student stays in train mode with BatchNorm tracking off; `target` [B,K] is softmax f(x), computed once.
    """
    with frozen(student), untracked(student):

        def divergence(adversarial: Tensor) -> Tensor:
            return F.kl_div(F.log_softmax(student(adversarial), 1), target, reduction="sum")

        return pgd(divergence, x, random_start(x, threat.eps, noise), threat, threat.steps)


def evaluate_pgd(student: nn.Module, x: Tensor, labels: Tensor, threat: config.Threat, steps: int, noise: Tensor) -> Tensor:
    """PGD on the cross-entropy with a uniform start, the student in eval mode. Returns correct-under-attack bool [B].

    The step is eps/4, so that twenty steps cross the ball (2/255 for the 8/255 of CIFAR, as in DM-AT).
    """
    threat = threat.model_copy(update={"step_255": threat.eps_255 / 4})
    with frozen(student):
        adversarial = pgd(lambda z: F.cross_entropy(student(z), labels, reduction="sum"), x, random_start(x, threat.eps, noise), threat, steps)
    with torch.no_grad():
        return student(adversarial).argmax(1) == labels
