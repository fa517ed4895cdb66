"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) cut into independent pieces with unchanged
verdicts.

The result of an AutoAttack batch depends on which images share the batch and on the seed: every
attack reseeds torch's global generator before each batch. So a single process is reproduced to the
bit by running its attacks as barriers, cutting at each barrier the survivors, in index order, into
chunks of `batch`, and attacking every chunk with the same seed, on any machine of the same kind.
`Plan` holds the barriers, `attack_chunk` is the unit of work, and `single_process` is both in a
loop:

    correct = clean_correct(student, images, labels, batch)
    plan = Plan(correct, images, batch, settings.attacks(num_classes))
    while chunks := plan.chunks():
        for chunk in chunks:
            plan.merge(chunk, *attack_chunk(student, chunk.case(images, labels, settings)))

Levels:
    reference: the student as it is, the attacks without what is computed in vain; verdicts and
        images are pyautoattack's, to the bit.
    fast: the student folded and channels_last, an image leaves a run when it is fooled; same maths,
        other rounding, each success confirmed by the student as it is.
    screen: also bfloat16 where the device has it, and of the attacks only APGD, towards the few
        classes that MALT finds nearest; an upper bound.

With streams='sample' every image has random numbers of its own (see `draws`), so its verdict
depends neither on batch nor on order, as far as a row's logits do not depend on its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dra_ray.attacks import apgd, fab, levels, square
from dra_ray.attacks.apgd import Objective
from dra_ray.attacks.draws import Draws, PerBatch, PerImage
from dra_ray.attacks.pgd import frozen
from dra_ray.attacks.plan import Case, Plan, Settings
from dra_ray.attacks.stock import PACKAGED, package, projection_l2, projection_linf
from dra_ray.config.catalogue import ATTACKS

PROJECTIONS: dict[str, fab.Project] = {"linf": projection_linf, "l2": projection_l2}
OBJECTIVES: dict[str, Objective] = {"ce": apgd.cross_entropy, "dlr": apgd.dlr}


