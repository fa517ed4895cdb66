"""The number of teacher replicas: a pure function of what was observed, shared by the pool and the
simulator.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dra_ray.errors import ConfigError


@dataclass(frozen=True)
class Observation:
    """The pool as the policy sees it: means over the look-back period, except the two counts of
    replicas, which are current.

    Any unit of work may stand for an image, if it does so in all four fields that count images or
    requests.
    """

    running: int
    starting: int = 0  # ordered, but not answering yet
    busy_s: Sequence[float] = ()  # per running replica: seconds of the look-back period at work
    waiting: float = 0.0  # requests that no replica has taken up
    in_flight: float = 0.0  # requests that a replica works on
    images_per_request: float = 1.0
    arriving_images_per_s: float = 0.0  # 0 where nobody counts arrivals
    service_s_per_image: float = 0.0  # 0 where nothing has been measured


class Report(Protocol):
    """One value of a metric, as a replica reported it."""

    @property
    def value(self) -> float: ...


class ServeContext(Protocol):
    """What this policy reads of Ray Serve's `AutoscalingContext`: metrics are name -> replica ->
    value, of the look-back period (aggregated) and as they came (raw).
    """

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...
    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Report]]] | None: ...
    @property
    def current_num_replicas(self) -> int: ...
    @property
    def target_num_replicas(self) -> int: ...
    @property
    def total_queued_requests(self) -> float | None: ...
    @property
    def total_num_requests(self) -> float | None: ...
    @property
    def current_time(self) -> float: ...


@dataclass
class DemandPolicy:
    """Follows the measured work, in one jump, with a dead band and a delay in each direction.

    The need, in replicas, is the larger of two sizes: the one that keeps replicas busy for
    `target_utilisation` of the time, and the one that does the arriving work and clears the backlog
    within `backlog_s` of running.

    - The target rises to the least need of the last `upscale_delay_s`; from 0 to 1 without delay.
    - It falls to the largest need of the last `downscale_delay_s`, if a pool with one replica less
      would have had `1 - SLACK` of its size to spare; to 0 only if there was no work at all.
    - It is a size and not a change, so replicas that are starting are not ordered again. Lost ones
      do not lower it: Serve, which keeps the pool at its target, replaces them at once. If none is
      back after the delay, the backlog alone sets the need.

    Clients send a bounded number of requests ahead of a step, so the backlog is what they request
    per step: `backlog_s` is best about as long as a step. A shorter one orders more than will be
    needed, a longer one less, in several goes.
    """

    min_replicas: int = 1
    max_replicas: int = 2
    target_utilisation: float = 0.7
    look_back_period_s: float = 6.0
    upscale_delay_s: float = 1.0
    downscale_delay_s: float = 8.0
    backlog_s: float = 4.0

    target: int = field(init=False)  # replicas aimed at
    # last measured time per image: it outlives a pool of size 0, which has nobody to measure it
    _service_s: float = field(init=False, default=0.0)
    _none_starting_s: float = field(init=False, default=math.inf)  # when no replica was starting
    _needs: deque[tuple[float, float]] = field(init=False, default_factory=deque)  # (when, need)

    # The dead band: noise of 8 % in the demand does not make the size flap (tests/pool).
    SLACK = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} is not in [0, "
                f"max_replicas={self.max_replicas}]; change one of them"
            )
        if not (
            0 < self.target_utilisation <= 1 and self.look_back_period_s > 0 and self.backlog_s > 0
        ):
            values = f"{self.target_utilisation:g}, {self.look_back_period_s:g}, {self.backlog_s:g}"
            raise ConfigError(
                f"target_utilisation, look_back_period_s, backlog_s = {values}; set the first in "
                "(0, 1], the others above 0"
            )
        self.target = self.min_replicas

    def decide(self, now_s: float, seen: Observation) -> int:
        """The number of replicas to aim at from now on. `now_s` must not fall from call to call."""
        if not self._needs:
            # The past is unknown, as after a restart of Serve's controller: assume that the pool
            # needed the size it has, so that nothing shrinks before the delay is over.
            self._needs.append((now_s, float(self.target)))
        need = self._need(now_s, seen)
        self._needs.append((now_s, need))
        longest_s = max(self.upscale_delay_s, self.downscale_delay_s)
        while self._needs[0][0] < now_s - longest_s - _TOLERANCE_S:
            self._needs.popleft()
        if _ceil(need) > self.target:
            # The least need of the delay: a spike that is over before it orders nothing. The first
            # replica does not wait, because without it every request does.
            lasting = min(self._needs_of_last(now_s, self.upscale_delay_s))
            self.target = max(_ceil(lasting), self.target, 1)
        elif self._spare(need) and self._spare(
            highest := max(self._needs_of_last(now_s, self.downscale_delay_s))
        ):
            # The largest need of the delay: a pause between epochs or rungs costs no replica, which
            # would take minutes to come back.
            self.target = _ceil(highest)
        self.target = min(self.max_replicas, max(self.min_replicas, self.target))
        return self.target

    def _spare(self, need: float) -> bool:
        """Whether a pool with one replica less could do it, and easily."""
        return need <= self.SLACK * (self.target - 1)

    def _need(self, now_s: float, seen: Observation) -> float:
        """Replicas needed now; above 0 whenever there is a request."""
        self._service_s = seen.service_s_per_image or self._service_s
        self._none_starting_s = min(self._none_starting_s, now_s) if seen.starting else now_s
        # Busy time alone cannot exceed the replicas that run, and arrivals alone miss the requests
        # that nobody counts; both are in replicas.
        arriving = seen.arriving_images_per_s * self._service_s
        work = max(arriving, sum(seen.busy_s) / self.look_back_period_s)
        # What piled up since replicas were ordered is no reason to order more: they were ordered
        # for the work that arrives. Nodes take minutes, in which the backlog only grows.
        piled_s = (
            max(0.0, arriving - seen.running) * (now_s - self._none_starting_s)
            if seen.starting
            else 0.0
        )
        backlog_s = max(0.0, seen.waiting * seen.images_per_request * self._service_s - piled_s)
        return max(
            work / self.target_utilisation,
            work + backlog_s / self.backlog_s,
            # before anything has been measured, a request alone must show
            _ANY if seen.waiting + seen.in_flight > 0 else 0.0,
        )

    def _needs_of_last(self, now_s: float, delay_s: float) -> list[float]:
        return [
            need
            for _, need in itertools.takewhile(
                lambda row: row[0] >= now_s - delay_s - _TOLERANCE_S, reversed(self._needs)
            )
        ]

    def __call__(self, ctx: ServeContext) -> tuple[int, dict[str, float]]:
        """Ray Serve's calling convention: its context in, (replicas, state) out.

        Serve counts requests and no arrivals, so a request stands for an image here. Serve's own
        delays must be 0, or each change would wait twice. Most requests wait inside the replicas,
        which report how many are different; the others still wait at their senders.
        """
        reported, series = ctx.aggregated_metrics or {}, (ctx.raw_metrics or {}).get("waiting", {})
        # The last report of each: a mean over the look-back period would see a new load too late.
        inside = (
            [reports[-1].value for reports in series.values() if reports]
            if series
            else reported.get("waiting", {}).values()
        )
        shares = list(reported.get("busy", {}).values())
        times_s = [time_s for time_s in reported.get("service_s", {}).values() if time_s > 0]
        self.target = ctx.target_num_replicas  # Serve may have moved it: 0 to 1 is its own doing
        seen = Observation(
            running=ctx.current_num_replicas,
            starting=max(0, ctx.target_num_replicas - ctx.current_num_replicas),
            busy_s=[share * self.look_back_period_s for share in shares],
            waiting=float(ctx.total_queued_requests or 0.0) + sum(inside),
            in_flight=min(float(ctx.total_num_requests or 0.0), sum(shares)),
            service_s_per_image=sum(times_s) / len(times_s) if times_s else 0.0,
        )
        return self.decide(ctx.current_time, seen), {}


_ANY = 1e-6  # replicas that the smallest demand needs
_TOLERANCE_S = 1e-6  # of sums of ticks


def _ceil(replicas: float) -> int:
    return math.ceil(replicas - 1e-9)  # 2.1 / 0.7 is 3
