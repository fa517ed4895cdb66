"""What a scaling policy would cost and how long training would wait: the pool as a discrete-event
simulation, without Ray.

It runs the policy class of the pool itself, Ray Serve's default algorithm, and pools of a fixed
size, on one workload. Simulated are trials, steps, requests, replicas, nodes and spot losses; the
network and the teacher's batching are not.
"""

from __future__ import annotations

import copy
import heapq
import html as html_text
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dra_ray.errors import ConfigError
from dra_ray.pool.policy import DemandPolicy, Observation
from dra_ray.pool.records import LogRow
from dra_ray.report import html, plots, words
from dra_ray.storage import Store


@dataclass(frozen=True)
class Workload:
    """A day of sweeps on one cluster, with the teacher on spot nodes.

    The default is a working day of WRN-28-10 with TRADES-10 on CIFAR-10: a training step costs 283
    GFLOP per image and its teacher 14, so a teacher GPU feeds 20 student GPUs. Rungs are those of
    ASHA with this package's defaults.
    """

    gpus: int = 64  # student GPUs; a trial trains on one
    sweeps_at_h: tuple[float, ...] = (
        9.0,
        11.0,
        14.0,
        16.0,
    )  # when all trials of a sweep arrive at once: a guess of a working day
    trials: int = 200  # per sweep
    reduction: int = 3  # ASHA keeps one in so many at each rung
    rung_epochs: tuple[int, ...] = (2, 6, 18, 54)
    images_per_epoch: int = 50_000
    batch: int = 1024
    student_gflop_per_image: float = 283.0
    teacher_gflop_per_image: float = 14.0
    tflops: float = 70.0  # sustained, of either GPU: a guess; only the length of a step hangs on it
    attack_share: float = (
        23 / 27
    )  # of a step, in forward passes: what comes before the feature is needed
    inflight: int = 1  # requests sent ahead: 1 is the step's own, sent as it begins
    jitter: float = 0.05  # steps and requests are up to this part longer or shorter
    trial_start_s: float = (
        15.0  # from a free GPU to the first step; Ray Train took 12 to 19 s on two CPU cores
    )
    node_start_s: float = (
        240.0  # from the order to a node that runs Ray: a guess for a GPU node of a cloud
    )
    load_s: float = 20.0  # from the node to a teacher that answers: a guess
    node_idle_s: float = 120.0  # how long an empty node stays, and is paid for (cluster.yaml)
    losses_per_replica_hour: float = 0.05  # spot losses: a guess
    retry_s: float = 0.05  # from the loss of a replica to its request being sent again
    hours: float = 24.0  # replicas are paid for until then, or until the last trial ends
    tick_s: float = 1.0  # between two decisions
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gpus", "trials", "batch", "inflight", "tick_s", "tflops", "hours"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"workload.{name}={getattr(self, name)} is not above 0; raise it")
        if (
            self.reduction < 2
            or list(self.rung_epochs) != sorted(set(self.rung_epochs))
            or not self.rung_epochs
        ):
            raise ConfigError(
                f"workload.reduction={self.reduction}, rung_epochs={self.rung_epochs}; keep one in "
                "2 or more, and let the rungs rise"
            )

    @property
    def step_s(self) -> float:
        """Length of a training step that waits for nothing."""
        return self.batch * self.student_gflop_per_image / self.tflops / 1000

    @property
    def service_s(self) -> float:
        """Time a replica works on a step's request."""
        return self.batch * self.teacher_gflop_per_image / self.tflops / 1000

    def trial_steps(self, draws: random.Random) -> list[int]:
        """Steps of each trial of a sweep, in the order in which they start: most stop at the first
        rung.
        """
        survivors = [
            self.trials // self.reduction**rung for rung in range(1, len(self.rung_epochs))
        ]
        epochs = [
            self.rung_epochs[sum(rank < limit for limit in survivors)]
            for rank in range(self.trials)
        ]
        draws.shuffle(epochs)
        return [max(1, count * self.images_per_epoch // self.batch) for count in epochs]


# -- policies --------------------------------------------------------------------------------------
class Policy(Protocol):
    """What `DemandPolicy` is to the simulator."""

    target: int
    look_back_period_s: float

    def decide(self, now_s: float, seen: Observation) -> int: ...


@dataclass
class Fixed:
    """Always so many; lost ones are replaced."""

    target: int
    look_back_period_s: float = 1.0

    def decide(self, now_s: float, seen: Observation) -> int:
        return self.target


@dataclass
class FixedWhileUsed:
    """So many from the first request until none came for `idle_s`: a pool that somebody brings up
    and takes down.
    """

    replicas: int
    idle_s: float = 60.0
    look_back_period_s: float = 1.0
    target: int = field(init=False, default=0)
    _used_s: float = field(init=False, default=0.0)

    def decide(self, now_s: float, seen: Observation) -> int:
        if seen.waiting + seen.in_flight + seen.arriving_images_per_s > 0:
            self._used_s, self.target = now_s, self.replicas
        elif now_s - self._used_s >= self.idle_s:
            self.target = 0
        return self.target


@dataclass
class ServeDefault:
    """Ray Serve's default policy with its default knobs, as of Ray 2.60
    (ray/serve/autoscaling_policy.py).

    The size is ceil(ongoing requests / target_ongoing_requests), applied once it has been above (or
    below) the target for the delay without a break. With no replica running, one is ordered at
    once, and no more until it runs.
    """

    min_replicas: int = 1
    max_replicas: int = 2
    target_ongoing_requests: float = 2.0
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    target: int = field(init=False)
    _wish: tuple[int, float] = field(init=False, default=(0, 0.0))  # (direction, since when)

    def __post_init__(self) -> None:
        self.target = self.min_replicas

    def decide(self, now_s: float, seen: Observation) -> int:
        ongoing = seen.waiting + seen.in_flight
        if not seen.running and ongoing > 0:
            self.target = max(1, self.target)
        elif seen.running:
            self._apply(now_s, math.ceil(ongoing / self.target_ongoing_requests))
        self.target = min(self.max_replicas, max(self.min_replicas, self.target))
        return self.target

    def _apply(self, now_s: float, size: int) -> None:
        direction = (size > self.target) - (size < self.target)
        if direction != self._wish[0]:
            self._wish = (direction, now_s)
        delay_s = self.upscale_delay_s if direction > 0 else self.downscale_delay_s
        if direction and now_s - self._wish[1] >= delay_s - 1e-6:
            # zero is reached from one only
            self.target, self._wish = (
                size if direction > 0 or self.target == 1 else max(1, size),
                (0, now_s),
            )


@dataclass
class InServe:
    """A policy as Ray Serve runs it: not called while no replica runs, when Serve orders one and no
    more.
    """

    policy: DemandPolicy
    look_back_period_s: float = field(init=False)
    target: int = field(init=False)

    def __post_init__(self) -> None:
        self.look_back_period_s, self.target = self.policy.look_back_period_s, self.policy.target

    def decide(self, now_s: float, seen: Observation) -> int:
        if not seen.running and seen.waiting + seen.in_flight > 0:
            self.target = max(1, self.target)
        else:
            self.policy.target = self.target
            self.target = self.policy.decide(now_s, seen)
        return self.target


# -- the simulation --------------------------------------------------------------------------------
class _Trial:
    __slots__ = ("began_s", "early", "random", "scale", "sent", "step", "steps")

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.random = steps, random.Random(seed)
        self.step = self.sent = 0
        self.early: set[int] = set()  # steps whose feature came before they began
        self.began_s, self.scale = 0.0, 1.0


class _Replica:
    __slots__ = ("begun_s", "busy_s", "leaving", "node", "request", "running", "samples")

    def __init__(self, node: tuple[float, float], samples: int) -> None:
        self.node = node  # (when it was ordered, when it is up)
        self.running = self.leaving = False
        self.request: tuple[_Trial, int] | None = None
        self.begun_s = self.busy_s = 0.0
        self.samples = deque([0.0], maxlen=samples)  # busy_s at the last ticks


@dataclass(frozen=True)
class Row:
    """A row of the table: what a policy costs on a workload."""

    policy: str
    replica_hours: float  # paid
    mean_wait_s: float  # of a step
    p95_wait_s: float
    wait_share: float  # of a trial's time
    waited_gpu_hours: float  # of students
    gpu_hours: float  # of teachers, and of students that waited for them
    busy_share: float  # of the paid time
    most_running: int
    replicas_ordered: int
    requests: int
    retries: int
    lost_work_s: float
    finished_h: float
    fixed_hours: float | None = None  # paid for a fixed pool that waits as long; elastic pools only
    of_fixed: float | None = None  # part of it that this one pays

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """One policy on one workload: a row of the table, and rows like those of a pool's log."""

    row: Row
    history: list[LogRow]

    @property
    def name(self) -> str:
        return self.row.policy

    @property
    def elastic(self) -> bool:
        return self.row.of_fixed is not None


class _Simulation:
    """One run. Events are (time, number, function, arguments) in a heap; decisions fall between
    them, every tick.
    """

    EVERY_S = 300.0  # a row of the history at least so often
    FIXED_S = 60.0  # between two decisions of a pool that has none to take

    def __init__(self, workload: Workload, policy: Policy) -> None:
        self.workload, self.policy, self.now = workload, policy, 0.0
        self.step_s, self.service_s = workload.step_s, workload.service_s
        self.tick_s = self.FIXED_S if isinstance(policy, Fixed) else workload.tick_s
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.numbers = itertools.count()
        self.random = random.Random(workload.seed)
        self.free_gpus, self.queued_trials, self.training = workload.gpus, deque[_Trial](), 0
        self.unfinished = len(workload.sweeps_at_h) * workload.trials
        self.queue: deque[tuple[_Trial, int]] = deque()
        self.replicas: list[_Replica] = []
        self.idle: list[_Replica] = []
        self.empty: list[tuple[tuple[float, float], int]] = []  # (node without a replica, number)
        self.waits_s: list[float] = []
        self.arrived = self.retries = self.ordered = 0
        self.lost_s = self.paid_s = self.busy_s = self.finished_s = 0.0
        self.history: list[LogRow] = []
        self.samples = max(1, round(policy.look_back_period_s / self.tick_s))
        self.seen_load: deque[tuple[int, int]] = deque(
            maxlen=self.samples
        )  # (waiting, in flight) at the last ticks
        self.seen_arrived = deque([0], maxlen=self.samples + 1)
        for sweep, at_h in enumerate(workload.sweeps_at_h):
            self.at(3600 * at_h, self.sweep, sweep)
        for _ in range(policy.target):  # these were there before
            self.replicas.append(_Replica((0.0, 0.0), self.samples + 1))
            self.ready(self.replicas[-1])

    def at(self, time_s: float, function: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), function, arguments))

    def run(self) -> None:
        events, tick_s, tick = self.events, self.tick_s, 0
        while self.now < 3600 * self.workload.hours or self.unfinished:
            if events and events[0][0] <= tick * tick_s:
                self.now, _, function, arguments = heapq.heappop(events)
                function(*arguments)
            else:
                self.now = tick * tick_s
                self.tick()
                tick += 1
        for node in [replica.node for replica in self.replicas] + [node for node, _ in self.empty]:
            self.pay(node)

    # trials
    def sweep(self, number: int) -> None:
        seed = self.workload.seed + 1000 * number
        steps = self.workload.trial_steps(random.Random(seed))
        self.queued_trials += [
            _Trial(count, 1000 * seed + index) for index, count in enumerate(steps)
        ]
        self.fill_gpus()

    def fill_gpus(self) -> None:
        while self.free_gpus and self.queued_trials:
            self.free_gpus -= 1
            trial = self.queued_trials.popleft()
            self.at(
                self.now + self.workload.trial_start_s * trial.random.uniform(0.8, 1.25),
                self.start,
                trial,
            )

    def start(self, trial: _Trial) -> None:
        self.training += 1
        self.begin(trial)

    def begin(self, trial: _Trial) -> None:
        """A step begins: send requests, then attack."""
        trial.began_s = self.now
        trial.scale = 1 + self.workload.jitter * (2 * trial.random.random() - 1)
        last = min(trial.steps, trial.step + self.workload.inflight)
        while trial.sent < last:
            self.send((trial, trial.sent))
            trial.sent += 1
        if trial.step in trial.early:
            trial.early.remove(trial.step)
            self.go_on(trial)

    def answer(self, trial: _Trial, step: int) -> None:
        if step == trial.step:
            self.go_on(trial)
        else:
            assert step > trial.step, "answered twice"
            assert step not in trial.early, "answered twice"
            trial.early.add(step)

    def go_on(self, trial: _Trial) -> None:
        """The feature of the current step is there; the step waited if its attack is over."""
        step_s = self.step_s * trial.scale
        needed_s = trial.began_s + step_s * self.workload.attack_share
        wait_s = max(0.0, self.now - needed_s)
        self.waits_s.append(wait_s)
        self.at(trial.began_s + step_s + wait_s, self.end, trial)

    def end(self, trial: _Trial) -> None:
        trial.step += 1
        if trial.step < trial.steps:
            self.begin(trial)
            return
        self.training -= 1
        self.unfinished -= 1
        self.free_gpus += 1
        self.finished_s = self.now
        self.fill_gpus()

    # requests
    def send(self, request: tuple[_Trial, int]) -> None:
        self.arrived += 1
        if self.idle:
            self.serve(self.idle.pop(), request)
        else:
            self.queue.append(request)

    def serve(self, replica: _Replica, request: tuple[_Trial, int]) -> None:
        replica.request, replica.begun_s = request, self.now
        service_s = self.service_s * (1 + self.workload.jitter * (2 * self.random.random() - 1))
        self.at(self.now + service_s, self.done, replica, request)

    def done(self, replica: _Replica, request: tuple[_Trial, int]) -> None:
        if replica.request is not request:
            return  # it was lost before
        replica.busy_s += self.now - replica.begun_s
        self.busy_s += self.now - replica.begun_s
        replica.request = None
        if replica.leaving:
            self.leave(replica)
        elif self.queue:
            self.serve(replica, self.queue.popleft())
        else:
            self.idle.append(replica)
        self.answer(*request)

    # replicas
    def order(self) -> None:
        """A replica more, on an empty node where there is one."""
        node = (
            self.empty.pop()[0] if self.empty else (self.now, self.now + self.workload.node_start_s)
        )
        replica = _Replica(node, self.samples + 1)
        self.replicas.append(replica)
        self.ordered += 1
        self.at(max(self.now, node[1]) + self.workload.load_s, self.ready, replica)

    def ready(self, replica: _Replica) -> None:
        if replica.leaving:
            return
        replica.running = True
        if self.workload.losses_per_replica_hour:
            self.at(
                self.now + 3600 * self.random.expovariate(self.workload.losses_per_replica_hour),
                self.lose,
                replica,
            )
        if self.queue:
            self.serve(replica, self.queue.popleft())
        else:
            self.idle.append(replica)

    def lose(self, replica: _Replica) -> None:
        """The node is gone, with the replica and its request, which its client sends again."""
        if replica not in self.replicas:
            return
        if replica.request:
            self.lost_s += self.now - replica.begun_s
            self.retries += 1
            self.at(self.now + self.workload.retry_s, self.send, replica.request)
            replica.request = None
        elif replica in self.idle:
            self.idle.remove(replica)
        self.replicas.remove(replica)
        self.pay(replica.node)
        self.resize(self.policy.target)

    def resize(self, target: int) -> None:
        """What Ray Serve does: order what is missing; take those that start first, then idle ones,
        then busy ones, which finish.
        """
        staying = [replica for replica in self.replicas if not replica.leaving]
        if len(staying) == target:
            return
        for _ in range(target - len(staying)):
            self.order()
        staying.sort(key=lambda replica: (replica.running, replica.request is not None))
        for replica in staying[: max(0, len(staying) - target)]:
            replica.leaving = True
            if not replica.request:
                self.leave(replica)

    def leave(self, replica: _Replica) -> None:
        if replica in self.idle:
            self.idle.remove(replica)
        self.replicas.remove(replica)
        entry = (replica.node, next(self.numbers))
        self.empty.append(entry)
        self.at(max(self.now, replica.node[1]) + self.workload.node_idle_s, self.release, entry)

    def release(self, entry: tuple[tuple[float, float], int]) -> None:
        if entry in self.empty:
            self.empty.remove(entry)
            self.pay(entry[0])

    def pay(self, node: tuple[float, float]) -> None:
        self.paid_s += self.now - node[0]

    # decisions
    def tick(self) -> None:
        target = self.policy.decide(self.now, self.observe())
        self.resize(target)
        running = sum(replica.running for replica in self.replicas)
        last = self.history[-1] if self.history else None
        if (
            last is None
            or self.now - last.at >= self.EVERY_S
            or (running, target) != (last.running, last.target)
        ):
            demand = self.training * self.service_s / self.step_s
            self.history.append(
                LogRow(at=self.now, running=running, target=target, demand=round(demand, 3))
            )

    def observe(self) -> Observation:
        """What Serve's metrics would show: means over the policy's look-back period, sampled at
        every tick.
        """
        running = [replica for replica in self.replicas if replica.running and not replica.leaving]
        busy_s = []
        for replica in running:
            replica.samples.append(
                replica.busy_s + (self.now - replica.begun_s if replica.request else 0.0)
            )
            busy_s.append(replica.samples[-1] - replica.samples[0])
        self.seen_load.append(
            (len(self.queue), sum(replica.request is not None for replica in self.replicas))
        )
        self.seen_arrived.append(self.arrived)
        return Observation(
            running=len(running),
            starting=sum(not replica.running for replica in self.replicas),
            busy_s=busy_s,
            waiting=sum(waiting for waiting, _ in self.seen_load) / len(self.seen_load),
            in_flight=sum(in_flight for _, in_flight in self.seen_load) / len(self.seen_load),
            images_per_request=self.workload.batch,
            arriving_images_per_s=self.workload.batch
            * (self.arrived - self.seen_arrived[0])
            / (self.samples * self.tick_s),
            service_s_per_image=self.service_s
            / self.workload.batch,  # as measured on the day before
        )

    def row(self, name: str) -> Row:
        waits_s = sorted(self.waits_s) or [0.0]
        waited_s = sum(waits_s)
        trained_s = len(self.waits_s) * self.step_s
        return Row(
            policy=name,
            replica_hours=round(self.paid_s / 3600, 3),
            mean_wait_s=round(waited_s / len(waits_s), 5),
            p95_wait_s=round(waits_s[int(0.95 * (len(waits_s) - 1))], 4),
            wait_share=round(waited_s / (waited_s + trained_s or 1.0), 5),
            waited_gpu_hours=round(waited_s / 3600, 3),
            gpu_hours=round((self.paid_s + waited_s) / 3600, 3),
            busy_share=round(self.busy_s / (self.paid_s or 1.0), 4),
            most_running=max(row.running for row in self.history),
            replicas_ordered=self.ordered,
            requests=len(self.waits_s),
            retries=self.retries,
            lost_work_s=round(self.lost_s, 2),
            finished_h=round(self.finished_s / 3600, 3),
        )


