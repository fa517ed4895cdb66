"""Golden values of the maths of training: against a plain form written here, and against numbers
computed once.

Inputs are sines of counted multiples of 1.7, float64. The numbers were computed with NumPy from the
formulas quoted, with gradients by hand, not with this package or autograd; they say when the maths
changes, whoever changes it.
"""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim import Lion
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config
from dra_ray.attacks import pgd
from dra_ray.training import averaging, losses, optimisers, schedule


def sines(*shape: int, phase: float) -> Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + phase).reshape(
        shape
    )


def close(found: Tensor, numbers: list) -> None:
    torch.testing.assert_close(
        found.detach(),
        torch.tensor(numbers, dtype=torch.float64).reshape(found.shape),
        rtol=1e-8,
        atol=2e-9,
    )


# -- attacks on f(x) = 2 V tanh(W x): W 5x4, V 3x5, two images of 2x2 pixels -----------------------
class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(sines(5, 4, phase=0.3)),
            nn.Parameter(2 * sines(3, 5, phase=1.1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.first.T) @ self.second.T


X, LABELS = (0.5 + 0.45 * sines(2, 4, phase=2.0)).view(2, 1, 2, 2), torch.tensor([0, 2])
NOISE = (0.5 + 0.5 * sines(2, 4, phase=4.0)).view(2, 1, 2, 2)
LINF = config.Threat(eps_255=24, step_255=10, steps=3)
L2 = config.Threat(norm="l2", start="normal", eps_255=24, step_255=10, steps=3)

# z <- clip_[0,1](clip_[x-eps,x+eps](z + step sign(dCE/dz))) from clip_[0,1](x + eps (2u-1))
LINF_STEPS = [
    [
        0.815066195,
        0.170528823,
        0.246373628,
        0.897284541,
        0.66909509,
        0.058679161,
        0.43291447,
        0.958655901,
    ],
    [
        0.815066195,
        0.16745609,
        0.246373628,
        0.922153715,
        0.66909509,
        0.019463475,
        0.43291447,
        0.997871588,
    ],
    [0.815066195, 0.16745609, 0.246373628, 0.922153715, 0.66909509, 0.010019261, 0.43291447, 1.0],
]
# z <- clip_[0,1](z + step g/|g|), d = z - x, z <- x + d min(1, eps/|d|) with g = dKL(f(x) ||
# f(z))/dz, from x + 0.001 n
L2_STEPS = [
    [
        0.896575871,
        0.236995588,
        0.172326314,
        0.848571157,
        0.751150459,
        0.079448503,
        0.358349875,
        0.958182018,
    ],
    [
        0.884365614,
        0.211912609,
        0.191000179,
        0.868842087,
        0.742630679,
        0.052762895,
        0.373746242,
        0.980900152,
    ],
    [
        0.879939272,
        0.201967201,
        0.197758951,
        0.876815441,
        0.740110731,
        0.040265928,
        0.379278307,
        0.988454097,
    ],
]


def test_every_step_of_linf_pgd() -> None:
    net = Tiny()
    z = (X + LINF.eps * (2 * NOISE - 1)).clamp(0, 1)
    for steps, numbers in enumerate(LINF_STEPS, 1):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(z), LABELS), z)
        z = (X + (z + LINF.step * gradient.sign() - X).clamp(-LINF.eps, LINF.eps)).clamp(0, 1)
        ours = pgd.adversarial(net, X, LABELS, LINF.model_copy(update={"steps": steps}), NOISE)
        torch.testing.assert_close(ours, z.detach(), rtol=0, atol=1e-12)
        close(ours, numbers)


def test_every_step_of_l2_trades() -> None:
    net = Tiny()
    target = F.softmax(net(X), 1).detach()
    z = X + 0.001 * NOISE
    for steps, numbers in enumerate(L2_STEPS, 1):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            (target * (target.log() - F.log_softmax(net(z), 1))).sum(), z
        )
        z = torch.stack(
            [
                (image + L2.step * g / g.norm()).clamp(0, 1)
                for image, g in zip(z, gradient, strict=True)
            ]
        )
        z = torch.stack(
            [
                x + (image - x) * min(1.0, L2.eps / float((image - x).norm()))
                for image, x in zip(z.detach(), X, strict=True)
            ]
        )
        ours = pgd.trades(net, X, target, L2.model_copy(update={"steps": steps}), NOISE)
        torch.testing.assert_close(
            ours, z, rtol=0, atol=1e-7
        )  # torch's renorm divides by norm + 1e-7
        torch.testing.assert_close(
            ours, torch.tensor(numbers, dtype=torch.float64).view_as(ours), rtol=0, atol=1e-7
        )


# -- losses ----------------------------------------------------------------------------------------
def logits() -> tuple[Tensor, Tensor, Tensor]:
    return (
        (2 * sines(3, 4, phase=0.5)).requires_grad_(),
        (2 * sines(3, 4, phase=2.5)).requires_grad_(),
        torch.tensor([0, 2, 1]),
    )


