"""Standard AutoAttack (Croce & Hein 2020, arXiv 2003.01690) cut into independent pieces with unchanged verdicts.

The result of an AutoAttack batch depends on which images share the batch and on the seed: every attack reseeds torch's
global generator before each batch. So a single process is reproduced to the bit by running its four attacks as four
barriers, cutting at each barrier the survivors, in index order, into chunks of `batch`, and attacking every chunk with
the same seed, on any machine of the same kind. `Plan` holds the barriers, `attack_chunk` is the unit of work:

    plan = Plan(clean_correct(student, images, labels, batch), images, batch, num_classes)
    while chunks := plan.chunks():
        for chunk in chunks:
            plan.merge(chunk, *attack_chunk(student, images[chunk.indices], labels[chunk.indices], chunk.attack, threat, seed))

The attacks themselves are those of the package pyautoattack; this is the only module that imports it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from dra_ray import config
from dra_ray.errors import DataError
from dra_ray.robust.attacks import frozen

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
DLR_T_CLASSES = 4  # the targeted DLR loss divides by z(1) - (z(3) + z(4))/2
SQUARE_DROP = 0.002  # above it, official AutoAttack calls its own gradient attacks unreliable
MEMO_ROWS = 400_000  # about 200 MB of 8x8 images
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


def attacks(num_classes: int) -> tuple[str, ...]:
    """The attacks of the standard version that `num_classes` classes allow; see `class_flags`."""
    return ATTACKS if num_classes >= DLR_T_CLASSES else tuple(name for name in ATTACKS if name != "apgd-t")


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

    def __init__(self, correct: Tensor, images: Tensor, batch: int, num_classes: int) -> None:
        self.alive = correct.clone()
        self.adversarial = images.clone()
        self.first_failure = ["" if good else "clean" for good in correct.tolist()]
        self.robust_after: dict[str, int] = {}
        self.batch = batch
        self._attacks = list(attacks(num_classes))
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
    student: nn.Module, images: Tensor, labels: Tensor, attack: str, threat: config.Threat, seed: int, effort: Effort = STANDARD
) -> tuple[Tensor, Tensor]:
    """Run one attack on one chunk, as the single process would run it on this batch.

    Args:
        images: float [n,C,H,W] in [0,1], on the student's device; labels: int64 [n].

    Returns:
        broken bool [n], and the images float [n,C,H,W] that do it (the clean image where not broken). torch's global
        generators are left as they were.
    """
    devices = [images.device] if images.is_cuda else []
    with frozen(student), torch.no_grad(), torch.random.fork_rng(devices):
        run = _single(student, images.device, threat, seed, effort, num_classes=student(images).shape[1])
        adversarial = _perturb(run, attack, images.clone(), labels.clone())
        broken = student(adversarial).max(1)[1] != labels
        return broken, torch.where(broken[:, None, None, None], adversarial, images)


def _single(student: nn.Module, device: torch.device, threat: config.Threat, seed: int, effort: Effort, num_classes: int) -> AutoAttack:
    """The package's own object, so that every hyper-parameter of the standard version is its own."""
    run = AutoAttack(student, norm={"linf": "Linf"}[threat.norm], eps=threat.eps, seed=seed, version="standard", device=device)
    targets = min(run.fab.n_target_classes, num_classes - 1)
    run.apgd_targeted.n_target_classes = run.fab.n_target_classes = targets
    run.fab.n_iter, run.square.n_queries = effort.fab_steps, effort.square_queries
    for apgd in (run.apgd, run.apgd_targeted):
        apgd.n_iter = effort.apgd_steps
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(part * apgd.n_iter), 1) for part in (0.22, 0.06, 0.03))  # step size checkpoints
        apgd.logger = SILENT  # its one warning, zero gradients, is ours to give: see `check`
    return run


def _perturb(run: AutoAttack, attack: str, images: Tensor, labels: Tensor) -> Tensor:
    if attack == "apgd-ce":
        run.apgd.loss = "ce"
        return run.apgd.perturb(images, labels)
    if attack == "apgd-t":
        return run.apgd_targeted.perturb(images, labels)
    if attack == "fab-t":
        run.fab.targeted = True
        return run.fab.perturb(images, labels)
    if attack == "square":
        if candidates(images) * 8 <= run.square.n_queries:
            run.square.predict = Memo(run.model)
        return run.square.perturb(images, labels)
    raise ValueError(f"attack '{attack}' is not one of {ATTACKS}")


def candidates(images: Tensor) -> int:
    """How many different one-pixel changes Square can propose: windows times signs per channel."""
    channels, height, width = images.shape[1:]
    return max(height - 1, 1) * max(width - 1, 1) * 2**channels


