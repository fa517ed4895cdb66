"""What AutoAttack is made of, as data: one record for each attack, version and stage of an
evaluation. It imports no torch, so that reports and progress bars may read it at no cost.

A new attack is one record here and its name in the version that runs it, one loop in
`attacks.autoattack.LOOPS`, and the module with its formulas.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

TARGETS = 9  # classes that a targeted attack tries, where there are as many wrong ones
FEW_TARGETS = 3  # the same at level screen, which chooses them by their distance
DEFAULT_CLASSES = 10  # of a student whose logits are not known yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of an evaluation.

    Attributes:
        name: in files, digests and log rows; never changes.
        label: for people.
        passes: forward passes that it takes for an image of a robust model; only ratios matter.
    """

    name: str
    label: str
    passes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Stage):
    """One attack of AutoAttack.

    Attributes:
        stream: of its random numbers, where every image draws its own; never used again.
        loss: what it ascends; None for an attack that follows a boundary or a margin by itself.
        min_classes: with fewer, the loss divides by a difference that does not exist.
        targets: classes that it goes towards in turn, at most; 0 for an untargeted attack.
    """

    stream: int
    loss: Literal["ce", "dlr"] | None = None
    min_classes: int = 2
    targets: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """A version of AutoAttack: its attacks in their order.

    Attributes:
        screen: what level screen runs instead.
        restarts: of the untargeted APGD and FAB.
        eot: passes that a gradient of APGD is averaged over.
    """

    attacks: tuple[str, ...]
    screen: tuple[str, ...]
    restarts: int = 1
    eot: int = 1


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
CLEAN = Stage(name="clean", label="clean images, PGD", passes=75)
CURVE = Stage(name="curve", label="PGD at other radii", passes=100)
CORRUPTIONS = Stage(name="corruptions", label="corruptions", passes=100)
# The targeted DLR loss divides by z(1) - (z(3) + z(4))/2, the other one by z(1) - z(3).
ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack(name="apgd-ce", label="APGD-CE", passes=200, stream=1, loss="ce"),
        Attack(name="apgd-dlr", label="APGD-DLR", passes=200, stream=2, loss="dlr", min_classes=3),
        Attack(
            name="apgd-t",
            label="APGD-T",
            passes=1800,
            stream=3,
            loss="dlr",
            min_classes=4,
            targets=TARGETS,
        ),
        Attack(name="fab", label="FAB", passes=1500, stream=4),
        Attack(name="fab-t", label="FAB-T", passes=2700, stream=5, targets=TARGETS),
        Attack(name="square", label="Square", passes=5000, stream=6),
        # none of AutoAttack's: APGD-T towards the classes that MALT finds nearest
        Attack(
            name="apgd-malt",
            label=f"APGD-T to {FEW_TARGETS} classes by MALT",
            passes=620,
            stream=7,
            loss="dlr",
            min_classes=4,
            targets=FEW_TARGETS,
        ),
    )
}
STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (CLEAN, *ATTACKS.values(), CURVE, CORRUPTIONS)
}
VERSIONS: dict[str, Version] = {
    "standard": Version(
        attacks=("apgd-ce", "apgd-t", "fab-t", "square"), screen=("apgd-ce", "apgd-malt")
    ),
    "plus": Version(
        attacks=("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
        screen=("apgd-ce", "apgd-dlr", "apgd-malt"),
        restarts=5,
    ),
    "rand": Version(attacks=("apgd-ce", "apgd-dlr"), screen=("apgd-ce", "apgd-dlr"), eot=20),
}

if TYPE_CHECKING:
    VersionName = str
else:
    VersionName = Literal[tuple(VERSIONS)]


def attacks(
    num_classes: int, version: str = "standard", level: str = "reference"
) -> tuple[str, ...]:
    """The attacks of a version, in their order, that `num_classes` classes allow (see
    `checks.class_flags`) and the level runs.
    """
    of = VERSIONS[version]
    names = of.screen if level == "screen" else of.attacks
    return tuple(name for name in names if num_classes >= ATTACKS[name].min_classes)


def label(name: str) -> str:
    """An attack for people; one that the catalogue does not know (a folder from elsewhere) in
    capitals.
    """
    return ATTACKS[name].label if name in ATTACKS else name.upper()


def in_order(names: set[str], version: str) -> list[str]:
    """Attacks in the order in which the version ran them (files hold them by name), others last."""
    of = VERSIONS.get(version, VERSIONS["standard"])
    known = list(dict.fromkeys((*of.attacks, *of.screen)))
    return [name for name in known if name in names] + sorted(names - set(known))


# of `dra analyse`, in the order of the paper's figures
ANALYSES = ("geometry", "similarity", "dimension", "sae", "frequency", "probe")
