"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1) in the linf and l2 balls, with the
constants of AutoAttack.

Every operation on an image happens in pyautoattack's order, so that results agree with it to the
bit. The last gradient, which nothing uses, is not computed. With `drop`, images leave the batch
when they are fooled: the verdicts are the same, and what is returned is the first fooling iterate
instead of the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray.attacks.draws import Draws, Kind

Norm = Literal["linf", "l2"]
Logits = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]  # (logits [n,K], labels [n]) -> loss [n]
MOMENTUM = 0.75
# a step size must have raised the loss in more than this share of the steps between two checkpoints
RHO = 0.75
DROP_SHARE = 8  # fooled images leave when they are at least an eighth of the batch
NOISE: dict[str, Kind] = {"linf": "uniform", "l2": "normal"}


# -- objectives ------------------------------------------------------------------------------------
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (equation 6): three classes at least."""
    ordered, order = logits.sort(dim=1)
    right = (order[:, -1] == labels).float()
    true = logits.gather(1, labels[:, None]).squeeze(1)
    return -(true - ordered[:, -2] * right - ordered[:, -1] * (1 - right)) / (
        ordered[:, -1] - ordered[:, -3] + 1e-12
    )


def targeted_dlr(target: Tensor) -> Objective:
    """The same towards classes int64 [n] (equation 7): four classes at least."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        ordered = logits.sort(dim=1)[0]
        true, goal = (logits.gather(1, index[:, None]).squeeze(1) for index in (labels, target))
        return -(true - goal) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)

    return loss


@dataclasses.dataclass(frozen=True)
class Ascent:
    """What an attack of this family needs to know; `eot` is the number of passes that a gradient is
    averaged over.
    """

    norm: Norm
    eps: float
    steps: int
    eot: int = 1
    drop: bool = False


# -- attacks ---------------------------------------------------------------------------------------
def untargeted(
    student: Logits,
    x: Tensor,
    labels: Tensor,
    how: Ascent,
    *,
    objective: Objective,
    restarts: int,
    draws: Draws,
) -> Tensor:
    """Adversarial images [n,C,H,W]; the clean one where none was found. Later restarts attack what
    withstood the earlier ones.
    """
    adversarial = x.clone()
    alive = student(x).argmax(1) == labels
    for restart in range(restarts):
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            noise = draws.noise(NOISE[how.norm], rows.cpu(), x.shape[1:], 0, restart).to(x)
            fooled, images = ascend(
                student, x[rows], labels[rows], noise, how, lambda kept: objective
            )
            alive[rows[fooled]] = False
            adversarial[rows[fooled]] = images[fooled]
    return adversarial


def targeted(
    student: Logits, x: Tensor, labels: Tensor, how: Ascent, targets: int, draws: Draws
) -> Tensor:
    """As `untargeted`, on the targeted DLR loss, towards the second to the (targets+1)-th largest
    logit of the clean image in turn.
    """

    # asked anew for every target, as the package does: a row's logits have other bits in another
    # batch
    def ranked(rows: Tensor, place: int) -> Tensor:
        return student(x[rows]).sort(dim=1)[1][:, -place - 2]

    return _towards_each(student, x, labels, how, draws, targets=targets, goals=ranked)


def towards_nearest(
    student: Logits, x: Tensor, labels: Tensor, how: Ascent, targets: int, draws: Draws
) -> Tensor:
    """As `targeted`, towards the `targets` classes that are nearest by `nearest_classes`."""
    order = nearest_classes(student, x, labels, how.norm)
    return _towards_each(
        student,
        x,
        labels,
        how,
        draws,
        targets=targets,
        goals=lambda rows, place: order[rows, place],
    )