def test_trades_loss_and_gradients() -> None:
    """p = softmax z_n, q = softmax z_a, t the smoothed target: dCE/dz_n = (p - t)/B, dKL/dz_a = (q
    - p)/B, and dKL/dz_n = p (log p - log q - KL_i)/B with KL_i of the row.
    """
    clean, adversarial, y = logits()
    ce, kl = losses.trades(clean, adversarial, y, beta=5.0, label_smoothing=0.1)
    close(ce, [2.5325989971423613])
    close(kl, [8.957500987499444])
    p, q = F.softmax(clean, 1).detach(), F.softmax(adversarial, 1).detach()
    target, rows = 0.9 * F.one_hot(y, 4) + 0.1 / 4, (p * (p.log() - q.log())).sum(1, keepdim=True)
    by_hand = (p - target) / 3, 5 / 3 * p * (p.log() - q.log() - rows), 5 / 3 * (q - p)
    found = *torch.autograd.grad(ce, clean), *torch.autograd.grad(kl, (clean, adversarial))
    for ours, plain in zip(found, by_hand, strict=True):
        torch.testing.assert_close(
            ours, plain, rtol=1e-6, atol=1e-8
        )  # the target's 0.9 and 0.025 are float32
    close(
        found[0][0],
        [-0.20205875563142336, 0.19690416377164824, 0.001961505700921661, 0.003193086158853451],
    )
    close(
        found[1][1],
        [0.009121988608816854, 0.6084539042797885, -0.10334020727077388, -0.5142356856178314],
    )
    close(
        found[2][2],
        [-1.094077282172417, -0.0980084940766349, 0.6639511150921696, 0.5281346611568823],
    )


def test_ikl_loss_and_gradients() -> None:
    """alpha 4, beta 20: 4 H(p, q), and 20/(4B) times the sum over all ordered pairs of classes;
    d(pairs)/dz_n,j = 20/(4B) 4 w_j sum_k w_k (d_j - d_k) with d = z_n - z_a.
    """
    clean, adversarial, y = logits()
    weights = F.softmax(sines(3, 4, phase=1.5), 1)
    ce, robust = losses.ikl(clean, adversarial, y, weights, alpha=4.0, beta=20.0)
    close(ce, [2.5769450276917936])
    close(robust, [52.72790658751072])
    close(losses.ikl(clean, adversarial, y, weights, alpha=0.0, beta=20.0)[1], [42.06487843919538])
    to_clean, to_adversarial = torch.autograd.grad(robust, (clean, adversarial))
    close(
        to_clean[0],
        [0.49319655983899946, 4.366074946277178, -0.112195631582135, -4.747075874534042],
    )
    close(
        to_adversarial[2],
        [-6.244118127008356, -0.7268975327014777, 3.4354806246017846, 3.53553503510805],
    )


def test_margin_loss() -> None:
    """(0.958851077 - 1.616992808) + (0.824236970 - 1.700873241) + 0, the third being
    misclassified.
    """
    clean, _, _ = logits()
    close(
        pgd.margin(clean, torch.tensor([1, 0, 3])),
        [0.958851077208406 - 1.6169928076391802 + 0.8242369704835132 - 1.7008732412571288],
    )


# -- schedules -------------------------------------------------------------------------------------

# epochs of the run: {epoch: (learning rate, momentum)}, peak 0.2; at 20 epochs there is no rise
ONE_CYCLE = {
    100: {
        0: (0.008, 0.95),
        1: (0.152, 0.875),
        2: (0.199987022549, 0.850006488751),
        50: (0.100805924644, 0.899597236067),
        99: (8e-7, 0.95),
    },
    400: {
        0: (0.008, 0.95),
        1: (0.0137895084046, 0.946984631039),
        9: (0.2, 0.85),
        200: (0.103221975903, 0.898389205605),
        399: (8e-7, 0.95),
    },
    20: {
        0: (0.19967573211, 0.850162134593),
        1: (0.197094193366, 0.851452909129),
        10: (0.0879467801891, 0.906026834013),
        19: (8e-7, 0.95),
    },
}


@pytest.mark.parametrize("epochs", [100, 400, 20])
def test_one_cycle(epochs: int) -> None:
    """p = 0.025 E - 1: a cosine from lr/25 to lr up to epoch p, and on to lr/250,000 at the last;
    torch's OneCycleLR, stepped per epoch.
    """
    settings = config.Optim(epochs=epochs, lr=0.2, pct_start=0.025)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, pct_start=0.025, total_steps=epochs
    )
    for epoch in range(epochs):
        found, group = schedule.at(98 * epoch, 98, settings), optimizer.param_groups[0]
        assert found == pytest.approx((group["lr"], group["momentum"]), rel=1e-9, abs=1e-12)
        if epoch in ONE_CYCLE[epochs]:
            assert found == pytest.approx(ONE_CYCLE[epochs][epoch], rel=1e-9, abs=1e-12)
        optimizer.step()
        if epoch + 1 < epochs:
            reference.step()


