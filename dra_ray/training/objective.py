"""One batch's attack and losses: what recipes differ in, as one call. Section numbers are those of
the papers named.

with attacked(student, x, labels, noise, loss, threat, class_means, epoch) as found:
    clean, robust, features = found.losses()
    (clean + robust).backward()          # inside the block: weights may be perturbed until its end
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config
from dra_ray.attacks import pgd
from dra_ray.training import losses, perturbation

ONE_VIEW = ("pgd-at", "fgsm-rs")  # losses of the adversarial images alone


@dataclasses.dataclass(frozen=True)
class Attacked:
    """A batch and its adversarial version, float [B,C,H,W] in [0,1]."""

    student: Any
    x: Tensor
    adversarial: Tensor
    labels: Tensor
    loss: config.Loss
    class_means: losses.ClassMeans
    clean: Tensor | None = (
        # logits of x with their graph, where the attack's target came from the very forward that
        # trains
        None
    )

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss on clean images, robust loss, features [B,F] of the adversarial images); the first
        two are scalars.

        BatchNorm sees the clean batch first, then the adversarial one (DM-AT). IKL's class means
        take the clean logits in.
        """
        clean, logits, features = self._forward()
        if self.loss.name == "ikl" and clean is not None:
            self.class_means.add(F.softmax(clean.detach() / self.loss.temperature, 1), self.labels)
        return *self._parts(clean, logits), features

    def total(self) -> Tensor:
        """The whole loss, which AWP ascends; leaves the class means alone."""
        clean, logits, _ = self._forward()
        return torch.stack(self._parts(clean, logits)).sum()

    def _forward(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """(clean logits where the loss needs them, adversarial logits, adversarial features)."""
        clean = None
        if self.loss.name not in ONE_VIEW:
            clean = self.clean if self.clean is not None else self.student(self.x)
        return clean, *self.student.with_features(self.adversarial)

    def _parts(self, clean: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.loss
        if clean is None:
            return logits.new_zeros(()), F.cross_entropy(
                logits, self.labels, label_smoothing=loss.label_smoothing
            )
        if loss.name == "ikl":
            weights = self.class_means.weights(self.labels)
            return losses.ikl(
                clean, logits, self.labels, weights, loss.alpha, loss.beta, loss.label_smoothing
            )
        return losses.trades(clean, logits, self.labels, loss.beta, loss.label_smoothing)


@contextlib.contextmanager
def attacked(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    noise: Tensor,
    loss: config.Loss,
    threat: config.Threat,
    class_means: losses.ClassMeans,
    epoch: int,
) -> Iterator[Attacked]:
    """Attack a batch as training does; where the recipe perturbs weights (AWP), they are perturbed
    until the block ends.
    """
    perturb = bool(loss.awp) and epoch >= loss.awp_from_epoch
    clean = None
    if loss.name in ONE_VIEW:
        adversarial = pgd.adversarial(student, x, labels, threat, noise.to(x.device))
    else:
        if threat.mode == "train" and not perturb:
            # the target of the attack is this very forward: same weights, mode and batch give the
            # same logits
            clean = student(x)
            target = F.softmax(clean.detach(), 1)
        else:
            with torch.no_grad(), pgd.as_attacked(student, threat):
                target = F.softmax(student(x), 1)
        adversarial = pgd.trades(student, x, target, threat, noise.to(x.device))
    found = Attacked(student, x, adversarial, labels, loss, class_means, clean)
    with (
        perturbation.perturbed(student, loss.awp, found.total)
        if perturb
        else contextlib.nullcontext()
    ):
        yield found