# -- comparisons -----------------------------------------------------------------------------------
def suited(workload: Workload, min_replicas: int = 0) -> DemandPolicy:
    """The policy with knobs that follow from the workload by rule, none of them tuned.

    A replica is kept as long as a new one would take to start, since it costs about as much to be
    without it as to have one too many; what waits is cleared within a step; there may be twice as
    many as all GPUs need together.
    """
    return DemandPolicy(
        min_replicas=min_replicas,
        max_replicas=2 * _peak(workload),
        downscale_delay_s=workload.node_start_s + workload.load_s,
        backlog_s=workload.step_s,
    )


def _peak(workload: Workload) -> int:
    """Replicas that just keep up with every GPU."""
    return math.ceil(workload.gpus * workload.service_s / workload.step_s)


def play(workload: Workload, name: str, policy: Policy) -> Outcome:
    """Simulate one policy; equal arguments give equal outcomes. The policy itself is left as it
    was.
    """
    simulation = _Simulation(workload, copy.deepcopy(policy))
    simulation.run()
    return Outcome(simulation.row(name), simulation.history)


def run(workload: Workload, policies: Mapping[str, Policy]) -> list[Row]:
    """A row per policy."""
    return [play(workload, name, policy).row for name, policy in policies.items()]


def compare(workload: Workload, policy: DemandPolicy) -> list[Outcome]:
    """This policy, alone and inside Ray Serve, Serve's default, and fixed pools of several sizes.

    Rows of elastic pools say what a fixed pool that waits as long would cost (`fixed_hours`), and
    their own part of it (`of_fixed`). Sizes are whole, so that cost lies on the line between the
    two sizes that wait longer and shorter.
    """
    bounds = {"min_replicas": policy.min_replicas, "max_replicas": policy.max_replicas}
    peak = _peak(workload)
    elastic = [
        play(workload, "demand", policy),
        play(workload, "demand, inside Serve", InServe(copy.deepcopy(policy))),
        play(workload, "Serve's default", ServeDefault(**bounds)),
        play(workload, f"fixed {peak} while used", FixedWhileUsed(peak)),
    ]
    fixed = {
        size: play(workload, f"fixed {size}", Fixed(size))
        for size in range(max(1, peak - 2), peak + 2)
    }
    compared = []
    for outcome in elastic:
        hours = _fixed_hours(workload, outcome.row.mean_wait_s, fixed)
        part = round(outcome.row.replica_hours / hours, 4)
        row = replace(outcome.row, fixed_hours=round(hours, 3), of_fixed=part)
        compared.append(replace(outcome, row=row))
    return compared + [fixed[size] for size in sorted(fixed)]


