"""What AutoAttack runs: its attacks, versions and efforts, and how images are cut into chunks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dra_ray import config

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ATTACKS,
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
SCREEN = ("apgd-ce", "apgd-t", "apgd-dlr")  # what of a version the level screen runs
CLASSES = {
    "apgd-t": 4,
    "apgd-dlr": 3,
}  # the DLR losses divide by z(1) - (z(3) + z(4))/2 and z(1) - z(3)
TARGETS = 9
RESTARTS = {"standard": 1, "plus": 5, "rand": 1}  # of apgd-ce, apgd-dlr and fab
EOT = {"standard": 1, "plus": 1, "rand": 20}
NORMS = {"linf": "Linf", "l2": "L2"}


@dataclasses.dataclass(frozen=True)
class Effort:
    """Steps of each attack; anything but the defaults is no standard AutoAttack and is flagged."""

    apgd_steps: int = 100
    fab_steps: int = 100
    square_queries: int = 5000

    @property
    def standard(self) -> bool:
        return self == STANDARD


STANDARD = Effort()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One unit of work: images `indices` int64 [n], ascending, that attack number k of `attack`
    gets as one batch.
    """

    attack: str
    k: int
    indices: Tensor

    @property
    def name(self) -> str:
        return f"{self.attack}-{self.k:05d}"


def attacks(
    num_classes: int, version: str = "standard", norm: str = "linf", level: str = "reference"
) -> tuple[str, ...]:
    """The attacks of a version, in their order, that `num_classes` classes allow (see
    `class_flags`) and the level runs.
    """
    if norm not in NORMS:
        raise ValueError(f"norm '{norm}' is not one of {tuple(NORMS)}")
    allowed = [name for name in VERSIONS[version] if num_classes >= CLASSES.get(name, 2)]
    return tuple(name for name in allowed if level != "screen" or name in SCREEN)


def plan_chunks(alive: Tensor, batch: int) -> list[Tensor]:
    """Indices where `alive` bool [N] holds, in order, in parts of `batch`: the batches of a single
    process.
    """
    indices = alive.nonzero().squeeze(1)
    return list(indices.split(batch)) if len(indices) else []


class Plan:
    """Barriers and bookkeeping of one evaluation: who is still robust, and what fooled the others.

    Attributes:
        alive: bool [N], not fooled so far (clean errors never were alive).
        adversarial: float [N,C,H,W], the fooling image where there is one, else the clean one.
        first_failure: [N] names: "clean", an attack, or "" for a robust image.
        robust_after: attack -> images robust after it.
    """

    def __init__(
        self,
        correct: Tensor,
        images: Tensor,
        batch: int,
        num_classes: int,
        version: str = "standard",
        norm: str = "linf",
        level: str = "reference",
    ) -> None:
        self.alive = correct.clone()
        self.adversarial = images.clone()
        self.first_failure = ["" if good else "clean" for good in correct.tolist()]
        self.robust_after: dict[str, int] = {}
        self.batch = batch
        self._attacks = list(attacks(num_classes, version, norm, level))
        self._fooled = torch.zeros_like(self.alive)
        self._open: set[int] = set()

    def chunks(self) -> list[Chunk]:
        """What the next attack has to do; empty when all are over. Call it when every chunk handed
        out is merged.
        """
        if self._open:
            raise AssertionError(f"chunks {sorted(self._open)} are not merged yet")
        while self._attacks:
            attack = self._attacks[0]
            parts = plan_chunks(self.alive, self.batch)
            if parts:
                self._open = set(range(len(parts)))
                return [Chunk(attack, k, part) for k, part in enumerate(parts)]
            self._close(
                attack
            )  # nobody is left: as in a single process, the remaining attacks are skipped
        return []

    def merge(self, chunk: Chunk, broken: Tensor, adversarial: Tensor) -> bool:
        """Take a chunk's result, in any order; True when it was the last one of its attack."""
        self._open.remove(chunk.k)
        fooled = chunk.indices[broken]
        self._fooled[fooled] = True
        self.adversarial[fooled] = adversarial[broken].to(self.adversarial)
        for index in fooled.tolist():
            self.first_failure[index] = chunk.attack
        if not self._open:
            self.alive &= ~self._fooled
            self._close(chunk.attack)
        return not self._open

    def _close(self, attack: str) -> None:
        self._attacks.remove(attack)
        self.robust_after[attack] = int(self.alive.sum())


@dataclasses.dataclass(frozen=True)
class Case:
    """What an attack on a chunk needs; `steady`: the student gives the same logits again, to the
    bit.
    """

    student: nn.Module
    images: Tensor
    labels: Tensor
    threat: config.Threat
    seed: int
    effort: Effort
    version: str
    level: str
    num_classes: int
    steady: bool

    @property
    def targets(self) -> int:
        return min(TARGETS, self.num_classes - 1)
