"""What two workers tell each other, and that a process alone keeps what it has."""

from __future__ import annotations

import torch
from torch import Tensor

from dra_ray.training import workers
from tests.training.two_workers import on_two


def tensors(rank: int) -> list[Tensor]:
    """Of several shapes and memory layouts, one of them a view without storage of its own."""
    strided = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    return [
        strided + 100 * rank,
        torch.tensor(1.0 + rank).expand(3),
        torch.empty(0),
        torch.tensor([[0.5], [-2.0]]) * (rank + 1),
    ]


def told(rank: int) -> dict[str, list[Tensor]]:
    averaged, shared = ([tensor.clone() for tensor in tensors(rank)] for _ in range(2))
    workers.average_(averaged)
    workers.share_(shared)
    return {
        "count": [torch.tensor(workers.count())],
        "totals": workers.totals(tensors(rank)),
        "total": [workers.total(tensor) for tensor in tensors(rank)],
        "average": averaged,
        "shared": shared,
        "gathered": [workers.gathered(tensor.contiguous()) for tensor in tensors(rank)],
        "nothing": workers.totals([]),
    }


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_two_workers() -> None:
    first, second = tensors(0), tensors(1)
    sums = [a + b for a, b in zip(first, second, strict=True)]
    wanted = {
        "count": [torch.tensor(2)],
        "totals": sums,
        "total": sums,
        "average": [tensor / 2 for tensor in sums],
        "shared": first,
        "gathered": [torch.stack(pair) for pair in zip(first, second, strict=True)],
        "nothing": [],
    }
    for found in on_two(told):
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not equal(found[name], wanted[name])] == []


def test_alone() -> None:
    found = told(1)
    assert int(found["count"][0]) == 1
    assert found["nothing"] == []
    assert all(equal(found[name], tensors(1)) for name in ("totals", "total", "average", "shared"))
    assert equal(found["gathered"], [tensor[None] for tensor in tensors(1)])