def nearest_classes(
    student: Logits, x: Tensor, labels: Tensor, norm: Norm, candidates: int = 100
) -> Tensor:
    """The wrong classes of each image, nearest first: int64 [n, min(candidates, K-1)].

    The distance to class j is that of a linear student, (z_y - z_j) / |grad(z_y - z_j)|, in the
    norm dual to the threat's (MALT: Melamed, Yehudai and Shamir 2024, arXiv 2407.02240, section 3);
    only the `candidates` of largest logit are considered.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = student(x)
        wrong = logits.detach().scatter(1, labels[:, None], -torch.inf)
        classes = wrong.argsort(dim=1, descending=True)[:, : min(candidates, wrong.shape[1] - 1)]
        margins = logits.gather(1, labels[:, None]) - logits.gather(1, classes)
        distances = []
        for margin in margins.unbind(1):
            slope = torch.autograd.grad(margin.sum(), x, retain_graph=True)[0].flatten(1)
            steepness = slope.abs().sum(1) if norm == "linf" else slope.norm(dim=1)
            distances.append(margin.detach() / (steepness + 1e-12))
    return classes.gather(1, torch.stack(distances, 1).argsort(dim=1))


def _towards_each(
    student: Logits,
    x: Tensor,
    labels: Tensor,
    how: Ascent,
    draws: Draws,
    *,
    targets: int,
    goals: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """`goals`: rows int64 [m] of x and the number of the attempt, from 0 -> their classes [m]."""
    adversarial = x.clone()
    alive = student(x).argmax(1) == labels
    for place in range(targets):
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            goal = goals(rows, place)
            noise = draws.noise(NOISE[how.norm], rows.cpu(), x.shape[1:], place + 2, 0).to(x)
            fooled, images = ascend(student, x[rows], labels[rows], noise, how, _towards(goal))
            alive[rows[fooled]] = False
            adversarial[rows[fooled]] = images[fooled]
    return adversarial


def _towards(goal: Tensor) -> Callable[[Tensor], Objective]:
    return lambda kept: targeted_dlr(goal[kept])


# -- the ascent ------------------------------------------------------------------------------------
@dataclasses.dataclass(kw_only=True)
class _State:
    """Of the images that are still attacked; every tensor has them in its first dimension."""

    rows: Tensor  # int64, where they are in the batch
    x: Tensor
    labels: Tensor
    now: Tensor  # the iterate
    before: Tensor  # the one before it
    gradient: Tensor
    best: Tensor  # the iterate of highest loss, its gradient and its loss
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor
    halved: Tensor  # at the last checkpoint, as float
    best_then: Tensor  # best loss at the last checkpoint
    history: Tensor  # losses [n, steps]; those not known yet are 0

    def take(self, kept: Tensor) -> _State:
        return _State(
            **{field.name: getattr(self, field.name)[kept] for field in dataclasses.fields(self)}
        )


def ascend(
    student: Logits,
    x: Tensor,
    labels: Tensor,
    noise: Tensor,
    how: Ascent,
    objective_of: Callable[[Tensor], Objective],
) -> tuple[Tensor, Tensor]:
    """One run of Auto-PGD from x + eps * noise/|noise|: fooled bool [n], and the fooling images
    [n,C,H,W] (elsewhere anything in the ball).

    Args:
        noise: uniform in [0,1) for linf, standard normal for l2.
        objective_of: rows int64 [m] of x -> their objective.
    """
    now = _start(x, noise, how)
    everyone = torch.arange(len(x), device=x.device)
    objective = objective_of(everyone)
    loss, logits, gradient = _climb(student, now, labels, objective, how.eot)
    fooled, images = logits.argmax(1) != labels, now.clone()
    ones = torch.ones_like(loss)
    state = _State(
        rows=everyone,
        x=x,
        labels=labels,
        now=now,
        before=now.clone(),
        gradient=gradient,
        best=now.clone(),
        best_gradient=gradient.clone(),
        best_loss=loss.clone(),
        step=2 * how.eps * ones[:, None, None, None],
        halved=ones,
        best_then=loss.clone(),
        history=x.new_zeros(len(x), how.steps),
    )
    # steps between two checkpoints: fewer and fewer, so that the ascent explores before it refines
    interval, shorter, shortest = (max(int(part * how.steps), 1) for part in (0.22, 0.03, 0.06))
    since = 0
    for number in range(how.steps):
        # images leave in groups, since every tensor of the state is copied then
        if how.drop and int(fooled[state.rows].sum()) * DROP_SHARE >= len(state.rows):
            state = state.take(~fooled[state.rows])
            if not len(state.rows):
                break
            objective = objective_of(state.rows)
        # the first step has no earlier one to carry on
        moved = _moved(state, how, MOMENTUM if number else 1.0)
        state.before, state.now = state.now, moved
        last = number + 1 == how.steps
        loss, logits, gradient = _climb(
            student, moved, state.labels, objective, how.eot, with_gradient=not last
        )
        wrong = logits.argmax(1) != state.labels
        # the package returns the last fooling iterate; with `drop` an image has only its first
        fresh = wrong & ~fooled[state.rows] if how.drop else wrong
        images[state.rows[fresh]] = moved[fresh]
        fooled[state.rows[fresh]] = True
        if last:
            break
        state.gradient = gradient
        _keep_best(state, loss, number)
        since += 1
        if since == interval:
            _checkpoint(state, number, interval)
            interval, since = max(interval - shorter, shortest), 0
    return fooled, images


def _climb(
    student: Logits,
    x: Tensor,
    labels: Tensor,
    objective: Objective,
    eot: int,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], logits [n,K], gradient of the loss) at x, the gradient averaged over `eot` passes,
    or 0 unless `with_gradient`.
    """
    x = x.detach().requires_grad_(True)
    total = torch.zeros_like(x)
    for _ in range(eot):
        with torch.enable_grad():
            logits = student(x)
            loss = objective(logits, labels)
            summed = loss.sum()
        if with_gradient:
            total += torch.autograd.grad(summed, x)[0]
    x.requires_grad_(False)
    return loss.detach(), logits.detach(), total / eot


