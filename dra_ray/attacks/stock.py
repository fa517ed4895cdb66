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

from dra_ray.attacks.plan import Case, Settings
from dra_ray.config.catalogue import ATTACKS, TARGETS, VERSIONS, attacks

__all__ = ["PACKAGED", "package", "projection_l2", "projection_linf", "stock"]

PACKAGED = frozenset(name for version in VERSIONS.values() for name in version.attacks)
NORMS = {"linf": "Linf", "l2": "L2"}  # as the package spells them
SILENT = logging.getLogger("dra_ray.silent")
SILENT.disabled = True


def package(student: nn.Module, case: Case, targets: int) -> Tensor:
    """The package's own loop, towards `targets` classes where it is targeted: where the student
    draws random numbers, each pass in it counts, and so does their order.
    """
    run = _loaded(student, case.settings, targets, case.images.device)
    attack = ATTACKS[case.attack]
    if attack.loss and not attack.targets:
        run.apgd.loss = attack.loss
        loop = run.apgd
    elif case.attack in ("fab", "fab-t"):
        run.fab.targeted = attack.targets > 0
        run.fab.n_restarts = 1 if attack.targets else run.fab.n_restarts
        loop = run.fab
    else:
        loop = {"apgd-t": run.apgd_targeted, "square": run.square}[case.attack]
    adversarial: Tensor = loop.perturb(case.images.clone(), case.labels.clone())
    return adversarial


def _loaded(
    student: nn.Module, settings: Settings, targets: int, device: torch.device
) -> AutoAttack:
    """The package's own object, so that every hyper-parameter of a version is its own."""
    run = AutoAttack(
        student,
        norm=NORMS[settings.threat.norm],
        eps=settings.threat.eps,
        seed=settings.seed,
        version=settings.version,
        device=device,
    )
    run.apgd_targeted.n_target_classes = run.fab.n_target_classes = targets
    effort = settings.effort
    run.fab.n_iter, run.square.n_queries = effort.fab_steps, effort.square_queries
    for apgd in (run.apgd, run.apgd_targeted):
        apgd.n_iter = effort.apgd_steps
        # the checkpoints of the step size, which the package derives only when it is constructed
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (
            max(int(part * apgd.n_iter), 1) for part in (0.22, 0.06, 0.03)
        )
        apgd.logger = SILENT  # its one warning, zero gradients, is ours to give: see `check`
    return run


def stock(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    batch: int,
    seconds: dict[str, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """pyautoattack itself, as its users run it: (adversarial images [N,C,H,W], robust bool [N]);
    see `single_process` for the arguments.

    Of `settings`, level and streams do not matter. Only the number of steps (`effort`) and of
    target classes, where there are fewer than ten, are not the package's own.
    """
    with torch.no_grad():
        num_classes = student(images[:1]).shape[1]
    run = _loaded(student, settings, min(TARGETS, num_classes - 1), images.device)
    # the package knows no levels: all attacks of the version
    run.attacks_to_run = list(attacks(num_classes, settings.version))
    if seconds is not None:
        _time(run.apgd, lambda: f"apgd-{run.apgd.loss}", seconds)
        _time(run.apgd_targeted, lambda: "apgd-t", seconds)
        _time(run.fab, lambda: "fab-t" if run.fab.targeted else "fab", seconds)
        _time(run.square, lambda: "square", seconds)
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        adversarial, predicted = run.run_standard_evaluation(images, labels, batch_size=batch)
    return adversarial, predicted == labels


def _time(attack: Any, name: Callable[[], str], seconds: dict[str, float]) -> None:
    """The package has no hook for times, so its attack's method is wrapped; `attack` is untyped
    there.
    """
    perturb = attack.perturb

    def timed(x: Tensor, y: Tensor) -> Tensor:
        started = time.perf_counter()
        adversarial: Tensor = perturb(x, y)
        seconds[name()] = seconds.get(name(), 0.0) + time.perf_counter() - started
        return adversarial

    attack.perturb = timed
