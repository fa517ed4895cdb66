"""One batch's attack and losses: what recipes differ in, as one call. Section numbers are those of
the papers named.

with attacked(student, x, labels, noise, loss=..., threat=..., class_means=..., epoch=...) as batch:
    clean, robust, features = batch.losses()
    (clean + robust).backward()          # inside the block: weights may be perturbed until its end
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config
from dra_ray.attacks import pgd
from dra_ray.attacks.pgd import Climb
from dra_ray.students import Student
from dra_ray.training import losses, perturbation
from dra_ray.training.clock import Clock


@dataclasses.dataclass(frozen=True)
class Logits:
    """What a loss sees of a batch: logits [B,K] of its views, and labels int64 [B].

    `clean` is None where the loss has no such view. `target` is what its attack started from: with
    one view labels, or their distributions [B,K]. `class_means` are IKL's.
    """

    clean: Tensor | None
    adversarial: Tensor
    labels: Tensor
    target: Tensor
    class_means: losses.ClassMeans

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        assert self.clean is not None
        return self.clean, self.adversarial


class Objective(Protocol):
    """A loss of `config.Loss`: which views of a batch it trains on, what its attack maximises, and
    its terms.
    """

    @property
    def loss(self) -> config.Loss: ...

    views: int  # 2: clean and adversarial images; 1: the adversarial ones alone
    attacks: bool  # whether there is an adversary
    asks_average: bool  # whether the averaged weights look at every batch

    def attack(
        self,
        student: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: config.Threat,
        noise: Tensor,
        climb: Climb,
    ) -> Tensor:
        """Adversarial x [B,C,H,W]. `target`: with two views softmax [B,K] of the clean logits, with
        one the labels int64 [B], or what `rectified` makes of them. `climb` takes its steps.
        """

    def terms(self, logits: Logits) -> tuple[Tensor, Tensor]:
        """(loss on clean images, robust loss), scalars."""

    def observe(self, logits: Logits) -> None:
        """Take a training batch into what is known about the classes; once a step."""


@dataclasses.dataclass(frozen=True)
class Trades:
    """Zhang et al. 2019, in DM-AT's form."""

    loss: config.Loss
    views = 2
    attacks = True
    asks_average = False

    def attack(
        self,
        student: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: config.Threat,
        noise: Tensor,
        climb: Climb,
    ) -> Tensor:
        return pgd.trades(student, x, target, threat, noise, climb)

    def terms(self, logits: Logits) -> tuple[Tensor, Tensor]:
        return losses.trades(*logits.both, logits.labels, self.loss.beta, self.loss.label_smoothing)

    def observe(self, logits: Logits) -> None:
        """Nothing is learnt about the classes."""


