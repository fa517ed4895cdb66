"""Two workers with half a batch each compute what one worker computes with the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dra_ray import config, students
from dra_ray.attacks import pgd
from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.training import syncnorm
from tests.training.two_workers import on_two

SHAPE = Shape(10, 3, 8, (0.5,) * 3, (0.25,) * 3)
PARTS = {"even": [slice(0, 4), slice(4, 8)], "uneven": [slice(0, 3), slice(3, 8)]}
Found = dict[str, Tensor]


def student(name: str) -> students.Student:
    torch.manual_seed(0)
    return students.build(config.Model(name=name), SHAPE).train()


def batch() -> Tensor:
    """Images whose halves differ in mean and in spread, so that statistics of a half are not those
    of the whole.
    """
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[4:] = 0.7 + 0.3 * x[4:]
    return x


def measure(net: students.Student, x: Tensor, whole: int) -> Found:
    """An attack step and a training step, as a sum over the batch: logits, input gradient,
    parameter gradients, buffers.
    """
    x = x.clone().requires_grad_(True)
    before = {key: buffer.clone() for key, buffer in net.named_buffers()}
    with pgd.frozen(net), pgd.untracked(net):
        logits = net(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert all(torch.equal(buffer, before[key]) for key, buffer in net.named_buffers())
    found = {"attack.logits": logits.detach(), "attack.gradient": gradient}
    logits, features = net.with_features(x)
    (logits.square().sum() + features.sin().sum()).div(whole).backward()
    found |= {"logits": logits.detach(), "features": features.detach(), "gradient": x.grad}
    found |= {f"parameter.{key}": p.grad for key, p in net.named_parameters() if p.grad is not None}
    found |= {f"buffer.{key}": b.clone() for key, b in net.named_buffers()}
    return found | {"eval": net.eval()(x).detach()}


def halves(rank: int) -> dict[str, Found]:
    """What worker `rank` computes, by kind of parts and student."""
    return {
        f"{kind}-{name}": measure(
            syncnorm.synchronised(student(name)), batch()[parts[rank]], len(batch())
        )
        for kind, parts in PARTS.items()
        for name in ("wrn-10-1", "relu-wrn-10-1")
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Found]]:
    return on_two(halves)


@pytest.mark.parametrize("name", ["wrn-10-1", "relu-wrn-10-1"])
@pytest.mark.parametrize("kind", PARTS)
def test_two_workers_compute_what_one_does(
    found: list[dict[str, Found]], name: str, kind: str
) -> None:
    alone = measure(student(name), batch(), len(batch()))
    workers = [worker[f"{kind}-{name}"] for worker in found]
    assert alone.keys() == workers[0].keys() == workers[1].keys()
    for key, expected in alone.items():
        if key.startswith("buffer."):
            together = [w[key] for w in workers]
        elif key.startswith("parameter."):
            together = [workers[0][key] + workers[1][key]]
        else:
            together = [torch.cat([w[key] for w in workers])]
        for value in together:
            torch.testing.assert_close(
                value, expected, rtol=1e-4, atol=1e-5, msg=lambda told, key=key: f"{key}: {told}"
            )


def test_halves_without_synchronisation_differ() -> None:
    """What the test above would see if it saw nothing."""
    alone, half = (
        measure(student("wrn-10-1"), batch(), 8),
        measure(student("wrn-10-1"), batch()[:4], 8),
    )
    assert (alone["attack.logits"][:4] - half["attack.logits"]).abs().max() > 1e-2


def test_one_worker_computes_exactly_what_batchnorm_does() -> None:
    plain, synced = student("wrn-10-1"), syncnorm.synchronised(student("wrn-10-1"))
    assert list(plain.state_dict()) == list(synced.state_dict())
    one, other = measure(plain, batch(), 8), measure(synced, batch(), 8)
    assert all(torch.equal(one[key], other[key]) for key in one)
    norms = [m for m in synced.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(type(m) is syncnorm.SynchronisedBatchNorm2d and m.momentum == 0.01 for m in norms)


def test_a_norm_that_cannot_be_synchronised_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"compute.sync_batchnorm=true: this student has BatchNorm1d"
    ):
        syncnorm.synchronised(nn.Sequential(nn.BatchNorm1d(3)))