def clean_correct(student: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """Correct on clean images float [N,C,H,W], in parts of `batch` as AutoAttack does: bool [N]."""
    with torch.no_grad():
        return torch.cat(
            [
                student(x).max(1)[1] == y
                for x, y in zip(torch.split(images, batch), torch.split(labels, batch), strict=True)
            ]
        )


def attack_chunk(student: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """Run one attack on one chunk, as the single process would run it on this batch.

    Returns:
        broken bool [n], by one forward pass of the student as it is, and the images float [n,C,H,W]
        that do it (the clean image where not broken). torch's global generators are left as they
        were.

    Raises:
        ValueError: for an attack that is not in the catalogue, or without the images' numbers where
            streams='sample' needs them.
    """
    images, labels, settings = case.images, case.labels, case.settings
    if case.attack not in LOOPS:
        raise ValueError(f"attack '{case.attack}' is not one of {sorted(LOOPS)}")
    devices = [images.device] if images.is_cuda else []
    with frozen(student), torch.no_grad(), torch.random.fork_rng(devices):
        logits = student(images)
        steady = torch.equal(logits, student(images)) and settings.version != "rand"
        targets = min(ATTACKS[case.attack].targets, logits.shape[1] - 1)
        plain = settings.level == "reference"
        attacked = student if plain else levels.prepare(student, settings.level, images.device)
        # our Square in the l2 ball gives every image windows of its own, the package does not
        apart = case.attack == "square" and settings.threat.norm == "l2"
        packaged = case.attack in PACKAGED and (apart or not steady)
        if settings.streams == "batch" and packaged:
            adversarial = package(attacked, case, targets)
        else:
            loop = _Loop(attacked, case, _draws(case), targets, steady)
            adversarial = LOOPS[case.attack](loop)
        broken = student(adversarial).max(1)[1] != labels
        return broken, torch.where(broken[:, None, None, None], adversarial, images)


def single_process(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    batch: int,
    seconds: dict[str, float] | None = None,
) -> Plan:
    """All attacks on images float [N,C,H,W], one chunk after another; adds each attack's time to
    `seconds`.
    """
    correct = clean_correct(student, images, labels, batch)
    with torch.no_grad():
        num_classes = student(images[:1]).shape[1]
    plan = Plan(correct, images, batch, settings.attacks(num_classes))
    while chunks := plan.chunks():
        for chunk in chunks:
            started = time.perf_counter()
            plan.merge(chunk, *attack_chunk(student, chunk.case(images, labels, settings)))
            if seconds is not None:
                seconds[chunk.attack] = (
                    seconds.get(chunk.attack, 0.0) + time.perf_counter() - started
                )
    return plan


def _draws(case: Case) -> Draws:
    if case.settings.streams == "batch":
        return PerBatch(case.settings.seed)
    if case.numbers is None:
        raise ValueError("streams='sample' draws from the images' numbers: give numbers, int64 [n]")
    return PerImage(case.settings.seed, ATTACKS[case.attack].stream, case.numbers)


# -- our loops over the attacks' formulas, which leave out what is computed in vain ----------------
class _Loop:
    """One batch that one of our loops attacks.

    `student` is the one that is attacked (as the level prepares it), `steady` says that it gives
    the same logits again, to the bit.
    """

    def __init__(
        self, student: nn.Module, case: Case, draws: Draws, targets: int, steady: bool
    ) -> None:
        self.batch = student, case.images, case.labels
        self.attack, self.settings = ATTACKS[case.attack], case.settings
        self.draws, self.targets = draws, targets
        # the reference keeps fooled images in the batch: their rows decide the others' last bits
        self.drop = steady and (self.settings.level != "reference" or not draws.shared)
        self.restarts = self.settings.of_version.restarts

    @property
    def ascent(self) -> apgd.Ascent:
        threat, steps = self.settings.threat, self.settings.effort.apgd_steps
        eot = self.settings.of_version.eot
        return apgd.Ascent(threat.norm, threat.eps, steps, eot, self.drop)

    @property
    def search(self) -> fab.Search:
        threat, steps = self.settings.threat, self.settings.effort.fab_steps
        return fab.Search(threat.norm, threat.eps, steps, PROJECTIONS[threat.norm], self.drop)


def _apgd(loop: _Loop) -> Tensor:
    assert loop.attack.loss
    objective = OBJECTIVES[loop.attack.loss]
    return apgd.untargeted(
        *loop.batch, loop.ascent, objective=objective, restarts=loop.restarts, draws=loop.draws
    )


def _apgd_targeted(loop: _Loop) -> Tensor:
    return apgd.targeted(*loop.batch, loop.ascent, loop.targets, loop.draws)


def _apgd_malt(loop: _Loop) -> Tensor:
    return apgd.towards_nearest(*loop.batch, loop.ascent, loop.targets, loop.draws)


def _fab(loop: _Loop) -> Tensor:
    return fab.untargeted(*loop.batch, loop.search, loop.restarts, loop.draws)


def _fab_targeted(loop: _Loop) -> Tensor:
    return fab.targeted(*loop.batch, loop.search, loop.targets)


def _square(loop: _Loop) -> Tensor:
    student, images, labels = loop.batch
    settings = loop.settings
    rows = levels.Rows(student, exact=settings.level == "reference" and loop.draws.shared)
    attack = square.linf if settings.threat.norm == "linf" else square.l2
    queries = settings.effort.square_queries
    return attack(rows, images, labels, settings.threat.eps, queries, loop.draws)


LOOPS: dict[str, Callable[[_Loop], Tensor]] = {
    "apgd-ce": _apgd,
    "apgd-dlr": _apgd,
    "apgd-t": _apgd_targeted,
    "fab": _fab,
    "fab-t": _fab_targeted,
    "square": _square,
    "apgd-malt": _apgd_malt,
}
