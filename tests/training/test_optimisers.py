"""Parameter groups of each rule; Lion's two implementations; resuming to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.optim import Lion
from torch import nn

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.training import optimisers
from dra_ray.training.projector import projector

SHAPE = Shape(10, 3, 8, (0.5,) * 3, (0.25,) * 3)


class Tokens(nn.Module):
    """What a transformer has beside its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1, 8)),
            nn.Parameter(torch.zeros(1, 16, 8)),
        )
        self.gamma = nn.Parameter(torch.full((8,), 1e-4))
        self.norm, self.embedding, self.linear = (
            nn.LayerNorm(8),
            nn.Embedding(4, 8),
            nn.Linear(8, 10),
        )


def decayed(optimizer: torch.optim.Optimizer, *modules: nn.Module) -> dict[str, float]:
    """Parameter -> weight decay; every parameter is in exactly one group."""
    rates = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    names = {
        f"{number}.{name}": id(p)
        for number, module in enumerate(modules)
        for name, p in module.named_parameters()
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(names)
    return {name: rates[key] for name, key in names.items()}


def test_dm_at_decays_all_but_batchnorm() -> None:
    student, head = students.build(config.Model(name="wrn-10-1"), SHAPE), projector(64, 16, 32)
    rates = decayed(optimisers.build(student, head, config.Optim(weight_decay=5e-4)), student, head)
    assert {rate for name, rate in rates.items() if "batchnorm" in name} == {0.0}
    assert {rate for name, rate in rates.items() if "batchnorm" not in name} == {5e-4}
    assert rates["0.logits.bias"] == 5e-4
    assert rates["1.0.bias"] == 5e-4


def test_only_kernels_decay_where_asked() -> None:
    student, head = Tokens(), projector(8, 4, 6)
    rates = decayed(
        optimisers.build(
            student, head, config.Optim(name="adamw", decayed="weights", weight_decay=0.5)
        ),
        student,
        head,
    )
    assert {name for name, rate in rates.items() if rate} == {
        "0.patch.weight",
        "0.linear.weight",
        "1.0.weight",
        "1.2.weight",
        "1.4.weight",
    }


def test_all_decay_where_asked() -> None:
    student = Tokens()
    optimizer = optimisers.build(student, None, config.Optim(decayed="all", weight_decay=2e-4))
    assert set(decayed(optimizer, student).values()) == {2e-4}
    assert len(optimizer.param_groups) == 1


def test_settings_reach_the_optimiser() -> None:
    student = nn.Linear(3, 2)
    sgd = optimisers.build(
        student, None, config.Optim(lr=0.3, momentum=0.7, nesterov=False)
    ).param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["dampening"]) == (0.3, 0.7, False, 0)
    for name in ("lion", "adamw"):
        optimizer = optimisers.build(
            student, None, config.Optim(name=name, lr=1e-4, betas=(0.95, 0.98), weight_decay=0.5)
        )
        assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["weight_decay"]) == (
            (0.95, 0.98),
            0.5,
        )
        optimisers.set_rate(optimizer, 3e-5, 0.8)
        assert optimizer.param_groups[0]["lr"] == 3e-5
        assert "momentum" not in optimizer.param_groups[0]
    optimizer = optimisers.build(Tokens(), None, config.Optim(decayed="weights"))
    optimisers.set_rate(optimizer, 0.05, 0.85)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [
        (0.05, 0.85)
    ] * 2


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim.nesterov=true needs momentum"):
        optimisers.build(nn.Linear(3, 2), None, config.Optim(momentum=0.0))
    for name in ("lion", "adamw"):
        with pytest.raises(ConfigError, match=r"optim.betas=\[0.9, 1.0\] must both be below 1"):
            optimisers.build(nn.Linear(3, 2), None, config.Optim(name=name, betas=(0.9, 1.0)))


def trained(
    student: nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> list[torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimisers.set_rate(optimizer, 1e-2 / (1 + step), 0.9)
        optimizer.step()
    return [p.detach().clone() for p in student.parameters()]


@pytest.mark.parametrize("name", ["sgd", "lion", "adamw"])
def test_a_resumed_optimiser_goes_on_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    first = Tokens()
    settings = config.Optim(name=name, decayed="weights", weight_decay=0.1)
    optimizer = optimisers.build(first, None, settings)
    trained(first, optimizer, range(3))
    second = copy.deepcopy(first)
    resumed = optimisers.build(second, None, settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(
        trained(first, optimizer, range(3, 6)), trained(second, resumed, range(3, 6)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["sgd", "lion", "adamw"])
def test_many_tensors_at_once_round_as_one_by_one(name: str) -> None:
    """The claim of the module: "foreach", which CUDA gets, equals what the CPU gets."""
    results: list[list[torch.Tensor]] = []
    for foreach in (False, True):
        torch.manual_seed(0)
        student = Tokens()
        weights: list[Any] = [{"params": list(student.parameters())}]
        if name == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                weights, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=foreach
            )
        elif name == "lion":
            optimizer = Lion(weights, 1e-4, betas=(0.95, 0.98), weight_decay=0.5, foreach=foreach)
        else:
            optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.05, foreach=foreach)
        results.append(trained(student, optimizer, range(4)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_clipping_is_by_the_norm_of_everything() -> None:
    student = Tokens()
    optimizer = optimisers.build(student, None, config.Optim(decayed="weights"))
    trained(student, optimizer, range(1))
    before = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert optimisers.clip(optimizer, None) is None
    torch.testing.assert_close(optimisers.clip(optimizer, 1e9), before.norm())
    assert torch.equal(torch.cat([p.grad.flatten() for p in student.parameters()]), before), (
        "what is short enough stays as it is"
    )
    optimisers.clip(optimizer, 1.0)
    after = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(after, before / before.norm(), rtol=1e-5, atol=1e-7)
