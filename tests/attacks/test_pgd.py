"""Attacks against a plain implementation written from the papers, and the invariants that every
attack keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config, data, students
from dra_ray.attacks import pgd
from dra_ray.data import Shape
from dra_ray.errors import ConfigError


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    return students.build(config.Model(name="wrn-10-1"), data.load(config.Data()).shape)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    split = data.load(config.Data()).train[:16]
    return data.to_float(split.images), split.labels


LINF = config.Threat(eps_255=32, step_255=8, steps=5)
L2 = config.Threat(norm="l2", start="normal", eps_255=128, step_255=51.2, steps=5)  # 2 eps/steps
EVERY = [LINF, LINF.model_copy(update={"start": "normal"}), L2]
EVERY += [threat.model_copy(update={"mode": "eval"}) for threat in EVERY]


def noise_for(x: Tensor, threat: config.Threat, seed: int = 1) -> Tensor:
    return pgd.noise_like(x.shape, threat, torch.Generator().manual_seed(seed))


def plain_trades_attack(student: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """DM-AT's inner loop, step by step, on a copy of the network, whose buffers do not matter."""
    student = copy.deepcopy(student).train()
    with torch.no_grad():
        p = F.softmax(copy.deepcopy(student)(x), dim=1)
    z = (x + (noise * 2 - 1) * LINF.eps).clamp(0, 1)
    for _ in range(LINF.steps):
        z = z.clone().requires_grad_()
        q = F.softmax(student(z), dim=1)
        kl = (p * (p.log() - q.log())).sum(1).mean()
        g = torch.autograd.grad(kl, z)[0]
        z = z.detach() + LINF.step * torch.sign(g)
        z = (x + torch.clamp(z - x, -LINF.eps, LINF.eps)).clamp(0, 1)
    return z


def plain_l2_attack(student: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """DM-AT's l2 form: SGD without momentum on delta, each sample's gradient of length 1, [0,1]
    first and then the ball.
    """
    student = copy.deepcopy(student).train()
    with torch.no_grad():
        p = F.softmax(copy.deepcopy(student)(x), dim=1)
    delta = (0.001 * noise).requires_grad_()
    descent = torch.optim.SGD([delta], lr=2 * L2.eps / L2.steps)
    for _ in range(L2.steps):
        q = F.log_softmax(student(x + delta), dim=1)
        descent.zero_grad()
        F.kl_div(q, p, reduction="batchmean").neg().backward()
        for sample in delta.grad:
            sample /= sample.norm()
        descent.step()
        with torch.no_grad():
            for image, sample in zip(x, delta, strict=True):
                sample.copy_((image + sample).clamp(0, 1) - image)
                sample *= min(1.0, L2.eps / float(sample.norm()))
    return (x + delta).detach().clamp(0, 1)


def out_of_place(
    loss: Callable[[Tensor], Tensor], x: Tensor, z: Tensor, eps: float, step: float, steps: int
) -> Tensor:
    """The l-infinity loop with a fresh tensor for every operation; what the in-place loop must
    equal to the bit.
    """
    for _ in range(steps):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z), z)
        z = z.detach() + step * gradient.sign()
        z = torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
    return z.detach()