def _fixed_hours(workload: Workload, wait_s: float, known: dict[int, Outcome]) -> float:
    """Replica-hours of the fixed pool with this mean wait; sizes that had to be tried are added to
    `known`.
    """
    size = _peak(workload)
    while _fixed(workload, size, known).mean_wait_s > wait_s and size < workload.gpus:
        size += 1
    while size > 1 and _fixed(workload, size - 1, known).mean_wait_s <= wait_s:
        size -= 1
    enough = known[size].row
    if size == 1 or enough.mean_wait_s > wait_s:
        return enough.replica_hours
    short = known[size - 1].row
    part = (short.mean_wait_s - wait_s) / (short.mean_wait_s - enough.mean_wait_s)
    return short.replica_hours + part * (enough.replica_hours - short.replica_hours)


def _fixed(workload: Workload, size: int, known: dict[int, Outcome]) -> Row:
    if size not in known:
        known[size] = play(workload, f"fixed {size}", Fixed(size))
    return known[size].row


# -- a page ----------------------------------------------------------------------------------------
def plot(outcomes: Sequence[Outcome]) -> dict[str, plots.Figure]:
    """Title -> figure (plotly as plain data): what waiting costs, and each elastic pool over the
    day.
    """
    figures: dict[str, plots.Figure] = {COST: _cost(outcomes)}
    for outcome in outcomes:
        if outcome.elastic and (figure := plots.pool(outcome.history, "time of the day")):
            figures[f"Replicas over the day: {outcome.name}"] = figure
    return figures


