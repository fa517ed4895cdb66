"""Adversarial weight perturbation against its proxy form, and that it leaves no trace; sums over
workers, with two of them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray.training import losses, perturbation
from tests.training.two_workers import on_two


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ]
    return nn.Sequential(*layers).train()


X, LABELS = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5


def proxy_form(student: nn.Module, gamma: float) -> dict[str, Tensor]:
    """The published way: a copy takes a descent step on the negative loss; each difference is
    scaled to the weight's norm.
    """
    proxy = copy.deepcopy(student)
    descent = torch.optim.SGD(proxy.parameters(), lr=0.1)
    (-F.cross_entropy(proxy(X), LABELS)).backward()
    descent.step()
    moved = dict(proxy.named_parameters())
    found = {}
    for name, weight in student.named_parameters():
        change = (moved[name] - weight).detach()
        found[name] = (
            weight.detach() + (gamma * weight.norm() / (change.norm() + 1e-20) * change).detach()
            if weight.dim() > 1
            else weight.detach()
        )
    return found


def test_it_is_one_ascent_step_of_relative_size() -> None:
    student = net()
    expected, before = proxy_form(student, 0.05), copy.deepcopy(student.state_dict())

    def loss() -> Tensor:
        return F.cross_entropy(student(X), LABELS)

    with perturbation.perturbed(student, 0.05, loss):
        for name, weight in student.named_parameters():
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-4, atol=1e-5)
            if weight.dim() > 1:
                torch.testing.assert_close(
                    (weight.detach() - before[name]).norm(),
                    0.05 * before[name].norm(),
                    rtol=1e-4,
                    atol=0,
                )
        buffers = dict(student.named_buffers())
        assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items()), (
            "the ascent moved BatchNorm's statistics"
        )
        assert loss() > F.cross_entropy(restored(before)(X), LABELS)
    assert all(torch.equal(weight, before[name]) for name, weight in student.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def restored(state: dict[str, Tensor]) -> nn.Module:
    student = net()
    student.load_state_dict(state)
    return student


def test_gradients_come_from_the_perturbed_weights() -> None:
    student, gamma = net(), 0.05
    there = net()
    there.load_state_dict(there.state_dict() | proxy_form(student, gamma))
    F.cross_entropy(there(X), LABELS).backward()
    with perturbation.perturbed(student, gamma, lambda: F.cross_entropy(student(X), LABELS)):
        F.cross_entropy(student(X), LABELS).backward()
    for ours, theirs in zip(student.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_weights_come_back_after_an_error() -> None:
    student = net()
    before = copy.deepcopy(student.state_dict())
    with (  # noqa: PT012 - the error comes out of the block
        pytest.raises(ZeroDivisionError),
        perturbation.perturbed(student, 0.1, lambda: student(X).square().mean()),
    ):
        assert not torch.equal(student[0].weight, before["0.weight"])
        raise ZeroDivisionError
    with (
        pytest.raises(ZeroDivisionError),
        perturbation.perturbed(student, 0.1, lambda: student(X).sum() / (1 // 0)),
    ):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student[1].track_running_stats


def test_a_weight_without_slope_stays() -> None:
    student = net()
    before = student[0].weight.detach().clone()
    with perturbation.perturbed(student, 0.1, lambda: student[4].weight.square().sum()):
        assert torch.equal(student[0].weight, before)
        assert not student[4].weight.isnan().any()


def shared(part: slice) -> list[Tensor]:
    """Class means' sums, and the perturbed parameters, of one worker's part of the batch."""
    student, means = net(norm=False), losses.ClassMeans(5)
    means.add(F.softmax(student(X), 1).detach()[part], LABELS[part])
    with perturbation.perturbed(
        student, 0.05, lambda: F.cross_entropy(student(X[part]), LABELS[part])
    ):
        return [means.totals, *(parameter.detach().clone() for parameter in student.parameters())]


def half(rank: int) -> list[Tensor]:
    return shared(slice(4 * rank, 4 * rank + 4))


def test_workers_share_class_means_and_perturb_alike() -> None:
    """Half of a batch on each of two workers, against the whole batch."""
    alone = shared(slice(0, 8))
    for together in on_two(half):
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
