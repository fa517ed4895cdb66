"""Learning rate and momentum against torch's own schedulers and the published formulas."""

from __future__ import annotations

import pytest
import torch

from dra_ray import config
from dra_ray.errors import ConfigError
from dra_ray.training import schedule

STEPS = 7  # of an epoch


@pytest.mark.parametrize(
    ("epochs", "pct_start"), [(400, 0.025), (200, 0.025), (18, 0.2), (30, 0.3), (20, 0.025)]
)
def test_one_cycle_is_torchs(epochs: int, pct_start: float) -> None:
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9, nesterov=True
    )
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=epochs, pct_start=pct_start
    )
    settings = config.Optim(epochs=epochs, lr=0.2, pct_start=pct_start)
    for epoch in range(epochs):
        group = optimizer.param_groups[0]
        for step in (STEPS * epoch, STEPS * epoch + STEPS - 1):
            assert schedule.at(step, STEPS, settings) == pytest.approx(
                (group["lr"], group["momentum"]), rel=1e-9, abs=1e-12
            ), epoch
        optimizer.step()
        if epoch + 1 < epochs:
            reference.step()


def test_the_ends_of_the_cycle() -> None:
    """lr/25 with momentum 0.95 at first; the peak with 0.85 after 2.5 % of 400 epochs; lr/250,000
    at last.
    """
    settings = config.Optim(epochs=400, lr=0.2, pct_start=0.025)
    assert schedule.one_cycle(0, settings) == pytest.approx((0.2 / 25, 0.95))
    assert schedule.one_cycle(9, settings) == pytest.approx((0.2, 0.85))
    assert schedule.one_cycle(399, settings) == pytest.approx((0.2 / 250_000, 0.95))


def test_a_rise_shorter_than_an_epoch_starts_on_the_way_down() -> None:
    for epochs in (1, 2, 20, 39):  # 0.025 of 40 is 1, where torch divides by zero
        settings = config.Optim(epochs=epochs, lr=0.2, pct_start=0.025)
        rates = [schedule.one_cycle(epoch, settings) for epoch in range(epochs)]
        assert all(0 < rate <= 0.2 and 0.85 <= momentum < 0.951 for rate, momentum in rates)
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx((0.2 / 250_000, 0.95))
    with pytest.raises(ConfigError, match="a rise of no length"):
        config.validate(config.Experiment, {"optim": {"epochs": 40, "pct_start": 0.025}}, "test")


def test_cosine_is_torchs_per_epoch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    settings = config.Optim(schedule="cosine", epochs=30, lr=0.2, momentum=0.8)
    for epoch in range(30):
        for step in (STEPS * epoch, STEPS * epoch + STEPS - 1):
            assert schedule.at(step, STEPS, settings) == pytest.approx(
                (optimizer.param_groups[0]["lr"], 0.8), rel=1e-9
            )
        optimizer.step()
        reference.step()


def test_ikls_cosine_is_one_epoch_ahead_of_a_longer_one() -> None:
    """cos(pi (e+1)/(E+1)): torch's cosine of E+1 epochs from its second epoch on."""
    ikl, longer = (
        config.Optim(schedule=name, epochs=epochs, lr=0.2)  # type: ignore[arg-type]
        for name, epochs in (("ikl-cosine", 30), ("cosine", 31))
    )
    for epoch in range(30):
        assert schedule.at(epoch, 1, ikl) == schedule.at(epoch + 1, 1, longer)


def test_drops_are_torchs_milestones() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5, 8], gamma=0.1)
    settings = config.Optim(schedule="drops", epochs=10, lr=0.1, lr_drops=(5, 8))
    for epoch in range(10):
        for step in (STEPS * epoch, STEPS * epoch + STEPS - 1):
            assert schedule.at(step, STEPS, settings) == pytest.approx(
                (optimizer.param_groups[0]["lr"], 0.9), rel=1e-9
            )
        optimizer.step()
        reference.step()


def test_warm_up_and_cosine_meet_at_the_peak() -> None:
    settings = config.Optim(
        schedule="warmup-cosine",
        epochs=20,
        lr=1e-4,
        warmup_epochs=5,
        lr_start=1e-6,
        lr_end=1e-5,
        momentum=0.9,
    )
    rates, momenta = zip(
        *(schedule.at(step, STEPS, settings) for step in range(20 * STEPS)), strict=True
    )
    assert set(momenta) == {0.9}
    assert rates[0] == 1e-6
    assert rates[5 * STEPS] == pytest.approx(1e-4, rel=1e-12)
    assert max(rates) == rates[5 * STEPS]
    assert rates[STEPS] == pytest.approx(1e-6 + 0.2 * (1e-4 - 1e-6))
    assert list(rates[: 5 * STEPS]) == sorted(rates[: 5 * STEPS])
    assert list(rates[5 * STEPS :]) == sorted(rates[5 * STEPS :], reverse=True)
    assert rates[5 * STEPS + 105 // 3] == pytest.approx(1e-5 + 0.75 * 9e-5), "cos(pi/3) = 1/2"
    assert 1e-5 < rates[-1] < 1.01 * 1e-5 + 1e-7
    without = config.Optim(schedule="warmup-cosine", epochs=20, lr=1e-4, warmup_epochs=0)
    assert schedule.at(0, STEPS, without)[0] == pytest.approx(1e-4)
