"""The parts of a step add up to it, and nobody waits for a moment that has not passed."""

from __future__ import annotations

import dataclasses

import torch

from dra_ray.teachers.source import Pending, Ready, Request
from dra_ray.training.clock import Clock, Mark


@dataclasses.dataclass
class Moment:
    """By a clock that a test moves."""

    at: float
    device: Device

    def passed(self) -> bool:
        return self.at <= self.device.reached

    def seconds_to(self, later: Mark) -> float:
        assert isinstance(later, Moment)
        assert later.passed(), "it would have to be waited for"
        return later.at - self.at


@dataclasses.dataclass
class Device:
    now: float = 0.0  # of what was sent to it last
    reached: float = 1e9  # how far it has got

    def mark(self) -> Moment:
        return Moment(self.now, self)


class Source:
    feature_dim = 4

    def __init__(self, device: Device) -> None:
        self.device, self.closed = device, 0

    def submit(self, request: Request) -> Pending:
        self.device.now += 2
        return Ready(torch.ones(1, 4))

    def close(self) -> None:
        self.closed += 1


def request() -> Request:
    return Request.seeded(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1), 0)


def a_step(clock: Clock, device: Device) -> None:
    (source,) = clock.sources([Source(device)])

    def get(number: int) -> int:
        device.now += 1
        return number

    with clock.part("step"):
        assert clock.timed("data_wait", get)(7) == 7
        pending = source.submit(request())
        with clock.part("attack"):
            device.now += 10
        assert pending.result().shape == (1, 4)
        device.now += 4


def test_parts_and_rest_are_the_step() -> None:
    device = Device()
    clock = Clock("cpu", device.mark)
    a_step(clock, device)
    once = {"attack": 10.0, "teacher_wait": 2.0, "data_wait": 1.0, "rest": 4.0}
    assert clock.split() == once
    assert clock.split() == {}
    a_step(clock, device)
    a_step(clock, device)
    assert clock.split() == {part: 2 * seconds for part, seconds in once.items()}


def test_a_step_that_the_device_has_not_passed_comes_later() -> None:
    device = Device(reached=12.5)
    clock = Clock("cpu", device.mark)
    a_step(clock, device)
    assert clock.split() == {}
    device.reached = 17
    a_step(clock, device)
    assert sum(clock.split().values()) == 17
    device.reached = 34
    assert sum(clock.split().values()) == 17


def test_time_between_steps_is_nobodys() -> None:
    device = Device()
    clock = Clock("cpu", device.mark)
    a_step(clock, device)
    device.now += 1000  # a validation
    a_step(clock, device)
    assert sum(clock.split().values()) == 34


def test_terms_of_one_teacher_still_share_a_source() -> None:
    device = Device()
    one, other = Source(device), Source(device)
    first, second, third = Clock("cpu", device.mark).sources([one, other, one])
    assert first is third
    assert first is not second
    assert first.feature_dim == 4
    first.close()
    assert (one.closed, other.closed) == (1, 0)


def test_on_a_cpu_the_hosts_clock_counts() -> None:
    clock = Clock("cpu")
    with clock.part("step"), clock.part("attack"):
        pass
    parts = clock.split()
    assert parts.keys() == {"attack", "rest"}
    assert all(0 <= seconds < 60 for seconds in parts.values())
