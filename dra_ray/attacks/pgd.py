"""Projected gradient descent in the l-infinity and l2 balls, for training (KL, cross-entropy) and
for validation (margin, cross-entropy).

Images are float [B,C,H,W] in [0,1]; what an attack returns has their memory format. A step of the
loop costs one forward and one backward to the input: parameters are frozen, the update happens in
place, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config

EvaluationLoss = Literal["margin", "cross-entropy"]
NORMAL_START = 0.001  # deviation of the start "normal", in [0,1] units (TRADES)


# -- the student while it is attacked --------------------------------------------------------------
@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient meanwhile: the input's gradient is the same and costs a third
    less.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics in train mode and leaves its running ones alone."""
    tracking = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode meanwhile; then every module has its own mode back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def as_attacked(student: nn.Module, threat: config.Threat) -> Iterator[None]:
    """The student as training's attack sees it: as it is with BatchNorm untracked (DM-AT), or in
    eval mode (TRADES).
    """
    with untracked(student) if threat.mode == "train" else evaluating(student):
        yield


# -- where the attack may go -----------------------------------------------------------------------
def threat_at(threat: config.Threat, epoch: int) -> config.Threat:
    """The threat of epoch 0, 1, ...: eps and step grow linearly until epoch `ramp_epochs`-1 (IKL,
    arXiv 2305.13948).
    """
    if epoch + 1 >= threat.ramp_epochs:
        return threat
    share = (epoch + 1) / threat.ramp_epochs
    return threat.model_copy(
        update={"eps_255": threat.eps_255 * share, "step_255": threat.step_255 * share}
    )


def noise_like(shape: Sequence[int], threat: config.Threat, generator: torch.Generator) -> Tensor:
    """What `start` is made from, float32 on the CPU, so that every device gets the same: uniform in
    [0,1), or standard normal.
    """
    draw = torch.rand if threat.start == "uniform" else torch.randn
    return draw(*shape, generator=generator)


def start(x: Tensor, threat: config.Threat, noise: Tensor) -> Tensor:
    """Where the attack begins; `noise` is `noise_like` x, on its device.

    Uniform in the ball and inside [0,1], or x + 0.001 N(0,1), which is projected only after the
    first step (TRADES, DM-AT's l2).
    """
    if threat.start == "uniform":
        return random_start(x, threat.eps, noise)
    return x + NORMAL_START * noise


def random_start(x: Tensor, eps: float, noise: Tensor) -> Tensor:
    """A point of the ball around x, inside [0,1]; `noise` is uniform in [0,1), of x's shape."""
    return (x + eps * (2 * noise - 1)).clamp_(0, 1)


def project(adversarial: Tensor, x: Tensor, threat: config.Threat) -> Tensor:
    """Into the ball around x in [0,1] (of each sample, for l2) and into [0,1]."""
    return _projection(x, threat)(adversarial.clone())


def _projection(x: Tensor, threat: config.Threat) -> Callable[[Tensor], Tensor]:
    """Projects in place, as often as needed."""
    if threat.norm == "linf":
        lower, upper = (x - threat.eps).clamp_(min=0), (x + threat.eps).clamp_(max=1)
        return lambda z: z.clamp_(lower, upper)
    # DM-AT's order; shrinking towards x leaves [0,1] by rounding only
    return lambda z: z.clamp_(0, 1).sub_(x).renorm_(2, 0, threat.eps).add_(x).clamp_(0, 1)


def _direction(gradient: Tensor, threat: config.Threat, escape: Tensor | None) -> Tensor:
    if threat.norm == "linf":
        return gradient.sign()
    norm = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())), keepdim=True)
    return torch.where(
        norm > 0, gradient / norm, torch.zeros_like(gradient) if escape is None else escape
    )