class ImprovedKL(Trades):
    """Cui et al., arXiv 2305.13948: attacks as TRADES does."""

    def terms(self, logits: Logits) -> tuple[Tensor, Tensor]:
        loss, weights = self.loss, logits.class_means.weights(logits.labels)
        return losses.ikl(
            *logits.both,
            logits.labels,
            weights,
            alpha=loss.alpha,
            beta=loss.beta,
            label_smoothing=loss.label_smoothing,
        )

    def observe(self, logits: Logits) -> None:
        clean = logits.both[0].detach()
        logits.class_means.add(F.softmax(clean / self.loss.temperature, 1), logits.labels)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Madry et al. 2018; with one step from a uniform start FGSM-RS (Wong et al. 2020)."""

    loss: config.Loss
    views = 1
    attacks = True
    asks_average = False

    def attack(
        self,
        student: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: config.Threat,
        noise: Tensor,
        climb: Climb,
    ) -> Tensor:
        return pgd.adversarial(student, x, target, threat, noise, climb=climb)

    def terms(self, logits: Logits) -> tuple[Tensor, Tensor]:
        smoothing = self.loss.label_smoothing
        return logits.adversarial.new_zeros(()), F.cross_entropy(
            logits.adversarial, logits.target, label_smoothing=smoothing
        )

    def observe(self, logits: Logits) -> None:
        """Nothing is learnt about the classes."""


class Plain(CrossEntropy):
    """Training without an adversary: the "adversarial" images are the images."""

    attacks = False

    def attack(
        self,
        student: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: config.Threat,
        noise: Tensor,
        climb: Climb,
    ) -> Tensor:
        return x

    def terms(self, logits: Logits) -> tuple[Tensor, Tensor]:
        none, loss = super().terms(logits)
        return loss, none


class Rectified(CrossEntropy):
    """ADR (Wu et al., arXiv 2305.12118): cross-entropy with labels that the averaged weights soften
    and that are rectified where these are wrong. Its values were not to be had (UNVERIFIED).
    """

    asks_average = True

    def rectified(self, seen: Tensor, labels: Tensor, done: float) -> Tensor:
        """Distributions [B,K] of labels int64 [B], given the averaged weights' logits [B,K] of the
        clean images, after a part `done` in [0,1] of the training.

        The share of the softened prediction is smaller by how far its largest probability is above
        that of the label, so that the label stays ahead where the share is below 1.
        """
        temperature = annealed(self.loss.adr_temperature, done)
        share = annealed(self.loss.adr_share, done)
        chances = F.softmax(seen / temperature, 1)
        behind = chances.max(1).values - chances.gather(1, labels[:, None])[:, 0]
        own = (share - behind).clamp(0, 1)[:, None]
        return own * chances + (1 - own) * F.one_hot(labels, seen.shape[1]).to(chances)


def annealed(ends: tuple[float, float], done: float) -> float:
    """From the first to the second value along half a cosine, at a part `done` in [0,1]."""
    start, end = ends
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


OBJECTIVES: dict[str, type[Trades | CrossEntropy]] = {
    "plain": Plain,
    "trades": Trades,
    "pgd-at": CrossEntropy,
    "fgsm-rs": CrossEntropy,
    "ikl": ImprovedKL,
    "adr": Rectified,
}


def of(loss: config.Loss) -> Objective:
    """The objective that a config names."""
    return OBJECTIVES[loss.name](loss)


@dataclasses.dataclass(frozen=True)
class Attacked:
    """A batch and its adversarial version, float [B,C,H,W] in [0,1]."""

    student: Student
    x: Tensor
    adversarial: Tensor
    labels: Tensor
    target: Tensor
    objective: Objective
    class_means: losses.ClassMeans
    # logits of x with their graph, where the attack's target came from the very forward that trains
    clean: Tensor | None = None

    def losses(self, maps: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(loss on clean images, robust loss, features [B,F] of the adversarial images, or their
        `maps` [B,F,h,w]); the first two are scalars.

        BatchNorm sees the batches in the order of `loss.first`. IKL's class means take the clean
        logits in.
        """
        logits, features = self._forward(maps)
        self.objective.observe(logits)
        return *self.objective.terms(logits), features

    def total(self) -> Tensor:
        """The whole loss, which AWP ascends; leaves the class means alone."""
        return torch.stack(self.objective.terms(self._forward()[0])).sum()

    def _forward(self, maps: bool = False) -> tuple[Logits, Tensor]:
        """(logits of the views that the loss needs, adversarial features)."""
        forward = self.student.with_map if maps else self.student.with_features
        clean, both = self.clean, self.objective.views == 2
        if both and clean is None and self.objective.loss.first == "clean":
            clean = self.student(self.x)
        adversarial, features = forward(self.adversarial)
        if both and clean is None:
            clean = self.student(self.x)
        logits = Logits(clean, adversarial, self.labels, self.target, self.class_means)
        return logits, features


@contextlib.contextmanager
def attacked(
    student: Student,
    x: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    loss: config.Loss,
    threat: config.Threat,
    class_means: losses.ClassMeans,
    epoch: int,
    average: nn.Module | None = None,
    done: float = 0.0,
    clock: Clock | None = None,
    climb: Climb = pgd.climbed,
) -> Iterator[Attacked]:
    """Attack a batch as training does; where the recipe perturbs weights (AWP), they are perturbed
    until the block ends. `average` are the averaged weights, which ADR asks, and `done` is the part
    of the training that is over. The `clock` gets the time of the attack, and `climb`
    takes its steps.
    """
    objective = of(loss)
    perturb = bool(loss.awp) and epoch >= loss.awp_from_epoch
    clean, target = None, labels
    if objective.views == 2:
        if threat.mode == "train" and not perturb and loss.first == "clean":
            # the target of the attack is this very forward: same weights, mode and batch give the
            # same logits
            clean = student(x)
            target = F.softmax(clean.detach(), 1)
        else:
            with torch.no_grad(), pgd.as_attacked(student, threat):
                target = F.softmax(student(x), 1)
    if isinstance(objective, Rectified):
        assert average is not None
        with torch.no_grad(), pgd.as_attacked(average, threat):
            target = objective.rectified(average(x), labels, done)
    with clock.part("attack") if clock else contextlib.nullcontext():
        adversarial = objective.attack(student, x, target, threat, noise.to(x.device), climb)
    batch = Attacked(student, x, adversarial, labels, target, objective, class_means, clean)
    with (
        perturbation.perturbed(student, loss.awp, batch.total)
        if perturb
        else contextlib.nullcontext()
    ):
        yield batch
