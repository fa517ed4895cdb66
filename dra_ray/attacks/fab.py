"""Fast Adaptive Boundary attack (Croce & Hein 2019, arXiv 1907.02044) in the linf and l2 balls,
with AutoAttack's constants.

Every operation happens in pyautoattack's order, so that results agree with it to the bit; no
gradient of parameters is computed. With `drop`, images leave the batch when a fooling image within
eps is found: same verdicts, another image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dra_ray.attacks.apgd import DROP_SHARE, NOISE, Logits, Norm
from dra_ray.attacks.draws import Draws

ALPHA_MAX = 0.1
ETA = 1.05  # steps go beyond the boundary by this factor
BETA = 0.9  # a fooling image goes back towards the clean one by this factor
NOWHERE = 1e10  # a distance larger than any

# points, normals [m,D] and offsets [m] of hyperplanes -> what to add to each point to reach its
# hyperplane within [0,1]
Project = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Search:
    norm: Norm
    eps: float
    steps: int
    project: Project
    drop: bool = False


def untargeted(
    student: Logits, x: Tensor, labels: Tensor, how: Search, restarts: int, draws: Draws
) -> Tensor:
    """Adversarial images [n,C,H,W] within eps, the clean one where none was found; restarts after
    the first begin at random.
    """
    adversarial, alive = x.clone(), student(x).argmax(1) == labels
    for restart in range(restarts):
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            start = x[rows]
            if restart:
                start = _random_start(
                    start,
                    draws.noise(NOISE[how.norm], rows.cpu(), x.shape[1:], 0, restart).to(x),
                    how,
                )
            images = search(student, x[rows], labels[rows], start, None, how)
            fooled = _fools(student, x[rows], labels[rows], images, how)
            alive[rows[fooled]] = False
            adversarial[rows[fooled]] = images[fooled]
    return adversarial


def targeted(student: Logits, x: Tensor, labels: Tensor, how: Search, targets: int) -> Tensor:
    """As `untargeted`, from the clean image towards the second to the (targets+1)-th largest logit
    in turn; nothing random.
    """
    adversarial, alive = x.clone(), student(x).argmax(1) == labels
    for rank in range(2, targets + 2):
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            goal = student(x[rows]).sort(dim=-1)[1][:, -rank]
            images = search(student, x[rows], labels[rows], x[rows], goal, how)
            fooled = _fools(student, x[rows], labels[rows], images, how)
            alive[rows[fooled]] = False
            adversarial[rows[fooled]] = images[fooled]
    return adversarial


def _fools(student: Logits, x: Tensor, labels: Tensor, images: Tensor, how: Search) -> Tensor:
    """Misclassified and within eps of x, bool [n]: the search itself knows no bound."""
    return (student(images).argmax(1) != labels) & (_lengths(x - images, how.norm) <= how.eps)


def search(
    student: Logits, x: Tensor, labels: Tensor, start: Tensor, goal: Tensor | None, how: Search
) -> Tensor:
    """The nearest misclassified image found for each x [n,C,H,W], at any distance; x where none was
    found.

    Args:
        goal: the boundary to which class, int64 [n]; None for the nearest of all, which takes a
            backward pass per class.
    """
    nearest, images = x.new_full((len(x),), NOWHERE), x.clone()
    rows, now = torch.arange(len(x), device=x.device), start.clone()
    for number in range(how.steps):
        if how.drop and int((nearest[rows] <= how.eps).sum()) * DROP_SHARE >= len(rows):
            kept = nearest[rows] > how.eps
            rows, now = rows[kept], now[kept]
            if not len(rows):
                break
        clean, true = x[rows], labels[rows]
        gap, normal = _linearised(
            student, now, true, None if goal is None else goal[rows], how.norm
        )
        now = _step(now, clean, gap, normal, how)
        wrong = student(now).argmax(1) != true
        distance = _lengths(now - clean, how.norm)
        closer = wrong & (distance < nearest[rows])
        if how.drop:  # the first one within eps stays, whenever its image leaves
            closer &= nearest[rows] > how.eps
        images[rows[closer]] = now[closer]
        nearest[rows[closer]] = distance[closer]
        if number + 1 < how.steps:
            now = torch.where(wrong[:, None, None, None], clean + (now - clean) * BETA, now)
    return images


def _linearised(
    student: Logits, x: Tensor, labels: Tensor, goal: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    """The decision boundary to linear order: difference of logits [n] and its gradient [n,C,H,W],
    of the goal or the nearest class.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = student(x)
        true = logits.gather(1, labels[:, None])
        if goal is not None:
            gap = -(true - logits.gather(1, goal[:, None])).squeeze(1)
            (gradient,) = torch.autograd.grad(gap.sum(), x)
            return gap.detach(), gradient
    gradients = torch.stack(
        [
            torch.autograd.grad(logits, x, _column(logits, k), retain_graph=True)[0]
            for k in range(logits.shape[1])
        ],
        1,
    )
    everyone = torch.arange(len(x), device=x.device)
    gaps = (logits - true).detach()
    gradients = gradients - gradients[everyone, labels][:, None]
    gaps[everyone, labels] = NOWHERE
    dual = gradients.flatten(2)
    size = dual.abs().sum(-1) if norm == "linf" else (dual**2).sum(-1).sqrt()
    chosen = (gaps.abs() / (1e-12 + size)).min(1)[1]
    return gaps[everyone, chosen], gradients[everyone, chosen]


def _column(logits: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(logits)
    mask[:, k] = 1
    return mask


def _step(now: Tensor, clean: Tensor, gap: Tensor, normal: Tensor, how: Search) -> Tensor:
    """Projections of the iterate and of the clean image onto the linearised boundary, mixed by
    their distances (their algorithm 1).
    """
    n = len(now)
    offset = -gap + (normal * now).reshape(n, -1).sum(-1)
    flat = normal.reshape(n, -1)
    both = how.project(
        torch.cat([now.reshape(n, -1), clean.reshape(n, -1)]),
        torch.cat([flat, flat]),
        torch.cat([offset, offset]),
    )
    size = both.abs().amax(1) if how.norm == "linf" else (both**2).sum(1).sqrt()
    size = size.clamp(min=1e-8)[:, None, None, None]
    mine, other = both[:n].reshape(now.shape), both[n:].reshape(now.shape)
    alpha = (size[:n] / (size[:n] + size[n:])).clamp(0, ALPHA_MAX)
    return ((now + ETA * mine) * (1 - alpha) + (clean + other * ETA) * alpha).clamp(0, 1)


def _random_start(x: Tensor, noise: Tensor, how: Search) -> Tensor:
    """At half of eps, in a random direction."""
    noise = 2 * noise - 1 if how.norm == "linf" else noise
    return (x + how.eps * noise / _lengths(noise, how.norm)[:, None, None, None] * 0.5).clamp(0, 1)


def _lengths(z: Tensor, norm: Norm) -> Tensor:
    """Norms [n] of images."""
    flat = z.reshape(len(z), -1)
    return flat.abs().amax(1) if norm == "linf" else (flat**2).sum(-1).sqrt()
