"""Projected gradient descent in the l-infinity and l2 balls, for training (KL, cross-entropy) and
for validation (margin, cross-entropy).

Images are float [B,C,H,W] in [0,1]; what an attack returns has their memory format. A step of the
loop costs one forward and one backward to the input: parameters are frozen, and nothing waits for
the device. A step is one function of tensors, `climbed`, so that it can be one compiled graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config
from dra_ray.errors import ConfigError

EvaluationLoss = Literal["margin", "cross-entropy"]
STUDENTS = 64  # of a process, each kind of which has a graph of its own
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
    with untracked(student) if threat.mode == "train" else evaluating(student), _steady(student):
        yield


@contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """BatchNorm's momentum, of no effect where statistics are left alone, is one number meanwhile:
    a graph is compiled for each that it sees, and training has two.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(norms, before, strict=True):
            module.momentum = momentum


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


def noise_like(
    shape: Sequence[int],
    threat: config.Threat,
    generator: torch.Generator,
    out: Tensor | None = None,
) -> Tensor:
    """What `start` is made from, float32 on the CPU, so that every device gets the same: uniform in
    [0,1), or standard normal. Written into `out` if that is given.
    """
    draw = torch.rand if threat.start == "uniform" else torch.randn
    return draw(*shape, generator=generator, out=out)


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
    return _into(_ball(x, threat), adversarial.clone())


# what bounds an attack: (least, most) of every pixel in linf, (x, eps) in l2
Ball = tuple[Tensor, Tensor] | tuple[Tensor, float]


def _ball(x: Tensor, threat: config.Threat) -> Ball:
    if threat.norm == "linf":
        return (x - threat.eps).clamp_(min=0), (x + threat.eps).clamp_(max=1)
    return x, threat.eps


def _into(ball: Ball, z: Tensor) -> Tensor:
    """`z` itself, projected in place."""
    center, end = ball
    if isinstance(end, Tensor):
        return z.clamp_(center, end)
    # DM-AT's order; shrinking towards x leaves [0,1] by rounding only
    return z.clamp_(0, 1).sub_(center).renorm_(2, 0, end).add_(center).clamp_(0, 1)


def _direction(gradient: Tensor, ball: Ball, escape: Tensor | None) -> Tensor:
    if isinstance(ball[1], Tensor):  # linf
        return gradient.sign()
    norm = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())), keepdim=True)
    return torch.where(
        norm > 0, gradient / norm, torch.zeros_like(gradient) if escape is None else escape
    )


# -- attacks ---------------------------------------------------------------------------------------
Loss = Callable[[Tensor], Tensor]
Climb = Callable[[Loss, Tensor, Ball, Tensor, Tensor | None, int], Tensor]


def climbed(
    loss: Loss, z: Tensor, ball: Ball, length: Tensor, escape: Tensor | None, passes: int
) -> Tensor:
    """`z` a step of `length` (a scalar tensor) up the slope of `loss`, and back in the ball. Reads
    no value of a tensor, so that torch.compile makes one graph of it.
    """
    at = z.detach().requires_grad_(True)
    gradient = _gradient(loss, at)
    for _ in range(passes - 1):
        gradient = gradient + _gradient(loss, at)
    with torch.no_grad():
        return _into(ball, z + length * _direction(gradient, ball, escape))


def compiler_options(cuda_graphs: bool = False) -> dict[str, Any]:
    """What inductor is told about students. On a CPU BatchNorm's variance is a sum, then a sum of
    squares: without this only for a thousand values, and for more by Welford's formula, which
    divides for each of them. Nothing for a torch that has no such choice.
    """
    wanted = {"cpp.use_two_step_variance_threshold": 2**31 - 1, "triton.cudagraphs": cuda_graphs}
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