def test_the_training_attack_is_that_of_dm_at(student: nn.Module, batch) -> None:
    x, _ = batch
    noise = noise_for(x, LINF)
    student.train()
    target = F.softmax(copy.deepcopy(student)(x).detach(), 1)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    ours = pgd.trades(student, x, target, LINF, noise)
    torch.testing.assert_close(ours, plain_trades_attack(student, x, noise), rtol=0, atol=1e-6)
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers()), (
        "the attack moved BatchNorm's statistics"
    )
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_l2_attack_is_that_of_dm_at(student: nn.Module, batch) -> None:
    x, _ = batch
    noise = noise_for(x, L2)
    student.train()
    target = F.softmax(copy.deepcopy(student)(x).detach(), 1)
    ours = pgd.trades(student, x, target, L2, noise)
    torch.testing.assert_close(ours, plain_l2_attack(student, x, noise), rtol=0, atol=2e-5)
    assert (ours - x).flatten(1).norm(dim=1).min() > 0.3 * L2.eps, "the attack went nowhere"


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_loop_in_place_changes_no_bit(memory: torch.memory_format) -> None:
    torch.manual_seed(1)
    student = (
        students.build(config.Model(name="wrn-10-1"), Shape(10, 3, 8, (0.5,) * 3, (0.25,) * 3))
        .to(memory_format=memory)
        .train()
    )
    x = torch.rand(6, 3, 8, 8).contiguous(memory_format=memory)
    noise, labels, before = torch.rand(6, 3, 8, 8), torch.arange(6), x.clone()
    target = F.softmax(copy.deepcopy(student)(x).detach(), 1)
    begin = pgd.random_start(x, LINF.eps, noise)
    ours = pgd.trades(student, x, target, LINF, noise)
    with pgd.untracked(student):
        plain = out_of_place(
            lambda z: F.kl_div(F.log_softmax(student(z), 1), target, reduction="sum"),
            x,
            begin,
            LINF.eps,
            LINF.step,
            5,
        )
        assert torch.equal(ours, plain)
        cross_entropy = out_of_place(
            lambda z: F.cross_entropy(student(z), labels, reduction="sum"),
            x,
            begin,
            LINF.eps,
            LINF.step,
            5,
        )
    assert torch.equal(pgd.adversarial(student, x, labels, LINF, noise), cross_entropy)
    assert torch.equal(x, before), "an input was written to"
    assert torch.equal(begin, pgd.random_start(x, LINF.eps, noise)), "an input was written to"
    assert ours.is_contiguous(memory_format=memory)
    assert not ours.requires_grad


@pytest.mark.parametrize("threat", EVERY, ids=lambda t: f"{t.norm}-{t.start}-{t.mode}")
def test_adversarial_images_stay_in_the_ball_and_the_student_as_it_was(
    student: nn.Module, batch, threat: config.Threat
) -> None:
    x, labels = batch
    x = x.clone()
    x[0] = 0
    x[1] = 1
    student.train()
    student.layer[0].eval()  # a part that is frozen on purpose stays so
    modes, before = [m.training for m in student.modules()], copy.deepcopy(student.state_dict())
    noise = noise_for(x, threat)
    with torch.no_grad(), pgd.as_attacked(student, threat):
        target = F.softmax(student(x), 1)
    for z in (
        pgd.trades(student, x, target, threat, noise),
        pgd.adversarial(student, x, labels, threat, noise, 0.1),
    ):
        size = (
            (z - x).abs().amax((1, 2, 3))
            if threat.norm == "linf"
            else (z - x).flatten(1).norm(dim=1)
        )
        assert size.max() <= threat.eps + 1e-6
        assert size.min() > 0
        assert z.min() >= 0
        assert z.max() <= 1
    assert modes == [m.training for m in student.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    student.train()


def test_the_mode_decides_which_statistics_the_attack_sees(student: nn.Module, batch) -> None:
    x, labels = batch
    seen = []
    handle = student.logits.register_forward_hook(
        lambda module, args, out: seen.append((student.training, module.training))
    )
    for mode in ("train", "eval"):
        student.train()
        pgd.adversarial(student, x, labels, config.Threat(steps=1, mode=mode), noise_for(x, LINF))
    handle.remove()
    assert seen == [(True, True), (False, False)]
    assert student.training


def test_modes_come_back_after_an_error(student: nn.Module) -> None:
    student.train()
    with (
        pytest.raises(RuntimeError),
        pgd.frozen(student),
        pgd.untracked(student),
        pgd.evaluating(student),
    ):
        student(torch.rand(2, 7, 8, 8))
    assert all(m.training for m in student.modules())
    assert all(p.requires_grad for p in student.parameters())
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, nn.BatchNorm2d))