WARMUP_COSINE = {
    0: 1e-6,
    98: 4.06e-5,
    244: 9.95959183673e-5,
    245: 1e-4,
    246: 9.99999897519e-5,
    1000: 9.42836334121e-5,
    4899: 1.00000102481e-5,
}


def test_warmup_cosine() -> None:
    """optax's: init + (peak - init) t/W below W; then peak ((1 - a) (1 + cos(pi (t-W)/(T-W)))/2 +
    a) with a = end/peak.
    """
    settings = config.Optim(
        schedule="warmup-cosine", epochs=100, lr=1e-4, lr_start=1e-6, lr_end=1e-5, warmup_epochs=5
    )
    for step in range(0, 4900, 7):
        plain = (
            1e-6 + 9.9e-5 * step / 245
            if step < 245
            else 1e-4 * (0.9 * (1 + math.cos(math.pi * (step - 245) / 4655)) / 2 + 0.1)
        )
        assert schedule.at(step, 49, settings)[0] == pytest.approx(plain, rel=1e-12)
    for step, rate in WARMUP_COSINE.items():
        assert schedule.at(step, 49, settings)[0] == pytest.approx(rate, rel=1e-11)


# -- weights ---------------------------------------------------------------------------------------
def test_decay_of_the_average() -> None:
    """0 before the warm-up's end, then min(0.995, (1+d)/(10+d)): 1/10 at d=0, 2/11, ..., 1791/1800
    = 0.995 at d=1790.
    """
    numbers = {
        979: 0.0,
        980: 0.1,
        981: 2 / 11,
        989: 10 / 19,
        1070: 0.91,
        2769: 1790 / 1799,
        2770: 0.995,
        2771: 0.995,
        39200: 0.995,
    }
    assert {step: averaging.decay(step, 980, 0.995) for step in numbers} == pytest.approx(
        numbers, rel=1e-12
    )


LION = [  # theta and m after each step: lr 0.01, betas (0.95, 0.98), decay 0.5
    ([0.4875, -0.985, 0.24875], [0.002, -0.004, 0.0]),
    ([0.4950625, -0.990075, 0.23750625], [-0.00404, -0.00192, 0.008]),
    ([0.5025871875, -0.975124625, 0.24631871875], [-0.0029592, -0.0014816, -0.00216]),
]


@pytest.mark.parametrize("foreach", [False, True])
def test_lion(foreach: bool) -> None:
    """theta (1 - lr wd) - lr sign(b1 m + (1-b1) g), then m = b2 m + (1-b2) g."""
    theta = nn.Parameter(torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64))
    if foreach:
        optimizer: torch.optim.Optimizer = Lion(
            [theta], lr=0.01, betas=(0.95, 0.98), weight_decay=0.5, foreach=True
        )
    else:
        holder = nn.Module()
        holder.theta = theta
        optimizer = optimisers.build(
            holder, None, config.Optim(name="lion", lr=0.01, betas=(0.95, 0.98), weight_decay=0.5)
        )
    plain, m = theta.detach().clone(), torch.zeros(3, dtype=torch.float64)
    gradients = torch.tensor(
        [[0.1, -0.2, 0.0], [-0.3, 0.1, 0.4], [0.05, 0.02, -0.5]], dtype=torch.float64
    )
    for gradient, (numbers, moment) in zip(gradients, LION, strict=True):
        theta.grad = gradient.clone()
        optimizer.step()
        plain = plain * (1 - 0.01 * 0.5) - 0.01 * torch.sign(0.95 * m + 0.05 * gradient)
        m = 0.98 * m + 0.02 * gradient
        torch.testing.assert_close(theta.detach(), plain, rtol=1e-12, atol=0)
        close(theta, numbers)
        close(optimizer.state[theta]["exp_avg"], moment)


def test_nesterov_sgd_with_the_cycled_momentum() -> None:
    """v <- mu v + (g + wd theta), theta <- theta - lr (g + wd theta + mu v): lr and mu of the very
    step, v starting at the first gradient.
    """
    theta = nn.Parameter(torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64))
    holder = nn.Module()
    holder.theta = theta
    optimizer = optimisers.build(holder, None, config.Optim(lr=0.2, weight_decay=5e-4))
    plain, velocity = theta.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for epoch in (0, 1, 9):
        rate, momentum = ONE_CYCLE[400][epoch]
        gradient = sines(3, phase=float(epoch))
        theta.grad = gradient.clone()
        optimisers.set_rate(optimizer, rate, momentum)
        optimizer.step()
        full = gradient + 5e-4 * plain
        velocity = momentum * velocity + full
        plain = plain - rate * (full + momentum * velocity)
        torch.testing.assert_close(theta.detach(), plain, rtol=1e-12, atol=0)
