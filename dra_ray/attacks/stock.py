"""The packaged AutoAttack, imported in this module alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack.fab_projections import projection_l2, projection_linf
from torch import Tensor, nn

from dra_ray import config
from dra_ray.attacks.plan import NORMS, STANDARD, TARGETS, Case, Effort, attacks

__all__ = ["package", "projection_l2", "projection_linf", "stock"]

SILENT = logging.getLogger("dra_ray.silent")
SILENT.disabled = True


def package(case: Case, attack: str) -> Tensor:
    """The package's own loop: where the student draws random numbers, each pass in it counts, and
    so does their order.
    """
    run = _loaded(
        case.student,
        case.threat,
        case.seed,
        case.effort,
        case.version,
        case.targets,
        case.images.device,
    )
    images, labels = case.images.clone(), case.labels.clone()
    if attack in ("apgd-ce", "apgd-dlr"):
        run.apgd.loss = attack.removeprefix("apgd-")
        return run.apgd.perturb(images, labels)
    if attack in ("fab", "fab-t"):
        run.fab.targeted = attack == "fab-t"
        run.fab.n_restarts = 1 if run.fab.targeted else run.fab.n_restarts
        return run.fab.perturb(images, labels)
    return {"apgd-t": run.apgd_targeted, "square": run.square}[attack].perturb(images, labels)


def _loaded(
    student: nn.Module,
    threat: config.Threat,
    seed: int,
    effort: Effort,
    version: str,
    targets: int,
    device: torch.device,
) -> AutoAttack:
    """The package's own object, so that every hyper-parameter of a version is its own."""
    run = AutoAttack(
        student, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version=version, device=device
    )
    run.apgd_targeted.n_target_classes = run.fab.n_target_classes = targets
    run.fab.n_iter, run.square.n_queries = effort.fab_steps, effort.square_queries
    for one in (run.apgd, run.apgd_targeted):
        one.n_iter = effort.apgd_steps
        one.n_iter_2, one.n_iter_min, one.size_decr = (
            max(int(part * one.n_iter), 1) for part in (0.22, 0.06, 0.03)
        )  # step size checkpoints
        one.logger = SILENT  # its one warning, zero gradients, is ours to give: see `check`
    return run


def stock(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: config.Threat,
    seed: int,
    batch: int,
    effort: Effort = STANDARD,
    version: str = "standard",
    seconds: dict[str, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """pyautoattack itself, as its users run it: (adversarial images [N,C,H,W], robust bool [N]);
    see `single_process` for the rest.

    Only the number of steps (`effort`) and of target classes, where there are fewer than ten, are
    not its own.
    """
    with torch.no_grad():
        num_classes = student(images[:1]).shape[1]
    run = _loaded(
        student, threat, seed, effort, version, min(TARGETS, num_classes - 1), images.device
    )
    run.attacks_to_run = list(attacks(num_classes, version, threat.norm))
    if seconds is not None:
        _time(run.apgd, lambda: f"apgd-{run.apgd.loss}", seconds)
        _time(run.apgd_targeted, lambda: "apgd-t", seconds)
        _time(run.fab, lambda: "fab-t" if run.fab.targeted else "fab", seconds)
        _time(run.square, lambda: "square", seconds)
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        adversarial, predicted = run.run_standard_evaluation(images, labels, batch_size=batch)
    return adversarial, predicted == labels


def _time(attack: Any, name: Callable[[], str], seconds: dict[str, float]) -> None:
    perturb = attack.perturb

    def timed(x: Tensor, y: Tensor) -> Tensor:
        started = time.perf_counter()
        found: Tensor = perturb(x, y)
        seconds[name()] = seconds.get(name(), 0.0) + time.perf_counter() - started
        return found

    attack.perturb = timed
