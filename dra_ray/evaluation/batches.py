"""One batch of an evaluation, wherever it runs: what to do, doing it, and the numerics that decide
its last bits.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dra_ray import config, data, memory
from dra_ray.attacks import autoattack, checks
from dra_ray.attacks.pgd import evaluate_pgd
from dra_ray.attacks.plan import Case, Settings
from dra_ray.attacks.randomised import eot_pgd
from dra_ray.config.catalogue import Effort
from dra_ray.data import corruptions
from dra_ray.storage import Store

Arrays = dict[str, np.ndarray]
Kind = Literal["clean", "attack", "radius", "corrupted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """images float [n,C,H,W] (uint8 where corrupted), labels int64 [n] and what to do with them.

    Attributes:
        kind: clean and PGD accuracy with AutoAttack's warnings; one attack of AutoAttack; PGD at
            another radius; accuracy alone.
        attack: of AutoAttack, or what the batch is for.
        numbers: int64 [n], where the images stand in the whole set.
        noise: of PGD's starts, float [restarts,n,C,H,W]; None where there is no PGD.
        first: whether this is the first batch, whose warnings AutoAttack gives.
        corruption: name and severity; images come clean where evaluation.corruptions is
            "generated".
    """

    images: Tensor
    labels: Tensor
    kind: Kind
    attack: str
    threat: config.Threat
    evaluation: config.Evaluation
    effort: Effort
    device: str
    numbers: Tensor
    noise: Tensor | None = None
    first: bool = False
    corruption: tuple[str, int] | None = None


def run(student: nn.Module, work: Work, file: Store, digest: str) -> Arrays:
    """Do one batch, write the outcome to `file`, and return what was written. On one thread, where
    sums have one order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory.keep_freed()
    torch.backends.cudnn.benchmark = False  # it picks kernels by a race
    started = time.monotonic()
    facts = json.dumps(numerics(work.device))
    full: str | None = None
    try:
        student = student.to(work.device)
        with _seeded(work):
            outcome = {
                "clean": _clean,
                "attack": _attack,
                "radius": _radius,
                "corrupted": _corrupted,
            }[work.kind](student, work)
    except torch.OutOfMemoryError as error:
        # raised again below: until this handler is left, its traceback keeps the batch's tensors on
        # the GPU
        full = str(error)
    finally:
        torch.set_num_threads(threads)
    if work.device == "cuda":
        torch.cuda.empty_cache()  # the next batch may come to another process on the same GPU
    if full is not None:
        raise torch.OutOfMemoryError(full)
    outcome |= {
        "seconds": np.array(time.monotonic() - started),
        "digest": np.array(digest),
        "numerics": np.array(facts),
    }
    file.write_npz(**outcome)
    return outcome


@contextmanager
def _seeded(work: Work) -> Iterator[None]:
    """What a randomised student draws depends on the batch alone, not on what its process did
    before.
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if work.device == "cuda" else []):
        torch.manual_seed(work.evaluation.seed + int(work.numbers[0]))
        yield


def _clean(student: nn.Module, work: Work) -> Arrays:
    images, labels = work.images.to(work.device), work.labels.to(work.device)
    flags = checks.check(
        student, images, labels, version=work.evaluation.version
    )  # raises where a batch makes no sense
    with torch.no_grad():
        classes = student(images[:1]).shape[1]
    share, worst = _pgd(student, work, images, labels)
    return {
        "clean": autoattack.clean_correct(student, images, labels, len(labels)).cpu().numpy(),
        "pgd": share,
        "pgd_worst": worst,
        "classes": np.array(classes),
        "randomised": np.array(work.first and checks.is_randomised(student, images, labels)),
        "flags": np.array(flags if work.first else [], dtype=str),
    }


def _attack(student: nn.Module, work: Work) -> Arrays:
    evaluation = work.evaluation
    settings = Settings(
        threat=work.threat,
        seed=evaluation.seed,
        effort=work.effort,
        version=evaluation.version,
        level=evaluation.level,
        streams=evaluation.streams,
    )
    case = Case(
        images=work.images.to(work.device),
        labels=work.labels.to(work.device),
        attack=work.attack,
        settings=settings,
        numbers=work.numbers,
    )
    broken, adversarial = autoattack.attack_chunk(student, case)
    return {"broken": broken.cpu().numpy(), "adversarial": adversarial.cpu().numpy()}


def _radius(student: nn.Module, work: Work) -> Arrays:
    images, labels = work.images.to(work.device), work.labels.to(work.device)
    if not work.threat.eps_255:
        return {
            "share": autoattack.clean_correct(student, images, labels, len(labels))
            .float()
            .cpu()
            .numpy()
        }
    return {"share": _pgd(student, work, images, labels)[0]}


def _corrupted(student: nn.Module, work: Work) -> Arrays:
    """Many images, in parts of the evaluation's batch."""
    assert work.corruption
    generated = work.evaluation.corruptions == corruptions.MADE
    images = (
        corruptions.generated(work.images, *work.corruption, work.evaluation.seed)
        if generated
        else work.images
    )
    batch = work.evaluation.batch
    parts = zip(torch.split(images, batch), torch.split(work.labels, batch), strict=True)
    with torch.no_grad():
        right = [student(data.to_float(x).to(work.device)).argmax(1).cpu() == y for x, y in parts]
    return {"correct": torch.cat(right).numpy()}


def _pgd(
    student: nn.Module, work: Work, images: Tensor, labels: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Share of passes that are right, float [n], and whether all are, bool [n]; of the worst
    restart. Without EOT there is one pass.
    """
    assert work.noise is not None
    noise, steps, eot = work.noise.to(work.device), work.evaluation.pgd_steps, work.evaluation.eot
    if eot > 1:
        score = eot_pgd(student, images, labels, work.threat, noise, steps, eot=eot)
        return score.mean.cpu().numpy(), score.worst.cpu().numpy()
    right = evaluate_pgd(student, images, labels, work.threat, noise, steps)
    return right.float().cpu().numpy(), right.cpu().numpy()


def numerics(device: str) -> dict[str, Any]:
    """Settings that decide the last bits."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_version": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }
