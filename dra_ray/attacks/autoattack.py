"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) cut into independent pieces with unchanged
verdicts.

The result of an AutoAttack batch depends on which images share the batch and on the seed: every
attack reseeds torch's global generator before each batch. So a single process is reproduced to the
bit by running its attacks as barriers, cutting at each barrier the survivors, in index order, into
chunks of `batch`, and attacking every chunk with the same seed, on any machine of the same kind.
`Plan` holds the barriers, `attack_chunk` is the unit of work, and `single_process` is both in a
loop:

    plan = Plan(clean_correct(student, images, labels, batch), images, batch, num_classes)
    while chunks := plan.chunks():
        for chunk in chunks:
            plan.merge(chunk, *attack_chunk(student, images[chunk.indices], labels[chunk.indices],
            chunk.attack, threat, seed))

| level | student | attacks | verdicts |
|---|---|---|---|
| reference | as it is | without what is computed in vain | pyautoattack's, and its images, to the bit |
| fast | folded, channels_last | an image leaves a run when it is fooled | same maths, other rounding; confirmed by the student as it is |
| screen | also bfloat16 where the device has it | the two APGD attacks only | an upper bound |

With streams='sample' every image has random numbers of its own (see `draws`), so its verdict
depends neither on batch nor on order, as far as a row's logits do not depend on its batch.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from dra_ray import config
from dra_ray.attacks import apgd, fab, levels, square
from dra_ray.attacks.draws import Draws, PerBatch, PerImage
from dra_ray.attacks.pgd import frozen
from dra_ray.attacks.plan import EOT, RESTARTS, STANDARD, VERSIONS, Case, Effort, Plan
from dra_ray.attacks.stock import package, projection_l2, projection_linf

PROJECTIONS: dict[str, fab.Project] = {"linf": projection_linf, "l2": projection_l2}


def clean_correct(student: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """Correct on clean images float [N,C,H,W], in parts of `batch` as AutoAttack does: bool [N]."""
    with torch.no_grad():
        return torch.cat(
            [
                student(x).max(1)[1] == y
                for x, y in zip(images.split(batch), labels.split(batch), strict=True)
            ]
        )


def attack_chunk(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: str,
    threat: config.Threat,
    seed: int,
    effort: Effort = STANDARD,
    *,
    version: str = "standard",
    level: str = "reference",
    streams: str = "batch",
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one attack on one chunk, as the single process would run it on this batch.

    Args:
        images: float [n,C,H,W] in [0,1], on the student's device; labels: int64 [n].
        numbers: the images' own numbers in the data set, int64 [n]; streams='sample' draws from
            them.

    Returns:
        broken bool [n], by one forward pass of the student as it is, and the images float [n,C,H,W]
        that do it (the clean image where not broken). torch's global generators are left as they
        were.
    """
    devices = [images.device] if images.is_cuda else []
    with frozen(student), torch.no_grad(), torch.random.fork_rng(devices):
        logits = student(images)
        steady = torch.equal(logits, student(images)) and version != "rand"
        ours = student if level == "reference" else levels.prepare(student, level, images.device)
        case = Case(
            ours, images, labels, threat, seed, effort, version, level, logits.shape[1], steady
        )
        if streams == "batch" and (not steady or (attack == "square" and threat.norm == "l2")):
            adversarial = package(case, attack)
        else:
            adversarial = _own(case, attack, _draws(streams, seed, attack, numbers))
        broken = student(adversarial).max(1)[1] != labels
        return broken, torch.where(broken[:, None, None, None], adversarial, images)


def single_process(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: config.Threat,
    seed: int,
    batch: int,
    effort: Effort = STANDARD,
    *,
    version: str = "standard",
    level: str = "reference",
    streams: str = "batch",
    seconds: dict[str, float] | None = None,
) -> Plan:
    """All attacks on images float [N,C,H,W], one chunk after another; adds each attack's time to
    `seconds`.
    """
    correct = clean_correct(student, images, labels, batch)
    with torch.no_grad():
        num_classes = student(images[:1]).shape[1]
    plan = Plan(correct, images, batch, num_classes, version, threat.norm, level)
    while chunks := plan.chunks():
        for chunk in chunks:
            started = time.perf_counter()
            part = images[chunk.indices], labels[chunk.indices], chunk.attack, threat, seed, effort
            plan.merge(
                chunk,
                *attack_chunk(
                    student,
                    *part,
                    version=version,
                    level=level,
                    streams=streams,
                    numbers=chunk.indices,
                ),
            )
            if seconds is not None:
                seconds[chunk.attack] = (
                    seconds.get(chunk.attack, 0.0) + time.perf_counter() - started
                )
    return plan


def _draws(streams: str, seed: int, attack: str, numbers: Tensor | None) -> Draws:
    if streams == "batch":
        return PerBatch(seed)
    if numbers is None:
        raise ValueError("streams='sample' draws from the images' numbers: give numbers, int64 [n]")
    return PerImage(seed, attack, numbers)


def _own(case: Case, attack: str, draws: Draws) -> Tensor:
    """Our loops over the attacks' formulas, which leave out what is computed in vain."""
    student, x, labels, threat = case.student, case.images, case.labels, case.threat
    drop = case.steady and (case.level != "reference" or not draws.shared)
    ascent = apgd.Ascent(threat.norm, threat.eps, case.effort.apgd_steps, EOT[case.version], drop)
    search = fab.Search(
        threat.norm, threat.eps, case.effort.fab_steps, PROJECTIONS[threat.norm], drop
    )
    restarts = RESTARTS[case.version]
    if attack in ("apgd-ce", "apgd-dlr"):
        return apgd.untargeted(
            student,
            x,
            labels,
            ascent,
            apgd.cross_entropy if attack == "apgd-ce" else apgd.dlr,
            restarts,
            draws,
        )
    if attack == "apgd-t":
        return apgd.targeted(student, x, labels, ascent, case.targets, draws)
    if attack == "fab-t":
        return fab.targeted(student, x, labels, search, case.targets)
    if attack == "fab":
        return fab.untargeted(student, x, labels, search, restarts, draws)
    if attack == "square":
        rows = levels.Rows(student, exact=case.level == "reference" and draws.shared)
        return (square.linf if threat.norm == "linf" else square.l2)(
            rows, x, labels, threat.eps, case.effort.square_queries, draws
        )
    raise ValueError(
        f"attack '{attack}' is not one of {sorted({*VERSIONS['standard'], *VERSIONS['plus']})}"
    )
