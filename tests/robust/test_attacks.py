"""Attacks against a plain implementation written from the papers, and the invariants that every attack keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dra_ray import config, data, models
from dra_ray.robust import attacks, losses


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    return models.build(config.Model(name="wrn-10-1"), data.load(config.Data()))


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    split = data.load(config.Data()).train[:16]
    return data.to_float(split.images), split.labels


THREAT = config.Threat(eps_255=32, step_255=8, steps=5)


def plain_trades_attack(student: nn.Module, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """DM-AT's inner loop, step by step, on a copy of the network so that its buffers do not matter."""
    student = copy.deepcopy(student).train()
    with torch.no_grad():
        p = F.softmax(copy.deepcopy(student)(x), dim=1)
    z = (x + (noise * 2 - 1) * THREAT.eps).clamp(0, 1)
    for _ in range(THREAT.steps):
        z = z.clone().requires_grad_()
        q = F.softmax(student(z), dim=1)
        kl = (p * (p.log() - q.log())).sum(1).mean()
        g = torch.autograd.grad(kl, z)[0]
        z = z.detach() + THREAT.step * torch.sign(g)
        z = (x + torch.clamp(z - x, -THREAT.eps, THREAT.eps)).clamp(0, 1)
    return z


def test_the_training_attack_is_that_of_dm_at(student: nn.Module, batch) -> None:
    x, _ = batch
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    student.train()
    target = F.softmax(copy.deepcopy(student)(x).detach(), 1)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    ours = attacks.trades(student, x, target, THREAT, noise)
    torch.testing.assert_close(ours, plain_trades_attack(student, x, noise), rtol=0, atol=1e-6)
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers()), "the attack moved BatchNorm's statistics"
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, nn.BatchNorm2d))


def test_adversarial_images_stay_in_the_ball_and_in_range(student: nn.Module, batch) -> None:
    x, _ = batch
    student.train()
    target = F.softmax(torch.zeros(len(x), 10), 1)
    z = attacks.trades(student, x, target, THREAT, torch.rand(x.shape))
    assert (z - x).abs().max() <= THREAT.eps + 1e-6
    assert z.min() >= 0 and z.max() <= 1


def test_more_steps_break_more(student: nn.Module, batch) -> None:
    x, y = batch
    student.eval()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    y = student(x).argmax(1)  # what it says is right, so that clean accuracy is 1
    right = [int(attacks.evaluate_pgd(student, x, y, THREAT, steps, noise).sum()) for steps in (0, 20)]
    assert right[1] < right[0]


def test_trades_loss_and_gradients_from_its_formula() -> None:
    """L = (1-s) nll + s mean_k(-log p_k) + beta KL(p || q), with gradient through both logits."""
    torch.manual_seed(0)
    y = torch.tensor([0, 2, 1])
    clean, adversarial = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ce, kl = losses.trades(clean, adversarial, y, beta=5.0, label_smoothing=0.1)
    log_p, log_q = clean - clean.logsumexp(1, keepdim=True), adversarial - adversarial.logsumexp(1, keepdim=True)
    plain_ce = (-0.9 * log_p[range(3), y] - 0.1 * log_p.mean(1)).mean()
    plain_kl = 5 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    torch.testing.assert_close(ce, plain_ce)
    torch.testing.assert_close(kl, plain_kl)
    ours = torch.autograd.grad(ce + kl, (clean, adversarial), retain_graph=True)
    for mine, plain in zip(ours, torch.autograd.grad(plain_ce + plain_kl, (clean, adversarial)), strict=True):
        torch.testing.assert_close(mine, plain)
        assert plain.abs().max() > 0


def test_alignment_is_one_minus_the_cosine() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    torch.testing.assert_close(losses.alignment(a, b), torch.tensor((0.0 + 1.0) / 2))
