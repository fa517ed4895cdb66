"""Checks of a classifier before and after an attack, and the notes that its result carries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dra_ray.attacks.pgd import frozen
from dra_ray.config.catalogue import ATTACKS, TARGETS, VERSIONS, Effort, attacks, label
from dra_ray.errors import DataError

SQUARE_DROP = 0.002  # above it, official AutoAttack calls its own gradient attacks unreliable


# -- what a reader must know before believing the number -------------------------------------------
def check(
    student: nn.Module, images: Tensor, labels: Tensor, *, version: str = "standard"
) -> list[str]:
    """The warning flags of AutoAttack (its flags document), as sentences, from one batch; empty
    when all is well.

    Left out: its check for defences that call autograd, which traces every Python call of the
    process. Version rand is meant for randomised students, so there randomness is no flag;
    `is_randomised` tells.

    Args:
        images: float [n,C,H,W] in [0,1]; labels: int64 [n].

    Raises:
        DataError: for what makes the verdicts meaningless rather than doubtful.
    """
    _require_sane_input(student, images, labels)
    with torch.no_grad():
        runs = [student(images) for _ in range(5)]
    _require_sane_logits(runs[0], labels)
    flags = class_flags(runs[0].shape[1], version)
    if version != "rand" and _randomised(runs, labels):
        flags.append(
            "The student gives different logits for the same image: standard AutoAttack overrates "
            "randomised models; use EOT attacks."
        )
    if _probabilities(runs[0]):
        flags.append(
            "The student seems to return probabilities, not logits: gradients vanish and it is "
            "overrated; return the logits."
        )
    if runs[0].shape[1] >= 3:
        flat = _flat_images(student, images, labels)
        if flat:
            flags.append(
                f"{flat} of {len(images)} images have a zero gradient of the DLR loss: gradient "
                "attacks may fail there without robustness."
            )
    return flags


def is_randomised(student: nn.Module, images: Tensor, labels: Tensor) -> bool:
    """Whether five passes over images float [n,C,H,W] differ by more than rounding (AutoAttack's
    rule).
    """
    with torch.no_grad():
        return _randomised([student(images) for _ in range(5)], labels)


def class_flags(num_classes: int, version: str = "standard") -> list[str]:
    """What is missing from a version of AutoAttack with few classes."""
    complete, possible = VERSIONS[version].attacks, attacks(num_classes, version)
    missing = [name for name in complete if name not in possible]
    fewer = num_classes <= TARGETS and "fab-t" in complete
    if missing:
        needs = " and ".join(
            f"{name} was left out (its loss needs {ATTACKS[name].min_classes})" for name in missing
        )
        targets = (
            f" and fab-t used {num_classes - 1} target classes instead of {TARGETS}"
            if fewer
            else ""
        )
        return [
            f"With {num_classes} classes the attack {needs}{targets}: this is weaker than "
            f"{version} AutoAttack."
        ]
    if fewer:
        return [
            f"With {num_classes} classes the targeted attacks used all {num_classes - 1} target "
            f"classes instead of {TARGETS}."
        ]
    return []


def notes(version: str, level: str, streams: str, num_classes: int) -> list[str]:
    """Sentences that must stand beside a result: how it is related to what AutoAttack's authors
    would get.
    """
    sentences = []
    if level == "screen":
        names = " and ".join(label(name) for name in attacks(num_classes, version, level))
        sentences.append(
            f"Screened with {names} only, in bfloat16 where the device has it: an upper bound for "
            "sweeps, never a reported number."
        )
    if level == "fast":
        sentences.append(
            "Same mathematics as AutoAttack with other rounding (folded weights, other memory "
            "layout): equivalent, not identical to the bit."
        )
    if streams == "sample":
        sentences.append(
            "Random numbers belong to images, not to batches: equivalent to AutoAttack, not "
            "identical; verdicts depend on no batch and no order."
        )
        if version == "rand":
            sentences.append(
                "A randomised student's own random numbers still depend on its batches."
            )
    if version == "plus":
        sentences.append(
            "Version plus: more attacks than the standard version that leaderboards use."
        )
    if version == "rand":
        sentences.append(
            "Version rand (APGD with gradients averaged over 20 passes) counts an image as broken "
            "when one pass misclassifies it."
        )
    return sentences


def effort_flags(effort: Effort) -> list[str]:
    if effort.standard:
        return []
    return [
        f"Reduced effort (apgd {effort.apgd_steps} steps, fab {effort.fab_steps} steps, square "
        f"{effort.square_queries} queries): "
        "this is not standard AutoAttack and overrates robustness."
    ]


def square_flags(robust_after: dict[str, int], images: int) -> list[str]:
    """Official rule: Square lowering the accuracy by more than 0.2 points makes the gradient
    attacks suspect.
    """
    others = [count for attack, count in robust_after.items() if attack != "square"]
    if "square" not in robust_after or not others:
        return []
    drop = (min(others) - robust_after["square"]) / images
    if drop <= SQUARE_DROP:
        return []
    return [
        f"The black-box attack Square lowered the accuracy by {drop:.2%} after the gradient "
        "attacks: they may be misled; try an adaptive attack."
    ]


def _require_sane_input(student: nn.Module, images: Tensor, labels: Tensor) -> None:
    if student.training:
        raise DataError(
            "the student is in train mode, where an image's logits depend on its batch; call "
            "student.eval()"
        )
    if (
        images.dim() != 4
        or not images.is_floating_point()
        or len(images) != len(labels)
        or not len(images)
    ):
        raise DataError(
            f"images {images.dtype} {list(images.shape)} with labels {list(labels.shape)}: "
            "expected float [n,C,H,W] and int64 [n], n > 0"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise DataError(
            f"images span [{low:g}, {high:g}] and must lie in [0, 1]; divide uint8 images by 255 "
            "and normalise inside the student"
        )


def _require_sane_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise DataError(
            f"the student returned logits of shape {list(logits.shape)} for {len(labels)} images; "
            f"expected [{len(labels)}, classes]"
        )
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise DataError(
            f"{bad} of {len(logits)} images have logits that are NaN or infinite; the training "
            "diverged"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"labels span {low}..{high}, but the student has {logits.shape[1]} classes "
            f"(0..{logits.shape[1] - 1})"
        )


def _randomised(runs: list[Tensor], labels: Tensor) -> bool:
    hits = {int((logits.argmax(1) == labels).sum()) for logits in runs}
    unit = [logits / (logits.norm(dim=1, keepdim=True) + 1e-10) for logits in runs]
    return len(hits) > 1 or any(
        float((a - b).norm(dim=1).max()) > 1e-4 for i, a in enumerate(unit) for b in unit[i + 1 :]
    )


def _probabilities(logits: Tensor) -> bool:
    return bool(
        logits.max() < 1 + 1e-5
        and logits.min() > -1e-5
        and ((logits.sum(1) - 1).abs() < 1e-5).all()
    )


def _flat_images(student: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Images at which the difference of logits (Croce & Hein 2020, equation 6) has a gradient of
    exactly zero.
    """
    with frozen(student), torch.enable_grad():
        x = images.clone().requires_grad_(True)
        logits = student(x)
        top = logits.sort(1).values
        true = logits.gather(1, labels[:, None]).squeeze(1)
        other = torch.where(logits.argmax(1) == labels, top[:, -2], top[:, -1])
        loss = -(true - other) / (top[:, -1] - top[:, -3] + 1e-12)
        if not loss.requires_grad:
            return len(images)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return int((gradient.flatten(1).abs().sum(1) == 0).sum())
