"""EOT-PGD where the gradient is right only on average, and PGD with several starts."""

import pytest
import torch
from torch import nn

from dra_ray.attacks.pgd import evaluate_pgd, strongest
from dra_ray.attacks.randomised import eot_pgd
from dra_ray.config import Threat

THREAT = Threat(eps_255=51, step_255=12)


class Drawing(nn.Module):
    """Linear in the image, with weights that are drawn anew in each pass, and for each image,
    around their mean.
    """

    def __init__(self, spread):
        super().__init__()
        self.spread = spread
        self.weight = nn.Parameter(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return (
            (self.weight + self.spread * torch.randn(len(x), 2, 16)) @ x.flatten(1)[:, :, None]
        ).squeeze(2)


@pytest.fixture
def case():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 4, 4)
    return x, Drawing(0.0)(x).argmax(1), torch.rand(2, 64, 1, 4, 4)


def test_without_randomness_it_is_plain_pgd(case):
    x, labels, noise = case
    student = Drawing(0.0)
    plain = evaluate_pgd(student, x, labels, THREAT, noise[0], 5)
    score = eot_pgd(student, x, labels, THREAT, noise[:1], 5, eot=1, passes=3)
    assert torch.equal(score.worst, plain)
    assert torch.equal(score.mean, plain.float())
    assert plain.any()
    assert not plain.all()
    assert torch.equal(
        strongest(student, x, labels, THREAT, noise[0], 5, eot=4),
        strongest(student, x, labels, THREAT, noise[0], 5),
    )


def test_averaged_gradients_attack_better(case):
    x, labels, noise = case
    student = Drawing(1.0)
    means = [
        float(eot_pgd(student, x, labels, THREAT, noise[:1], 8, eot=eot, passes=40).mean.mean())
        for eot in (1, 30)
    ]
    assert means[1] < means[0] - 0.02


def test_the_worst_start_counts(case):
    x, labels, noise = case
    bent = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
    labels = bent(x).argmax(1)
    each = [evaluate_pgd(bent, x, labels, THREAT, one, 1, step=0.02) for one in noise]
    assert torch.equal(
        evaluate_pgd(bent, x, labels, THREAT, noise, 1, step=0.02), each[0] & each[1]
    )
    score = eot_pgd(bent, x, labels, THREAT, noise, 3, eot=2, passes=2)
    assert torch.equal(score.worst, score.mean == 1)
    assert not bent.training