COST = "Cost against waiting"
_SYMBOLS = ("circle", "diamond", "triangle-up", "x", "star", "cross")
_COLOURS = (plots.BLUE, plots.GREEN, plots.PURPLE, plots.GREY)


def _cost(outcomes: Sequence[Outcome]) -> plots.Figure:
    """Only fixed pools, which lie apart, are named beside their marks; elastic ones lie close
    together: the legend names them.
    """
    fixed = [outcome for outcome in outcomes if not outcome.elastic]
    elastic = [outcome for outcome in outcomes if outcome.elastic]
    traces = (
        [_marks(fixed, "fixed pools", plots.VERMILLION, "square") | {"mode": "lines+markers+text"}]
        if fixed
        else []
    )
    for place, outcome in enumerate(elastic):
        colour, symbol = _COLOURS[place % len(_COLOURS)], _SYMBOLS[place % len(_SYMBOLS)]
        traces.append(_marks([outcome], html_text.escape(outcome.name), colour, symbol))
    hours = [outcome.row.replica_hours for outcome in outcomes]
    waits = [outcome.row.mean_wait_s for outcome in outcomes]
    x = {"title": "replica-hours paid", "range": [0, 1.2 * max(hours, default=1) or 1]}
    y = {
        "title": "mean wait of a step (s)",
        "range": [-0.05 * max(waits, default=1), 1.15 * max(waits, default=1) or 1],
    }
    return {"data": traces, "layout": plots.frame(x, y)}


