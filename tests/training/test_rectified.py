"""ADR's labels (arXiv 2305.12118) by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from dra_ray import config
from dra_ray.training import objective


def rectified(logits: torch.Tensor, labels: torch.Tensor, done: float) -> torch.Tensor:
    loss = config.Loss(name="adr", adr_temperature=(2.0, 1.0), adr_share=(0.7, 0.95))
    return objective.Rectified(loss).rectified(logits, labels, done)


@pytest.mark.parametrize("done", [0.0, 0.3, 1.0])
def test_labels_are_softened_by_the_average_and_rectified(done: float) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 5, generator=draws)
    labels = torch.randint(5, (40,), generator=draws)
    temperature = 1 + (1 + math.cos(math.pi * done)) / 2
    share = 0.95 - 0.25 * (1 + math.cos(math.pi * done)) / 2
    found = rectified(logits, labels, done)
    for row, z, label in zip(found, logits, labels.tolist(), strict=True):
        chances = F.softmax(z / temperature, 0)
        own = min(max(share - float(chances.max() - chances[label]), 0.0), 1.0)
        expected = own * chances
        expected[label] += 1 - own
        torch.testing.assert_close(row, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    assert torch.equal(found.argmax(1), labels)  # however wrong the average is


def test_a_certain_mistake_leaves_the_label_alone() -> None:
    found = rectified(torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([2]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 1.0]]))


def test_only_adr_asks_the_average() -> None:
    asking = {name for name, kind in objective.OBJECTIVES.items() if kind.asks_average}
    assert asking == {"adr"}
