"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) cut into independent pieces with unchanged verdicts.

The result of an AutoAttack batch depends on which images share the batch and on the seed: every attack reseeds torch's
global generator before each batch. So a single process is reproduced to the bit by running its attacks as barriers,
cutting at each barrier the survivors, in index order, into chunks of `batch`, and attacking every chunk with the same
seed, on any machine of the same kind. `Plan` holds the barriers, `attack_chunk` is the unit of work, and
`single_process` is both in a loop:

    plan = Plan(clean_correct(student, images, labels, batch), images, batch, num_classes)
    while chunks := plan.chunks():
        for chunk in chunks:
            plan.merge(chunk, *attack_chunk(student, images[chunk.indices], labels[chunk.indices], chunk.attack, threat, seed))

| level | student | attacks | verdicts |
|---|---|---|---|
| reference | as it is | without what is computed in vain | pyautoattack's, and its images, to the bit |
| fast | folded, channels_last | an image leaves a run when it is fooled | same maths, other rounding; confirmed by the student as it is |
| screen | also bfloat16 where the device has it | the two APGD attacks only | an upper bound |

With streams='sample' every image has random numbers of its own (see `draws`), so its verdict depends neither on batch nor
on order, as far as a row's logits do not depend on its batch. This is the only module that imports pyautoattack.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack.fab_projections import projection_l2, projection_linf
from torch import Tensor, nn

from dra_ray import config
from dra_ray.errors import DataError
from dra_ray.robust import apgd, fab, levels, square
from dra_ray.robust.attacks import frozen
from dra_ray.robust.draws import Draws, PerBatch, PerImage

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ATTACKS,
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
SCREEN = ("apgd-ce", "apgd-t", "apgd-dlr")  # what of a version the level screen runs
CLASSES = {"apgd-t": 4, "apgd-dlr": 3}  # the DLR losses divide by z(1) - (z(3) + z(4))/2 and z(1) - z(3)
TARGETS = 9
RESTARTS = {"standard": 1, "plus": 5, "rand": 1}  # of apgd-ce, apgd-dlr and fab
EOT = {"standard": 1, "plus": 1, "rand": 20}
NORMS = {"linf": "Linf", "l2": "L2"}
PROJECTIONS: dict[str, fab.Project] = {"linf": projection_linf, "l2": projection_l2}
SQUARE_DROP = 0.002  # above it, official AutoAttack calls its own gradient attacks unreliable
SILENT = logging.getLogger("dra_ray.silent")
SILENT.disabled = True


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
    """One unit of work: images `indices` int64 [n], ascending, that attack number k of `attack` gets as one batch."""

    attack: str
    k: int
    indices: Tensor

    @property
    def name(self) -> str:
        return f"{self.attack}-{self.k:05d}"


def attacks(num_classes: int, version: str = "standard", norm: str = "linf", level: str = "reference") -> tuple[str, ...]:
    """The attacks of a version, in their order, that `num_classes` classes allow (see `class_flags`) and the level runs."""
    if norm not in NORMS:
        raise ValueError(f"norm '{norm}' is not one of {tuple(NORMS)}")
    allowed = [name for name in VERSIONS[version] if num_classes >= CLASSES.get(name, 2)]
    return tuple(name for name in allowed if level != "screen" or name in SCREEN)


def plan_chunks(alive: Tensor, batch: int) -> list[Tensor]:
    """Indices where `alive` bool [N] holds, in order, in parts of `batch`: the batches of a single process."""
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
        """What the next attack has to do; empty when all are over. Call it when every chunk handed out is merged."""
        if self._open:
            raise AssertionError(f"chunks {sorted(self._open)} are not merged yet")
        while self._attacks:
            attack = self._attacks[0]
            parts = plan_chunks(self.alive, self.batch)
            if parts:
                self._open = set(range(len(parts)))
                return [Chunk(attack, k, part) for k, part in enumerate(parts)]
            self._close(attack)  # nobody is left: as in a single process, the remaining attacks are skipped
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