# -- attacks ---------------------------------------------------------------------------------------
def pgd(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    threat: config.Threat,
    steps: int,
    *,
    step: float | None = None,
    escape: Tensor | None = None,
    passes: int = 1,
) -> Tensor:
    """Ascend `loss` (of a batch, summed or averaged: only the direction per sample counts) by
    `steps` steps from `start`.

    linf: x <- P(x + step * sign g) (Madry et al. 2018, equation 2). l2: x <- P(x + step * g/|g|),
        with the norm per sample;
    DM-AT writes this as SGD without momentum on x'-x with learning rate `step`, which is the same.

    Args:
        step: length of a step in [0,1] units; default: the threat's.
        escape: of l2, of x's shape: where a sample whose gradient is zero goes instead; default:
            nowhere.
        passes: through a randomised student, whose gradients are summed for each step (EOT; Athalye
            et al., arXiv 1707.07397).

    Returns:
        Within eps of x and inside [0,1] after one step or more.
    """
    x, length = x.detach(), threat.step if step is None else step
    projected = _projection(x, threat)
    adversarial = start.detach().clone()
    for _ in range(steps):
        gradient = _gradient(loss, adversarial)
        for _ in range(passes - 1):
            gradient = gradient + _gradient(loss, adversarial)
        with torch.no_grad():
            projected(adversarial.add_(_direction(gradient, threat, escape), alpha=length))
    return adversarial.detach()


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(loss(x.requires_grad_(True)), x)[0]


def trades(
    student: nn.Module, x: Tensor, target: Tensor, threat: config.Threat, noise: Tensor
) -> Tensor:
    """The training attack of TRADES in DM-AT's form: maximise KL(target || softmax f(x')).

    `target` [B,K] is softmax f(x) in the mode that `threat.mode` names, computed once; `noise` is
    for `start`. BatchNorm's buffers and the student's modes are left as they were. An l2 sample
    without gradient moves by its noise (DM-AT: a fresh draw).
    """

    def divergence(adversarial: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(student(adversarial), 1), target, reduction="sum")

    with frozen(student), as_attacked(student, threat):
        return pgd(divergence, x, start(x, threat, noise), threat, threat.steps, escape=noise)


def adversarial(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: config.Threat,
    noise: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """PGD on the cross-entropy, for training on its result (Madry et al. 2018).

    With one step from a uniform start it is FGSM-RS (Wong et al. 2020, algorithm 3). Modes, labels
    int64 [B] and noise as in `trades`.
    """

    def cross_entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(student(z), labels, reduction="sum", label_smoothing=label_smoothing)

    with frozen(student), as_attacked(student, threat):
        return pgd(cross_entropy, x, start(x, threat, noise), threat, threat.steps)


def evaluate_pgd(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: config.Threat,
    noise: Tensor,
    steps: int,
    *,
    loss: EvaluationLoss = "cross-entropy",
    step: float | None = None,
    eot: int = 1,
) -> Tensor:
    """PGD against the student in eval mode. Returns correct-under-attack bool [B], of the worst
    start where there are several.

    Args:
        noise: for `start`, as `noise_like` draws it for this threat; [B,C,H,W], or
            [restarts,B,C,H,W], where every image must withstand all starts.
        loss: `margin` is DM-AT's for validation: what it broke it leaves alone.
        step: in [0,1] units; default: eps/4, so that twenty steps cross the ball (2/255 for the
            8/255 of CIFAR, as in DM-AT).
        eot: passes that each gradient is summed over; above 1 for a randomised student, see
            `randomised`.
    """
    withstood = torch.ones(len(x), dtype=torch.bool, device=x.device)
    with evaluating(student), torch.no_grad():
        for start_noise in noise if noise.dim() > x.dim() else noise[None]:
            images = strongest(
                student, x, labels, threat, start_noise, steps, loss=loss, step=step, eot=eot
            )
            withstood &= student(images).argmax(1) == labels
    return withstood


def strongest(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: config.Threat,
    noise: Tensor,
    steps: int,
    *,
    loss: EvaluationLoss = "cross-entropy",
    step: float | None = None,
    eot: int = 1,
) -> Tensor:
    """The images [B,C,H,W] that `evaluate_pgd` tries the student with, from one start."""
    step = threat.eps_255 / 4 / 255 if step is None else step

    def ascended(z: Tensor) -> Tensor:
        logits = student(z)
        return (
            margin(logits, labels)
            if loss == "margin"
            else F.cross_entropy(logits, labels, reduction="sum")
        )

    with frozen(student), evaluating(student):
        return pgd(ascended, x, start(x, threat, noise), threat, steps, step=step, passes=eot)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed margin (Carlini & Wagner 2017), to be maximised: sum of min(max_{j != y} z_j - z_y,
    0). logits [B,K], labels int64 [B].

    As in DM-AT it stops at 0: a misclassified sample has no gradient.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    other = logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    return -(own - other).clamp(min=0).sum()