def _start(x: Tensor, noise: Tensor, how: Ascent) -> Tensor:
    return (x + how.eps * _unit(2 * noise - 1 if how.norm == "linf" else noise, how.norm)).clamp(
        0, 1
    )


def _moved(state: _State, how: Ascent, momentum: float) -> Tensor:
    x, now = state.x, state.now
    carried = now - state.before
    if how.norm == "linf":
        lower, upper = x - how.eps, x + how.eps
        ahead = (now + state.step * state.gradient.sign()).clamp(lower, upper).clamp(0, 1)
        return (
            (now + (ahead - now) * momentum + carried * (1 - momentum))
            .clamp(lower, upper)
            .clamp(0, 1)
        )
    ahead = _inside_l2(x, now + state.step * _unit(state.gradient, "l2"), how.eps)
    return _inside_l2(x, now + (ahead - now) * momentum + carried * (1 - momentum), how.eps)


def _inside_l2(x: Tensor, z: Tensor, eps: float) -> Tensor:
    """x plus (z-x), shortened to eps where longer, and clipped to [0,1]."""
    delta = z - x
    return (x + _unit(delta, "l2") * torch.clamp(_lengths(delta, "l2"), max=eps)).clamp(0, 1)


def _unit(z: Tensor, norm: Norm) -> Tensor:
    return z / (_lengths(z, norm) + 1e-12)


def _lengths(z: Tensor, norm: Norm) -> Tensor:
    """Norms [n,1,1,1] of images."""
    flat = z.flatten(1)
    return (flat.abs().amax(1) if norm == "linf" else (flat**2).sum(-1).sqrt())[:, None, None, None]


def _keep_best(state: _State, loss: Tensor, number: int) -> None:
    state.history[:, number] = loss
    better = loss > state.best_loss
    state.best[better] = state.now[better]
    state.best_gradient[better] = state.gradient[better]
    state.best_loss[better] = loss[better]


def _checkpoint(state: _State, number: int, interval: int) -> None:
    """Halve steps that oscillate or bring nothing, and go on from the best point there (section
    3.2).

    As in the authors' code, the oldest comparison of the first checkpoint is with the last column,
    which is still 0.
    """
    # of the first interval the oldest column is -1, the history's last
    columns = torch.arange(number - interval + 1, number + 1, device=state.history.device)
    rises = (state.history[:, columns] > state.history[:, columns - 1]).sum(1)
    # a step that was not halved last time, and brought no better loss since, is too long
    stuck = (1 - state.halved) * (state.best_then >= state.best_loss).to(state.halved)
    halve = torch.maximum((rises <= interval * RHO).to(state.halved), stuck)
    state.halved, state.best_then = halve, state.best_loss.clone()
    chosen = halve > 0
    state.step = torch.where(chosen[:, None, None, None], state.step / 2, state.step)
    state.now[chosen], state.gradient[chosen] = state.best[chosen], state.best_gradient[chosen]
