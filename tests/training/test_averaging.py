"""Weight averages: the decay of DM-AT, and the update against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dra_ray.training import averaging


def test_averaging_decay_follows_dm_at() -> None:
    """0 during the warm-up; 0.1 at its end; (1+d)/(10+d) later; 0.995 from d of about 1790."""
    assert averaging.decay(9, 10, 0.995) == 0
    assert averaging.decay(10, 10, 0.995) == pytest.approx(0.1)
    assert averaging.decay(100, 10, 0.995) == pytest.approx(91 / 100)
    assert averaging.decay(10 + 1789, 10, 0.995) < 0.995 <= averaging.decay(10 + 1791, 10, 0.995)


def test_averaging_without_a_ramp_has_its_limit_at_once() -> None:
    assert [averaging.decay(step, 0, 0.9999, ramp=False) for step in (1, 2, 1000)] == [0.9999] * 3
    assert [averaging.decay(step, 10, 0.9, ramp=False) for step in (9, 10)] == [0.0, 0.9]


def test_averaging_over_epochs_moves_running_statistics_too() -> None:
    model, average = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(10.0)
        model.num_batches_tracked.fill_(5)
    for _ in range(2):  # 1 + 2 (1 - 0.9^2), 10 (1 - 0.9^2)
        averaging.update_all(average, model, 0.9)
    torch.testing.assert_close(average.weight.detach(), torch.full((2,), 1.38))
    torch.testing.assert_close(average.running_mean, torch.full((2,), 1.9))
    assert average.num_batches_tracked == 5


def test_averaging_moves_parameters_only() -> None:
    model, average = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        average.weight.fill_(1.0)
        model.running_mean.fill_(7.0)
    averaging.update(average, model, 0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [0, 0]
    averaging.copy_buffers(average, model)
    assert average.running_mean.tolist() == [7, 7]
