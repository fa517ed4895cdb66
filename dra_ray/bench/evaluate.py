"""`dra bench evaluate`: AutoAttack as the package runs it against our three levels, on the same
images, one after another.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dra_ray import data, memory
from dra_ray.attacks import autoattack, levels, stock
from dra_ray.attacks.plan import Settings
from dra_ray.config.catalogue import STANDARD, Effort
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.students import checkpoint

STOCK = "pyautoattack"
TOTAL = "all attacks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way through all attacks: time in all and by attack, who is robust bool [N], the images
    [N,C,H,W].
    """

    wall_s: float
    cpu_s: float
    attack_s: dict[str, float]
    robust: Tensor
    adversarial: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all ways share."""

    student: nn.Module
    images: Tensor
    labels: Tensor
    settings: Settings
    batch: int


def compare(
    run: Store,
    *,
    images: int,
    batch: int,
    eps_255: float | None,
    effort: float,
    threads: int,
    device: str = "cpu",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time pyautoattack and the three levels on the first test images of a run: (rows to print,
    figures).

    All ways run in this process, one after another, with the same seed, batch and steps, on the
    run's trained student, whose parameters require gradients for the package, as its users have
    them. `effort` scales all steps; below 1, neither times nor accuracies are those of standard
    AutoAttack, and their ratios are close to it at best.

    Raises:
        ConfigError: for a number of images or a radius that the run cannot give.
    """
    torch.set_num_threads(threads)
    task, facts = _task(run, images, batch, eps_255, effort, device)
    with torch.no_grad():  # loads and tunes the kernels
        for _ in range(2):
            task.student(task.images[:batch])
    outcomes = {STOCK: _timed(functools.partial(_stock, task))}
    for level in levels.LEVELS:
        outcomes[level] = _timed(functools.partial(_ours, task, level))
    return _rows(outcomes), facts | _figures(outcomes)


def _task(
    run: Store, images: int, batch: int, eps_255: float | None, effort: float, device: str
) -> tuple[Task, dict[str, Any]]:
    student, experiment = checkpoint.load(run)
    test = data.in_memory(data.load(experiment.data).test)
    if images > len(test.labels):
        raise ConfigError(
            f"--images {images}: the run's test set has {len(test.labels)} images; ask for as many "
            "at most"
        )
    threat = (
        experiment.threat
        if eps_255 is None
        else experiment.threat.model_copy(update={"eps_255": eps_255})
    )
    if not 0 < threat.eps_255 <= 255:
        raise ConfigError(
            f"--eps-255 {threat.eps_255:g}: a radius lies above 0 and up to 255; write 8 for 8/255"
        )
    steps = Effort(*(max(1, round(effort * full)) for full in dataclasses.astuple(STANDARD)))
    x, y = data.to_float(test.images[:images]).to(device), test.labels[:images].to(device)
    student = student.to(device).eval().requires_grad_(True)
    facts = {
        "model": experiment.model.name,
        "data": experiment.data.name,
        "images": images,
        "batch": batch,
        "norm": threat.norm,
        "eps_255": threat.eps_255,
        "effort": effort,
        "steps": dataclasses.asdict(steps),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name()
        if x.is_cuda
        else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "screen_bf16": levels.has_bfloat16(x.device),
    }
    settings = Settings(threat=threat, seed=experiment.evaluation.seed, effort=steps)
    task = Task(student=student, images=x, labels=y, settings=settings, batch=batch)
    return task, facts


def _stock(task: Task, seconds: dict[str, float]) -> tuple[Tensor, Tensor]:
    return stock.stock(
        task.student, task.images, task.labels, task.settings, batch=task.batch, seconds=seconds
    )


def _ours(task: Task, level: str, seconds: dict[str, float]) -> tuple[Tensor, Tensor]:
    memory.keep_freed()  # as every batch of an evaluation does; the package ran before
    settings = dataclasses.replace(task.settings, level=level)
    plan = autoattack.single_process(
        task.student, task.images, task.labels, settings, batch=task.batch, seconds=seconds
    )
    return plan.adversarial, plan.alive


def _timed(work: Callable[[dict[str, float]], tuple[Tensor, Tensor]]) -> Outcome:
    seconds: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    adversarial, robust = work(seconds)
    robust.sum().item()  # waits for the device
    return Outcome(
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        attack_s=seconds,
        robust=robust,
        adversarial=adversarial,
    )


def _rows(outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """A row for each attack, and for all of them with everything around them."""
    rows = []
    for attack in [*outcomes[STOCK].attack_s, TOTAL]:
        times = {
            name: outcome.wall_s if attack == TOTAL else outcome.attack_s.get(attack)
            for name, outcome in outcomes.items()
        }
        first = times[STOCK]
        row: dict[str, Any] = {"attack": attack} | {
            f"{name}_s": None if t is None else round(t, 2) for name, t in times.items()
        }
        row |= {
            f"{level}_speedup": round(first / t, 2) if first and (t := times[level]) else None
            for level in levels.LEVELS
        }
        rows.append(row)
    return rows


def _figures(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    theirs = outcomes[STOCK]
    n = len(theirs.robust)
    figures: dict[str, Any] = {
        "survivors_share": int(theirs.robust.sum()) / n,
        "seconds": {},
        "cpu_s": {},
        "total_s": {},
        "accuracy": {},
    }
    for name, outcome in outcomes.items():
        figures["seconds"][name] = {
            attack: round(seconds, 3) for attack, seconds in outcome.attack_s.items()
        }
        figures["total_s"][name], figures["cpu_s"][name] = (
            round(outcome.wall_s, 3),
            round(outcome.cpu_s, 3),
        )
        figures["accuracy"][name] = int(outcome.robust.sum()) / n
    for level in levels.LEVELS:
        ours = outcomes[level]
        figures[f"{level}_speedup"] = theirs.wall_s / ours.wall_s
        # of this process alone, so other work on the machine matters less
        figures[f"{level}_cpu_speedup"] = theirs.cpu_s / ours.cpu_s
        figures[f"{level}_verdicts_differ"] = int((ours.robust != theirs.robust).sum())
        figures[f"{level}_accuracy_gap"] = figures["accuracy"][level] - figures["accuracy"][STOCK]
    figures["reference_bit_identical"] = torch.equal(
        outcomes["reference"].adversarial, theirs.adversarial
    )
    return figures