class Memo:
    """Logits of a student that remembers every image it has seen; for Square on small images.

    From query 1000 on Square changes single pixels, and on 8x8 grey images there are only 98 such changes against 4000
    queries: nine tenths of its images were seen before. A row's logits must not depend on the rest of its batch, to
    the bit; that is a property of the kernels, so it is checked whenever a batch size comes up for the first time,
    and at the first difference the student is called plainly from then on.
    """

    def __init__(self, student: Callable[[Tensor], Tensor], limit: int = MEMO_ROWS) -> None:
        self.student = student
        self.exact = True
        self.computed = 0  # rows given to the student
        self._limit = limit
        self._known: dict[bytes, int] = {}
        self._used = 0  # rows of _logits
        self._logits = torch.empty(0)
        self._sizes: set[int] = set()

    def __call__(self, x: Tensor) -> Tensor:
        if not self.exact or len(x) < 2:  # one row takes other kernels (a matrix-vector product)
            return self._compute(x)
        keys = _keys(x)
        places = [self._known.get(key, -1) for key in keys]
        if len(x) not in self._sizes:
            return self._first(x, keys, places)
        fresh = [row for row, place in enumerate(places) if place < 0]
        if not fresh:
            return self._logits[places]
        padded = fresh + fresh[:1] * (_bucket(len(fresh), len(x)) - len(fresh))
        part = self._compute(x[padded])
        if len(padded) not in self._sizes:
            self._sizes.add(len(padded))
            whole = self._compute(x)
            self.exact = torch.equal(whole[padded], part)
            if not self.exact:
                return whole
        seen = [row for row, place in enumerate(places) if place >= 0]
        logits = part.new_empty(len(x), part.shape[1])
        logits[seen] = self._logits[[places[row] for row in seen]]
        logits[fresh] = part[: len(fresh)]
        self._remember([keys[row] for row in fresh], part[: len(fresh)])
        return logits

    def _first(self, x: Tensor, keys: list[bytes], places: list[int]) -> Tensor:
        """A batch size not seen before: compute all rows, and compare those that are known."""
        self._sizes.add(len(x))
        logits = self._compute(x)
        seen = [row for row, place in enumerate(places) if place >= 0]
        if seen:
            self.exact = torch.equal(logits[seen], self._logits[[places[row] for row in seen]])
        if self.exact:
            fresh = [row for row, place in enumerate(places) if place < 0]
            self._remember([keys[row] for row in fresh], logits[fresh])
        return logits.clone()  # Square writes into what it gets

    def _compute(self, x: Tensor) -> Tensor:
        self.computed += len(x)
        return self.student(x)

    def _remember(self, keys: list[bytes], logits: Tensor) -> None:
        keys = keys[: self._limit - self._used]
        start, self._used = self._used, self._used + len(keys)
        if self._used > len(self._logits):
            grown = logits.new_empty(max(self._used, 2 * start, 4096), logits.shape[1])
            if start:
                grown[:start] = self._logits[:start]
            self._logits = grown
        self._logits[start : self._used] = logits[: len(keys)]
        self._known.update(zip(keys, range(start, self._used), strict=True))


def _keys(x: Tensor) -> list[bytes]:
    """The bytes of every row of x [n, ...]."""
    whole = x.contiguous().cpu().numpy().tobytes()
    size = len(whole) // len(x)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _bucket(rows: int, most: int) -> int:
    """The next power of two from 2, or `most`: few batch sizes, each checked once."""
    return min(max(2, 1 << (rows - 1).bit_length()), most)


# -- what a reader must know before believing the number ----------------------------------------------------------
def check(student: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    """The warning flags of AutoAttack (its flags document), as sentences, from one batch; empty when all is well.

    Left out: its check for defences that call autograd, which traces every Python call of the process.

    Args:
        images: float [n,C,H,W] in [0,1]; labels: int64 [n].

    Raises:
        DataError: for what makes the verdicts meaningless rather than doubtful.
    """
    _require_sane_input(student, images, labels)
    with torch.no_grad():
        runs = [student(images) for _ in range(5)]
    _require_sane_logits(runs[0], labels)
    flags = class_flags(runs[0].shape[1])
    if _randomised(runs, labels):
        flags.append("The student gives different logits for the same image: standard AutoAttack overrates randomised models; use EOT attacks.")
    if _probabilities(runs[0]):
        flags.append("The student seems to return probabilities, not logits: gradients vanish and it is overrated; return the logits.")
    if runs[0].shape[1] >= 3:
        flat = _flat_images(student, images, labels)
        if flat:
            flags.append(f"{flat} of {len(images)} images have a zero gradient of the DLR loss: gradient attacks may fail there without robustness.")
    return flags


def class_flags(num_classes: int) -> list[str]:
    """What is missing from standard AutoAttack with few classes."""
    if num_classes < DLR_T_CLASSES:
        return [
            f"With {num_classes} classes the attack apgd-t was left out (its loss needs {DLR_T_CLASSES}) and fab-t used "
            f"{num_classes - 1} target classes instead of 9: this is weaker than standard AutoAttack."
        ]
    if num_classes < 10:
        return [f"With {num_classes} classes the targeted attacks used all {num_classes - 1} target classes instead of 9."]
    return []


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
