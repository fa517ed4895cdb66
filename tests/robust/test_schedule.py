"""Learning rate and momentum against torch's own OneCycleLR, the schedule that DM-AT steps once an epoch."""

from __future__ import annotations

import pytest
import torch

from dra_ray import config
from dra_ray.robust import schedule


@pytest.mark.parametrize(("epochs", "pct_start"), [(400, 0.025), (200, 0.025), (18, 0.2), (30, 0.3), (20, 0.025)])
def test_one_cycle_is_torchs(epochs: int, pct_start: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9, nesterov=True)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs, pct_start=pct_start)
    settings = config.Optim(epochs=epochs, lr=0.2, pct_start=pct_start)
    for epoch in range(epochs):
        group = optimizer.param_groups[0]
        assert schedule.one_cycle(epoch, settings) == pytest.approx((group["lr"], group["momentum"]), rel=1e-9, abs=1e-12), epoch
        optimizer.step()
        if epoch + 1 < epochs:
            reference.step()


def test_the_ends_of_the_cycle() -> None:
    """lr/25 with momentum 0.95 at first; the peak with 0.85 after 2.5 % of 400 epochs; lr/250,000 at last."""
    settings = config.Optim(epochs=400, lr=0.2, pct_start=0.025)
    assert schedule.one_cycle(0, settings) == pytest.approx((0.2 / 25, 0.95))
    assert schedule.one_cycle(9, settings) == pytest.approx((0.2, 0.85))
    assert schedule.one_cycle(399, settings) == pytest.approx((0.2 / 250_000, 0.95))
