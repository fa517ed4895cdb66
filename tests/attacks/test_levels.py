"""A folded, rearranged student computes the plain one's function; rows without their batch have the
batch's bits.
"""

import pytest
import torch
from torch import nn

from dra_ray import config, students
from dra_ray.attacks import levels
from dra_ray.attacks.levels import Rows, fold, prepare
from dra_ray.data import Shape
from dra_ray.training import arithmetic


def shaken(student):
    """As after some training: no statistic and no scale is 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return student


@pytest.mark.parametrize(
    ("name", "side", "folded"),
    [
        # conv_0 before batchnorm_1 in each block; the stem's output is also the first block's
        # residual
        ("wrn-10-1", 16, 3),
        # here the first block has a shortcut, and the stem feeds one BatchNorm only
        ("wrn-10-2", 16, 4),
        ("relu-wrn-10-2", 16, 4),
        ("resnet-18", 8, 20),
        ("vit-t-4", 8, 0),
        ("timm/resnet10t", 32, 14),
    ],
)
def test_every_student_computes_the_same_function(name, side, folded):
    torch.manual_seed(0)
    shape = Shape(10, 3, side, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    student = shaken(students.build(config.Model(name=name), shape)).eval()
    x = torch.rand(4, 3, side, side)
    with torch.no_grad():
        plain = student(x)
        before = [parameter.clone() for parameter in student.parameters()]
        ours = prepare(student, "fast", "cpu")
        assert float((ours(x) - plain).abs().max()) <= 1e-5 * max(1, float(plain.abs().max()))
    assert fold(prepare(student, "reference", "cpu")) == folded
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert torch.equal(student(x), plain)
    assert torch.equal(prepare(student, "reference", "cpu")(x), plain)


def test_a_train_mode_student_is_prepared_in_eval_mode():
    student = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    x = torch.rand(2, 3, 6, 6)
    ours = prepare(student, "fast", "cpu")
    assert student.training
    assert not ours.training
    assert torch.allclose(ours(x), student.eval()(x), atol=1e-6)


class Twice(nn.Module):
    """The convolution's output is used twice, and one BatchNorm serves two convolutions: neither
    may be folded.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.other = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3),
        )

    def forward(self, x):
        out = self.b(x)
        return (self.norm(self.a(x)) + self.norm(self.a(x + 1)) + out + self.other(out)).mean(
            (2, 3)
        )


class Branching(nn.Module):
    """Its flow depends on data, so no graph can be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        out = self.norm(self.conv(x)).mean((2, 3))
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize("kind", [Twice, Branching])
def test_what_cannot_be_folded_stays(kind):
    torch.manual_seed(0)
    student, x = shaken(kind()).eval(), torch.rand(2, 3, 6, 6)
    assert fold(prepare(student, "reference", "cpu")) == 0
    assert torch.allclose(prepare(student, "fast", "cpu")(x), student(x), atol=1e-6)


def test_a_rearranged_student_is_prepared_by_itself():
    student = students.build(config.Model(name="wrn-10-1"), Shape(10, 1, 8, (0.5,), (0.5,))).eval()
    x = torch.rand(2, 1, 8, 8)
    ours = prepare(
        arithmetic.arranged(student, config.Compute(channels_last=True), 8), "fast", "cpu"
    )
    with torch.no_grad():
        expected = student(x)
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.allclose(ours(x), expected, atol=1e-5), (
            "what is prepared is a copy, not the student again"
        )


def test_bfloat16_gives_float32_logits_near_the_plain_ones():
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    ).eval()
    student.requires_grad_(False)
    x = torch.rand(2, 3, 6, 6)
    logits = levels.InBfloat16(student, torch.device("cpu"))(x)
    assert logits.dtype == torch.float32
    assert 0 < float((logits - student(x)).abs().max()) < 0.05


def test_rows_give_the_batchs_bits_and_compute_fewer():
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    ).eval()
    rows = Rows(student, exact=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in range(60):
            x = torch.rand(20, 3, 6, 6, generator=generator)
            wanted = (torch.rand(20, generator=generator) < 0.4).nonzero().squeeze(1)
            if len(wanted):
                assert torch.equal(rows(x, wanted), student(x)[wanted]), step
    assert rows.computed < 0.8 * 60 * 20


def test_rows_compute_the_whole_batch_where_a_row_depends_on_it():
    def mixing(x):
        return torch.stack([x.flatten(1).sum(1), x.sum().expand(len(x))], 1)

    rows = Rows(mixing, exact=True)
    for wanted in ([0, 2], [1, 2], [3], [0, 1, 2, 3, 4, 5], [4, 5, 1]):
        x = torch.rand(6, 1, 4, 4)
        assert torch.equal(rows(x, torch.tensor(wanted)), mixing(x)[wanted])