def test_one_step_from_a_uniform_start_is_fgsm_rs(student: nn.Module, batch) -> None:
    """Wong et al. 2020, algorithm 3, with delta as its variable."""
    x, labels = batch
    threat = config.Threat(eps_255=32, step_255=40, steps=1, mode="eval")
    noise = noise_for(x, threat)
    ours = pgd.adversarial(student, x, labels, threat, noise)
    plain = copy.deepcopy(student).eval()
    delta = torch.max(torch.min((2 * noise - 1) * threat.eps, 1 - x), 0 - x).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(plain(x + delta), labels), delta)
    delta = (delta.detach() + threat.step * gradient.sign()).clamp(-threat.eps, threat.eps)
    torch.testing.assert_close(
        ours, x + torch.max(torch.min(delta, 1 - x), 0 - x), rtol=0, atol=1e-6
    )


def test_an_l2_sample_without_gradient_moves_by_its_noise() -> None:
    x, escape = (
        torch.full((2, 1, 2, 2), 0.5),
        torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
    )
    threat = config.Threat(norm="l2", start="normal", eps_255=25.5, step_255=5.1)

    def flat_for_the_first(z: Tensor) -> Tensor:
        return z[1].sum()

    moved = pgd.pgd(flat_for_the_first, x, x, threat, 1, escape=escape) - x
    torch.testing.assert_close(moved[0], 0.02 * escape[0])
    torch.testing.assert_close(moved[1], torch.full((1, 2, 2), 0.01))
    stayed = pgd.pgd(flat_for_the_first, x, x, threat, 1) - x
    assert torch.equal(stayed[0], torch.zeros(1, 2, 2))
    assert torch.equal(stayed[1], moved[1])