def clean_correct(student: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """Correct on clean images float [N,C,H,W], in parts of `batch` as AutoAttack does: bool [N]."""
    with torch.no_grad():
        return torch.cat([student(x).max(1)[1] == y for x, y in zip(images.split(batch), labels.split(batch), strict=True)])


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
        numbers: the images' own numbers in the data set, int64 [n]; streams='sample' draws from them.

    Returns:
        broken bool [n], by one forward pass of the student as it is, and the images float [n,C,H,W] that do it (the clean
        image where not broken). torch's global generators are left as they were.
    """
    devices = [images.device] if images.is_cuda else []
    with frozen(student), torch.no_grad(), torch.random.fork_rng(devices):
        logits = student(images)
        steady = torch.equal(logits, student(images)) and version != "rand"
        ours = student if level == "reference" else levels.prepare(student, level, images.device)
        case = Case(ours, images, labels, threat, seed, effort, version, level, logits.shape[1], steady)
        if streams == "batch" and (not steady or (attack == "square" and threat.norm == "l2")):
            adversarial = _package(case, attack)
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
    """All attacks on images float [N,C,H,W], one chunk after another; adds each attack's time to `seconds`."""
    correct = clean_correct(student, images, labels, batch)
    with torch.no_grad():
        num_classes = student(images[:1]).shape[1]
    plan = Plan(correct, images, batch, num_classes, version, threat.norm, level)
    while chunks := plan.chunks():
        for chunk in chunks:
            started = time.perf_counter()
            part = images[chunk.indices], labels[chunk.indices], chunk.attack, threat, seed, effort
            plan.merge(chunk, *attack_chunk(student, *part, version=version, level=level, streams=streams, numbers=chunk.indices))
            if seconds is not None:
                seconds[chunk.attack] = seconds.get(chunk.attack, 0.0) + time.perf_counter() - started
    return plan


@dataclasses.dataclass(frozen=True)
class Case:
    """What an attack on a chunk needs; `steady`: the student gives the same logits again, to the bit."""

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
    search = fab.Search(threat.norm, threat.eps, case.effort.fab_steps, PROJECTIONS[threat.norm], drop)
    restarts = RESTARTS[case.version]
    if attack in ("apgd-ce", "apgd-dlr"):
        return apgd.untargeted(student, x, labels, ascent, apgd.cross_entropy if attack == "apgd-ce" else apgd.dlr, restarts, draws)
    if attack == "apgd-t":
        return apgd.targeted(student, x, labels, ascent, case.targets, draws)
    if attack == "fab-t":
        return fab.targeted(student, x, labels, search, case.targets)
    if attack == "fab":
        return fab.untargeted(student, x, labels, search, restarts, draws)
    if attack == "square":
        rows = levels.Rows(student, exact=case.level == "reference" and draws.shared)
        return (square.linf if threat.norm == "linf" else square.l2)(rows, x, labels, threat.eps, case.effort.square_queries, draws)
    raise ValueError(f"attack '{attack}' is not one of {sorted({*VERSIONS['standard'], *VERSIONS['plus']})}")


def _package(case: Case, attack: str) -> Tensor:
    """The package's own loop: where the student draws random numbers, each pass in it counts, and so does their order."""
    run = _loaded(case.student, case.threat, case.seed, case.effort, case.version, case.targets, case.images.device)
    images, labels = case.images.clone(), case.labels.clone()
    if attack in ("apgd-ce", "apgd-dlr"):
        run.apgd.loss = attack.removeprefix("apgd-")
        return run.apgd.perturb(images, labels)
    if attack in ("fab", "fab-t"):
        run.fab.targeted = attack == "fab-t"
        run.fab.n_restarts = 1 if run.fab.targeted else run.fab.n_restarts
        return run.fab.perturb(images, labels)
    return {"apgd-t": run.apgd_targeted, "square": run.square}[attack].perturb(images, labels)


def _loaded(student: nn.Module, threat: config.Threat, seed: int, effort: Effort, version: str, targets: int, device: torch.device) -> AutoAttack:
    """The package's own object, so that every hyper-parameter of a version is its own."""
    run = AutoAttack(student, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version=version, device=device)
    run.apgd_targeted.n_target_classes = run.fab.n_target_classes = targets
    run.fab.n_iter, run.square.n_queries = effort.fab_steps, effort.square_queries
    for one in (run.apgd, run.apgd_targeted):
        one.n_iter = effort.apgd_steps
        one.n_iter_2, one.n_iter_min, one.size_decr = (max(int(part * one.n_iter), 1) for part in (0.22, 0.06, 0.03))  # step size checkpoints
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
    """pyautoattack itself, as its users run it: (adversarial images [N,C,H,W], robust bool [N]); see `single_process` for the rest.

    Only the number of steps (`effort`) and of target classes, where there are fewer than ten, are not its own.
    """
    with torch.no_grad():
        num_classes = student(images[:1]).shape[1]
    run = _loaded(student, threat, seed, effort, version, min(TARGETS, num_classes - 1), images.device)
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


# -- what a reader must know before believing the number ----------------------------------------------------------
def check(student: nn.Module, images: Tensor, labels: Tensor, *, version: str = "standard") -> list[str]:
    """The warning flags of AutoAttack (its flags document), as sentences, from one batch; empty when all is well.

    Left out: its check for defences that call autograd, which traces every Python call of the process. Version rand is
    meant for randomised students, so there randomness is no flag; `is_randomised` tells.

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
        flags.append("The student gives different logits for the same image: standard AutoAttack overrates randomised models; use EOT attacks.")
    if _probabilities(runs[0]):
        flags.append("The student seems to return probabilities, not logits: gradients vanish and it is overrated; return the logits.")
    if runs[0].shape[1] >= 3:
        flat = _flat_images(student, images, labels)
        if flat:
            flags.append(f"{flat} of {len(images)} images have a zero gradient of the DLR loss: gradient attacks may fail there without robustness.")
    return flags


def is_randomised(student: nn.Module, images: Tensor, labels: Tensor) -> bool:
    """Whether five passes over images float [n,C,H,W] differ by more than rounding (AutoAttack's rule)."""
    with torch.no_grad():
        return _randomised([student(images) for _ in range(5)], labels)


def class_flags(num_classes: int, version: str = "standard") -> list[str]:
    """What is missing from a version of AutoAttack with few classes."""
    missing = [name for name in VERSIONS[version] if name not in attacks(num_classes, version)]
    fewer = num_classes <= TARGETS and "fab-t" in VERSIONS[version]
    if missing:
        needs = " and ".join(f"{name} was left out (its loss needs {CLASSES[name]})" for name in missing)
        targets = f" and fab-t used {num_classes - 1} target classes instead of {TARGETS}" if fewer else ""
        return [f"With {num_classes} classes the attack {needs}{targets}: this is weaker than {version} AutoAttack."]
    if fewer:
        return [f"With {num_classes} classes the targeted attacks used all {num_classes - 1} target classes instead of {TARGETS}."]
    return []


def notes(version: str, level: str, streams: str, num_classes: int, norm: str = "linf") -> list[str]:
    """Sentences that must stand beside a result: how it is related to what AutoAttack's authors would get."""
    found = []
    if level == "screen":
        names = " and ".join(attacks(num_classes, version, norm, level))
        found.append(f"Screened with {names} only, in bfloat16 where the device has it: an upper bound for sweeps, never a reported number.")
    if level == "fast":
        found.append(
            "Same mathematics as AutoAttack with other rounding (folded weights, other memory layout): equivalent, not identical to the bit."
        )
    if streams == "sample":
        found.append(
            "Random numbers belong to images, not to batches: equivalent to AutoAttack, not identical; verdicts depend on no batch and no order."
        )
        if version == "rand":
            found.append("A randomised student's own random numbers still depend on its batches.")
    if version == "plus":
        found.append("Version plus: more attacks than the standard version that leaderboards use.")
    if version == "rand":
        found.append("Version rand (APGD with gradients averaged over 20 passes) counts an image as broken when one pass misclassifies it.")
    return found


def effort_flags(effort: Effort) -> list[str]:
    if effort.standard:
        return []
    return [
        f"Reduced effort (apgd {effort.apgd_steps} steps, fab {effort.fab_steps} steps, square {effort.square_queries} queries): "
        "this is not standard AutoAttack and overrates robustness."
    ]


def square_flags(robust_after: dict[str, int], images: int) -> list[str]:
    """Official rule: Square lowering the accuracy by more than 0.2 points makes the gradient attacks suspect."""
    others = [count for attack, count in robust_after.items() if attack != "square"]
    if "square" not in robust_after or not others:
        return []
    drop = (min(others) - robust_after["square"]) / images
    if drop <= SQUARE_DROP:
        return []
    return [f"The black-box attack Square lowered the accuracy by {drop:.2%} after the gradient attacks: they may be misled; try an adaptive attack."]


def _require_sane_input(student: nn.Module, images: Tensor, labels: Tensor) -> None:
    if student.training:
        raise DataError("the student is in train mode, where an image's logits depend on its batch; call student.eval()")
    if images.dim() != 4 or not images.is_floating_point() or len(images) != len(labels) or not len(images):
        raise DataError(f"images {images.dtype} {list(images.shape)} with labels {list(labels.shape)}: expected float [n,C,H,W] and int64 [n], n > 0")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise DataError(f"images span [{low:g}, {high:g}] and must lie in [0, 1]; divide uint8 images by 255 and normalise inside the student")


def _require_sane_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise DataError(f"the student returned logits of shape {list(logits.shape)} for {len(labels)} images; expected [{len(labels)}, classes]")
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise DataError(f"{bad} of {len(logits)} images have logits that are NaN or infinite; the training diverged")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(f"labels span {low}..{high}, but the student has {logits.shape[1]} classes (0..{logits.shape[1] - 1})")


def _randomised(runs: list[Tensor], labels: Tensor) -> bool:
    hits = {int((logits.argmax(1) == labels).sum()) for logits in runs}
    unit = [logits / (logits.norm(dim=1, keepdim=True) + 1e-10) for logits in runs]
    return len(hits) > 1 or any(float((a - b).norm(dim=1).max()) > 1e-4 for i, a in enumerate(unit) for b in unit[i + 1 :])


def _probabilities(logits: Tensor) -> bool:
    return bool(logits.max() < 1 + 1e-5 and logits.min() > -1e-5 and ((logits.sum(1) - 1).abs() < 1e-5).all())


def _flat_images(student: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Images at which the difference of logits (Croce & Hein 2020, equation 6) has a gradient of exactly zero."""
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