def _marks(outcomes: Sequence[Outcome], name: str, colour: str, symbol: str) -> plots.Figure:
    names = [html_text.escape(outcome.name) for outcome in outcomes]
    return {
        "x": [outcome.row.replica_hours for outcome in outcomes],
        "y": [outcome.row.mean_wait_s for outcome in outcomes],
        "text": names,
        "textposition": "top right",
        "cliponaxis": False,
        "mode": "markers",
        "name": name,
        "line": {"color": colour, "dash": "dot"},
        "marker": {"color": colour, "symbol": symbol, "size": 11},
        "hovertemplate": "%{text}: %{x:.1f} replica-hours, %{y:.3f} s<extra></extra>",
    }


# column of a row -> its heading on the page, for those that a reader needs first
_HEADINGS = {
    "policy": "policy",
    "replica_hours": "replica-hours",
    "of_fixed": "% of fixed",
    "mean_wait_s": "mean wait (s)",
    "p95_wait_s": "95 % wait below (s)",
    "wait_share": "waiting, % of time",
    "gpu_hours": "GPU-hours in all",
}


def write(page: Store, workload: Workload, outcomes: Sequence[Outcome]) -> None:
    """One self-contained HTML file: the table, the figures, the workload, and every number."""
    rows = [outcome.row.as_json() for outcome in outcomes]
    shown = [[_brief(row, column) for column in _HEADINGS] for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    whole = html.Table(
        [column.replace("_", " ") for column in columns],
        [[row.get(column) for column in columns] for row in rows],
        sortable=True,
    )
    settings = [
        [name.replace("_", " "), words.beside_name(value)] for name, value in vars(workload).items()
    ]
    figures = plot(outcomes)
    cost = html.plot(
        figures.pop(COST),
        COST,
        "Down and to the left is better. The dotted line joins fixed pools of several sizes.",
    )
    sections = [
        html.section(
            "policies",
            "Every policy",
            "",
            html.Table(list(_HEADINGS.values()), shown, sortable=True),
            html.caption(_ABOUT),
            cost,
        ),
        html.section(
            "days",
            "Over the day",
            "",
            html.grid(*(html.plot(figure, title) for title, figure in figures.items())),
        ),
        html.section(
            "workload",
            "The workload",
            "Sweeps start at the given hours and share one pool.",
            html.Table(["field", "value"], settings),
        ),
        html.section(
            "numbers", "All numbers", "", html.Details("Every column of every policy", [whole])
        ),
    ]
    headline = "What each policy would cost, and how long training would wait for its teacher."
    page.write_text(
        html.page(
            "Scaling policies of the teacher pool, simulated", "Simulation", headline, sections
        )
    )


def _brief(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if column in ("of_fixed", "wait_share"):
        return words.in_percent(value)
    return round(value, 3) if isinstance(value, float) else value


_ABOUT = (
    "A replica-hour is paid from the order of its node until the node is gone. Waiting is what a "
    "training step loses because its feature is not "
    "there when its attack ends. % of fixed: replica-hours as a share of what a fixed pool costs "
    "at which training waits as long. GPU-hours in all: "
    "of teachers, and of students that wait for them."
)