def test_noise_is_drawn_as_the_start_wants_it() -> None:
    uniform, normal = (noise_for(torch.empty(64, 3, 8, 8), threat) for threat in (LINF, L2))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert normal.mean() == pytest.approx(0, abs=0.05)
    assert normal.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(uniform, torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    x = torch.full((64, 3, 8, 8), 0.5)
    torch.testing.assert_close(pgd.start(x, L2, normal) - x, 0.001 * normal, rtol=0, atol=1e-7)
    begin = pgd.start(x, LINF, uniform) - x
    assert begin.abs().max() <= LINF.eps + 1e-6
    assert begin.max() > 0.9 * LINF.eps


def test_projection_is_the_nearest_point_of_both_sets() -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    far = x + torch.randn_like(x)
    inside = pgd.project(far, x, LINF)
    assert torch.equal(inside, torch.min(torch.max(far, x - LINF.eps), x + LINF.eps).clamp(0, 1))
    ball = pgd.project(far, x, L2)
    assert ((ball - x).flatten(1).norm(dim=1) - L2.eps).abs().max() < 1e-6
    assert ball.min() >= 0
    assert ball.max() <= 1
    near = x + 0.01 * (0.5 - x)
    torch.testing.assert_close(pgd.project(near, x, L2), near, rtol=0, atol=1e-6)
    assert ball.is_contiguous(memory_format=torch.channels_last)


def test_eps_and_step_ramp_over_epochs() -> None:
    ramped = LINF.model_copy(update={"ramp_epochs": 8})
    sizes = [
        (pgd.threat_at(ramped, epoch).eps_255, pgd.threat_at(ramped, epoch).step_255)
        for epoch in (0, 3, 6, 7, 50)
    ]
    assert sizes == [(4, 1), (16, 4), (28, 7), (32, 8), (32, 8)]
    assert pgd.threat_at(LINF, 0) == LINF


# -- validation ------------------------------------------------------------------------------------
def test_more_steps_break_more(student: nn.Module, batch) -> None:
    x, _ = batch
    student.eval()
    y = student(x).argmax(1)  # what it says is right, so that clean accuracy is 1
    for loss in ("cross-entropy", "margin"):
        right = [
            int(
                pgd.evaluate_pgd(student, x, y, LINF, noise_for(x, LINF, 2), steps, loss=loss).sum()
            )
            for steps in (0, 20)
        ]
        assert right[1] < right[0], loss


def test_validation_uses_eval_mode_and_its_own_step(student: nn.Module, batch) -> None:
    """PGD on the cross-entropy with a step of eps/4, and with a step of its own."""
    x, labels = batch
    student.train()
    noise, still = noise_for(x, LINF), copy.deepcopy(student).eval()
    begin = pgd.random_start(x, LINF.eps, noise)
    for step in (None, 1 / 255):
        plain = out_of_place(
            lambda z: F.cross_entropy(still(z), labels, reduction="sum"),
            x,
            begin,
            LINF.eps,
            step or LINF.eps_255 / 4 / 255,
            3,
        )
        right = pgd.evaluate_pgd(student, x, labels, LINF, noise, 3, step=step)
        assert torch.equal(right, still(plain).argmax(1) == labels)
    assert all(m.training for m in student.modules())


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_the_margin_loss_leaves_alone_what_it_broke(
    student: nn.Module, batch, threat: config.Threat
) -> None:
    x, _ = batch
    student.eval()
    y = student(x).argmax(1)
    noise = noise_for(x, threat)
    ever = torch.zeros(len(x), dtype=torch.bool)
    for steps in range(8):
        broken = ~pgd.evaluate_pgd(student, x, y, threat, noise, steps, loss="margin")
        assert (broken | ~ever).all(), "a broken image was repaired"
        ever |= broken
    assert ever.any()


@pytest.mark.parametrize("starts", [1, 3])
@pytest.mark.parametrize(
    "threat",
    [LINF, L2, LINF.model_copy(update={"start": "normal"})],
    ids=["linf", "l2", "normal"],
)
def test_leaving_out_images_whose_end_is_known_changes_no_verdict(
    student: nn.Module, batch, threat: config.Threat, starts: int
) -> None:
    """Against the attack that goes on with all of them, of which none, some and most are broken.
    Within 40 steps those that withstand run in circles (all but in l2).
    """
    x, labels = batch
    student.eval()
    noise = torch.stack([noise_for(x, threat, seed) for seed in range(starts)])
    half = student(x).argmax(1).where(torch.arange(len(x)) % 2 == 0, labels)
    for y in (labels, half, student(x).argmax(1)):
        for steps in (0, 1, 12, 40, 41):
            whole, left = (
                pgd.evaluate_pgd(
                    student, x, y, threat, noise, steps, loss="margin", shrinking=shrinking
                )
                for shrinking in (False, True)
            )
            assert torch.equal(whole, left)


# -- one graph -------------------------------------------------------------------------------------
@pytest.mark.parametrize("threat", EVERY[:4])
@pytest.mark.parametrize("attack", ["trades", "adversarial"])
def test_a_graph_of_a_step_gives_the_bits_of_no_graph(
    student: nn.Module, batch, threat: config.Threat, attack: str
) -> None:
    """By the tracer alone: the compiler that is usual behind it rounds in its own way."""
    x, labels = batch
    target = F.softmax(student(x).detach(), 1) if attack == "trades" else labels
    climb, counts = pgd.graph("aot_eager"), torch._dynamo.utils.counters
    student.train()
    run = getattr(pgd, attack)
    torch._dynamo.reset()
    counts.clear()
    for seed in (1, 2):
        noise = noise_for(x, threat, seed)
        plain = run(student, x, target, threat, noise)
        assert torch.equal(run(student, x, target, threat, noise, climb=climb), plain)
    assert counts["stats"]["unique_graphs"] == 1, "for all steps of all batches"
    smaller = threat.model_copy(update={"step_255": threat.step_255 / 2})
    plain = run(student, x, target, smaller, noise)
    assert torch.equal(run(student, x, target, smaller, noise, climb=climb), plain)
    assert counts["stats"]["unique_graphs"] == 1, "a step of another length is no other graph"


def test_a_student_that_is_no_graph_is_refused(batch) -> None:
    x, labels = batch

    class Printing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(x[0].numel(), 10)

        def forward(self, images: Tensor) -> Tensor:
            if float(images.mean()) > 0:  # reads a value
                images = images + 0
            return self.linear(images.flatten(1))

    with pytest.raises(ConfigError, match="as one graph .*write compute.compile='forward'"):
        pgd.adversarial(
            Printing(), x, labels, LINF, noise_for(x, LINF), climb=pgd.graph("aot_eager")
        )