def graph(backend: str = "inductor", cuda_graphs: bool = False) -> Climb:
    """`climbed` as one graph, compiled at its first call for a student, its mode and a batch size;
    `ConfigError` where it would be more than one. What a student draws, as for dropout, it draws as
    without. Needs torch 2.14 or newer.

    Args:
        cuda_graphs: replay it as a CUDA graph; `torch.compiler.cudagraph_mark_step_begin` is the
            caller's, before each training step.
    """
    inductor = backend == "inductor"
    options = {"fallback_random": True, **compiler_options(cuda_graphs)} if inductor else None
    compiled = torch.compile(
        climbed, fullgraph=True, dynamic=False, backend=backend, options=options
    )

    @functools.wraps(climbed)
    def climb(
        loss: Loss, z: Tensor, ball: Ball, length: Tensor, escape: Tensor | None, passes: int
    ) -> Tensor:
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=STUDENTS):
                climbed_to: Tensor = compiled(loss, z, ball, length, escape, passes)
                # what a CUDA graph returns lies in its own memory, which the next replay reuses
                return climbed_to.clone() if cuda_graphs else climbed_to
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigError(
                "compute.compile='attack': a step of the attack on this student cannot be compiled "
                f"as one graph ({str(error).strip().splitlines()[0]}); write "
                "compute.compile='forward' or 'off'"
            ) from error

    return climb


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
    climb: Climb = climbed,
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
        climb: takes the steps; `graph()` compiles them.

    Returns:
        Within eps of x and inside [0,1] after one step or more.
    """
    ball, adversarial = _ball(x.detach(), threat), start.detach().clone()
    length = x.new_full((), threat.step if step is None else step)
    for _ in range(steps):
        adversarial = climb(loss, adversarial, ball, length, escape, passes)
    return adversarial


def _gradient(loss: Loss, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(loss(x), x)[0]


def trades(
    student: nn.Module,
    x: Tensor,
    target: Tensor,
    threat: config.Threat,
    noise: Tensor,
    climb: Climb = climbed,
) -> Tensor:
    """The training attack of TRADES in DM-AT's form: maximise KL(target || softmax f(x')).

    `target` [B,K] is softmax f(x) in the mode that `threat.mode` names, computed once; `noise` is
    for `start`. BatchNorm's buffers and the student's modes are left as they were. An l2 sample
    without gradient moves by its noise (DM-AT: a fresh draw).
    """

    def divergence(adversarial: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(student(adversarial), 1), target, reduction="sum")

    with frozen(student), as_attacked(student, threat):
        begun = start(x, threat, noise)
        return pgd(divergence, x, begun, threat, threat.steps, escape=noise, climb=climb)


def adversarial(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: config.Threat,
    noise: Tensor,
    label_smoothing: float = 0.0,
    *,
    climb: Climb = climbed,
) -> Tensor:
    """PGD on the cross-entropy, for training on its result (Madry et al. 2018).

    With one step from a uniform start it is FGSM-RS (Wong et al. 2020, algorithm 3). Modes, labels
    int64 [B] and noise as in `trades`.
    """

    def cross_entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(student(z), labels, reduction="sum", label_smoothing=label_smoothing)

    with frozen(student), as_attacked(student, threat):
        return pgd(cross_entropy, x, start(x, threat, noise), threat, threat.steps, climb=climb)


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
    shrinking: bool = True,
) -> Tensor:
    """PGD against the student in eval mode. Returns correct-under-attack bool [B], of the worst
    start where there are several.

    With `margin` the end of an image is known once it is broken, since it has no gradient then and
    stays where it is, and once it goes back and forth between two points, as most images that
    withstand do after some twenty steps (arXiv 2503.19347). Both are left out of further steps and
    starts: the same attack, but that a student may round otherwise in another batch.

    Args:
        noise: for `start`, as `noise_like` draws it for this threat; [B,C,H,W], or
            [restarts,B,C,H,W], where every image must withstand all starts.
        loss: `margin` is DM-AT's for validation: what it broke it leaves alone.
        step: in [0,1] units; default: eps/4, so that twenty steps cross the ball (2/255 for the
            8/255 of CIFAR, as in DM-AT).
        eot: passes that each gradient is summed over; above 1 for a randomised student, see
            `randomised`.
        shrinking: whether `margin` may leave images out; not where a graph is compiled for each
            size of a batch.
    """
    withstood = torch.ones(len(x), dtype=torch.bool, device=x.device)
    with evaluating(student), torch.no_grad():
        for start_noise in noise if noise.dim() > x.dim() else noise[None]:
            if loss == "margin" and eot == 1 and shrinking:
                left = withstood.nonzero().squeeze(1)
                withstood[left] = _withstood(
                    student,
                    x[left],
                    labels[left],
                    threat,
                    noise=start_noise[left],
                    steps=steps,
                    step=step,
                )
                continue
            images = strongest(
                student, x, labels, threat, start_noise, steps, loss=loss, step=step, eot=eot
            )
            withstood &= student(images).argmax(1) == labels
    return withstood


LEAST_SHARE = 1 / 8  # of a batch whose end must be known for it to shrink


def _withstood(
    student: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: config.Threat,
    *,
    noise: Tensor,
    steps: int,
    step: float | None,
) -> Tensor:
    """Correct-under-attack bool [B] of one start and the margin loss; the student is in eval
    mode.
    """
    length = x.new_full((), threat.eps_255 / 4 / 255 if step is None else step)
    last = x.clone()
    left, y, ball = torch.arange(len(x), device=x.device), labels, _ball(x, threat)
    before = z = start(x, threat, noise)  # of the images `left`

    def ascended(at: Tensor) -> Tensor:
        return margin(student(at), y)

    with frozen(student):
        for done in range(1, steps + 1):
            older, before, z = before, z, climbed(ascended, z, ball, length, None, 1)
            circles = _same(z, older)  # between two points, or on one
            if circles.sum() < max(1, LEAST_SHARE * len(left)):
                continue
            last[left[circles]] = (z if (steps - done) % 2 == 0 else before)[circles]
            left, y, before, z = (part[~circles] for part in (left, y, before, z))
            if not len(left):
                break
            ball = _ball(x[left], threat)
    last[left] = z
    withstood: Tensor = student(last).argmax(1) == labels
    return withstood


def _same(a: Tensor, b: Tensor) -> Tensor:
    """bool [B], whether all pixels are equal."""
    return (a == b).flatten(1).all(1)


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
