"""What one evaluation by AutoAttack has to do: its settings, and how images are cut into chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dra_ray import config
from dra_ray.config.catalogue import STANDARD, VERSIONS, Effort, Version, attacks
from dra_ray.storage import large


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What verdicts depend on beside the student, the images and how they are batched; the meaning
    of each field is `config.Evaluation`'s.
    """

    threat: config.Threat
    seed: int
    effort: Effort = STANDARD
    version: str = "standard"
    level: str = "reference"
    streams: str = "batch"

    @property
    def of_version(self) -> Version:
        return VERSIONS[self.version]

    def attacks(self, num_classes: int) -> tuple[str, ...]:
        return attacks(num_classes, self.version, self.level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One batch that one attack gets.

    Attributes:
        images: float [n,C,H,W] in [0,1], on the student's device.
        labels: int64 [n].
        attack: a name of `catalogue.ATTACKS`.
        numbers: the images' own numbers in the data set, int64 [n]; streams='sample' draws from
            them.
    """

    images: Tensor
    labels: Tensor
    attack: str
    settings: Settings
    numbers: Tensor | None = None


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

    def case(self, images: Tensor, labels: Tensor, settings: Settings) -> Case:
        """Its rows of all images float [N,C,H,W] and labels int64 [N], to be attacked."""
        at = self.indices
        return Case(
            images=images[at],
            labels=labels[at],
            attack=self.attack,
            settings=settings,
            numbers=at,
        )


def plan_chunks(alive: Tensor, batch: int) -> list[Tensor]:
    """Indices where `alive` bool [N] holds, in order, in parts of `batch`: the batches of a single
    process.
    """
    indices = alive.nonzero().squeeze(1)
    return list(torch.split(indices, batch)) if len(indices) else []


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
        attacks: Sequence[str],
    ) -> None:
        self.alive = correct.clone()
        self.adversarial = large.empty(images.shape, images.dtype).copy_(images)
        self.first_failure = ["" if good else "clean" for good in correct.tolist()]
        self.robust_after: dict[str, int] = {}
        self.batch = batch
        self._attacks = list(attacks)
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
            # nobody is left: as in a single process, the remaining attacks are skipped
            self._close(attack)
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
