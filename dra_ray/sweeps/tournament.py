"""The course of a sweep: which trial starts next, what each report decides, and what was spent.

Everything is written before it is acted on, a trial's point to `trials.jsonl` and its scores with
the decision to `rungs.jsonl`. So a driver that is killed at any time reads them, and goes on with
the same trials, the same rungs and the same suggestions. Whoever trains the trials, Ray Tune or a
simulation, calls `start`, `report` and `fail`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dra_ray import config, runs
from dra_ray.errors import LastingError
from dra_ray.runs import RungRow, TrialRow
from dra_ray.storage import Store
from dra_ray.sweeps import schedulers
from dra_ray.sweeps.orders import Order
from dra_ray.sweeps.search import Search, State, Told
from dra_ray.sweeps.spaces import Point, Space, repeat_name, trial_name

Fields = dict[str, Any]
# of trials: those that go on, at their rung or over, and ends
STATES = ("running", "queued", "waiting", "paused", "done", "stopped", "failed")


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a sweep has cost so far.

    Attributes:
        gpu_hours: hours times GPUs that were reserved, teachers' included.
        money: None where no prices are known.
    """

    trials: int
    images: int
    gpu_hours: float
    money: float | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """A validation of a trial, as it was reported."""

    epoch: int
    images_seen: int
    clean_accuracy: float
    robust_accuracy: float
    images: int | None = None
    verdicts: str | None = None
    weights: runs.Weights | None = None
    elapsed_s: float | None = None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Scores:
        """From a row of metrics.jsonl, or what Ray Tune makes of it."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in result.items() if key in known})


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What a tournament cannot know from the sweep.

    Attributes:
        images_per_epoch: of an experiment: steps of an epoch times batch.
        beside_hours: GPU-hours of teachers and late verdicts so far.
        money: of hours times devices, GPUs or, without any, CPUs; None where there are no prices.
        guard: called before anything is written; raises where another driver has the sweep.
        at: seconds since 1970.
    """

    images_per_epoch: Callable[[config.Experiment], int]
    at: Callable[[], float]
    beside_hours: Callable[[], float] = lambda: 0.0
    money: Callable[[float], float] | None = None
    guard: Callable[[], None] = lambda: None


class Tournament:
    """A sweep between its first trial and its finals."""

    def __init__(
        self,
        sweep: config.Sweep,
        folder: Store,
        around: Circumstances,
    ) -> None:
        self._around, self._folder = around, folder
        manifest = runs.read_manifest(folder)
        self._raised = manifest.raised_trials if manifest is not None else None
        self.sweep, self.space = sweep, Space(sweep)
        self.search = Search(sweep, raised=self._raised)
        self.on_row: Callable[[RungRow], None] = lambda row: None  # gets every new row
        self._trials = runs.Log(folder / runs.TRIAL_ROWS, TrialRow)
        self._rungs = runs.Log(folder / runs.RUNGS, RungRow)
        self.fields: dict[str, Fields] = {row.trial: dict(row.fields) for row in self._trials.rows}
        self._experiments: dict[str, config.Experiment] = {}
        self._end_images: dict[str, int] = {}  # where each trial ends by itself
        self._last: dict[str, RungRow] = {}  # with scores where the trial has any
        self._ended: dict[str, runs.End] = {}  # but for those that go on
        self._failures: dict[str, int] = {}
        self._images = 0  # over all trials
        self._gpu_s = self._device_s = 0.0
        self._started: set[str] = set()  # by this driver
        self._waiting: set[str] = set()  # for the other trials of their rung
        self.scheduler = schedulers.of(sweep, around.images_per_epoch(sweep.base))
        self._finals: set[str] = set()  # which nothing stops
        for row in self._rungs.rows:
            self._take(row)

    # -- trials ----------------------------------------------------------------------------------
    @property
    def rows(self) -> list[RungRow]:
        return self._rungs.rows

    def experiment(self, trial: str) -> config.Experiment:
        """What a trial trains, with its sources."""
        if trial not in self._experiments:
            fields = self.fields[trial]
            experiment = config.override(self.sweep.base, fields).with_sources()
            self._experiments[trial] = experiment
        return self._experiments[trial]

    def start(self) -> str | None:
        """The trial to start, or to go on with; None where none is left or the budget is spent."""
        if self.exhausted():
            return None
        for name in self.fields:
            if self._can_start(name):
                self._started.add(name)
                return name
        if (row := self._suggested()) is not None:
            self._enter(row)
            self._started.add(row.trial)
            return row.trial
        return self.start() if self._promote() else None

    def _can_start(self, trial: str) -> bool:
        return trial not in self._started | self._waiting | self._ended.keys()

    def _promote(self) -> bool:
        """Once every other trial is at its rung or over, let the best of those that wait go on and
        stop the rest, in one write: a driver that is killed has decided on all or on none.
        Returns whether any goes on.
        """
        on_their_way = self._started - self._ended.keys() - self._waiting
        if on_their_way or not self._waiting:
            return False
        chosen = self.scheduler.promoted(self._waiting)
        rows = [
            self._once_more(name, "continue", "among the best of its rung")
            if name in chosen
            else self._once_more(name, "stop", None)
            for name in sorted(self._waiting)
        ]
        self._started -= chosen
        self._append(*rows)
        return bool(chosen)

    def repeat(self, trial: str, number: int) -> str:
        """The trial that repeats a trial with training seed `number`, from 1; added if need be."""
        name = repeat_name(trial, number)
        if name not in self.fields:
            fields = self.fields[trial] | self.space.seeds(number)
            self._enter(TrialRow(trial=name, fields=fields, at=self._around.at()))
        return name

    def go_on_with(self, trials: Iterable[str]) -> None:
        """Let trials that were stopped train to their end: finals."""
        for name in trials:
            self._finals.add(name)
            if self._ended.get(name) == "stopped" and not self._is_stopped_by_hand(name):
                del self._ended[name]
            self._started.discard(name)

    def start_again(self, trial: str) -> None:
        """Let `start` give a trial that was lost once more."""
        self._started.discard(trial)

    def is_over(self, trial: str) -> bool:
        """Whether it has trained to its end, or never will."""
        return self._ended.get(trial) in ("done", "failed") or self._is_stopped_by_hand(trial)

    def complete(self) -> list[str]:
        """Trials of the search, not their repeats, that have trained to their end."""
        return [
            row.trial
            for row in self._trials.rows
            if row.number is not None and self._ended.get(row.trial) == "done"
        ]

    def _is_stopped_by_hand(self, trial: str) -> bool:
        """A scheduler gives no reason."""
        last = self._last.get(trial)
        return last is not None and last.decision == "stop" and last.reason is not None

    def last(self, trial: str) -> RungRow | None:
        """Its last scores, or how it failed without any; None before."""
        return self._last.get(trial)

    def state(self, trial: str) -> State:
        return self._ended.get(trial, "running")

    def by_state(self) -> dict[str, int]:
        """Trials by state, 0 included; also while another thread changes them."""
        states = dict.fromkeys(STATES, 0)
        started, waiting, ended = self._started.copy(), self._waiting.copy(), self._ended.copy()
        for trial in list(self.fields):
            last = self._last.get(trial)
            if trial in ended:
                states[ended[trial]] += 1
            elif trial in waiting:
                states["waiting"] += 1
            elif last is not None and last.decision == "paused":
                states["paused"] += 1
            else:
                states["running" if trial in started else "queued"] += 1
        return states

    def told(self) -> list[Told]:
        """What a sampler may know; repeats of a point are no trials of their own."""
        return [self._told(row) for row in self._trials.rows if row.number is not None]

    def _told(self, row: TrialRow) -> Told:
        last = self._last.get(row.trial)
        return Told(
            row.number or 0,
            self.space.point(row.fields),
            last.robust_accuracy if last else None,
            last.clean_accuracy if last else None,
            last.images_seen if last else 0,
            "stopped" if row.trial in self._waiting else self.state(row.trial),
            row.by_hand,
        )

    def _suggested(self) -> TrialRow | None:
        told = self.told()
        number = len(told)
        point = self.search.suggest(number, told)
        return None if point is None else self._trial(number, point)

    def _trial(self, number: int, point: Point) -> TrialRow:
        return TrialRow(
            trial=trial_name(number),
            number=number,
            fields=self.space.changes(point),
            known=len(self.rows),
            at=self._around.at(),
        )

    def _enter(self, row: TrialRow) -> None:
        self._around.guard()
        self._trials.append(row)
        self.fields[row.trial] = dict(row.fields)

    # -- reports ---------------------------------------------------------------------------------
    def report(self, trial: str, scores: Scores) -> schedulers.Decision:
        """Record a validation and what follows from it."""
        last = self._last.get(trial)
        if self._ended.get(trial) == "stopped" or trial in self._waiting:
            return "stop"  # by hand, since its last report; or it was cut off as it began to wait
        if last is not None and last.images_seen >= scores.images_seen:
            return "continue"  # repeated after a restart: the same score, already there
        experiment = self.experiment(trial)
        row = RungRow(
            trial=trial,
            epoch=scores.epoch,
            images_seen=scores.images_seen,
            clean_accuracy=scores.clean_accuracy,
            robust_accuracy=scores.robust_accuracy,
            images=scores.images,
            verdicts=scores.verdicts,
            elapsed_s=scores.elapsed_s,
            decision="continue",
            at=self._around.at(),
            **({"weights": scores.weights} if scores.weights else {}),
        )
        decision = self._decide(row)
        if scores.epoch >= experiment.optim.epochs:
            row = row.model_copy(update={"decision": "done"})
        elif decision == "stop":
            row = row.model_copy(update={"decision": "stop"})
        elif decision == "wait":
            row = row.model_copy(update={"decision": "waiting"})
        elif why := self._exhausted_by(row):
            row = row.model_copy(update={"decision": "paused", "reason": why})
        self._append(row)
        return "stop" if row.decision in ("stop", "paused", "waiting") else "continue"

    def fail(self, trial: str, reason: str, lasting: bool = True) -> bool:
        """Record that a trial failed; returns whether it is to be started again.

        A failure that would come again counts towards `max_failures`; any other is retried when
        the sweep is started again.
        """
        self._failures[trial] = self._failures.get(trial, 0) + 1
        if self._failures[trial] <= (self.sweep.max_failures or 0):
            return True
        if lasting:
            self._append(self._once_more(trial, "failed", reason))
        return False

    def stop(self, trial: str, reason: str) -> None:
        """End a trial by hand, with its last scores if it has any; it is no finalist either."""
        if trial not in self._ended:
            self._append(self._once_more(trial, "stop", reason))

    def rerun(self, trial: str) -> None:
        """Let a trial that failed or was stopped go on from its checkpoint; nothing for others."""
        if self._ended.get(trial) not in ("failed", "stopped"):
            return
        self._failures.pop(trial, None)
        self._append(self._once_more(trial, "continue", "started again by hand"))
        self._started.discard(trial)

    def _once_more(self, trial: str, decision: runs.Decision, reason: str | None) -> RungRow:
        """The trial's last scores, if it has any, with what became of it since."""
        last = self._last.get(trial) or RungRow(
            trial=trial,
            epoch=0,
            images_seen=0,
            clean_accuracy=None,
            robust_accuracy=None,
            decision=decision,
        )
        now = {"decision": decision, "reason": reason, "at": self._around.at()}
        return last.model_copy(update=now)

    def add(self, point: Point) -> str:
        """Add a point to the search; the name of its trial, which may be there already."""
        point = self.space.point(point)
        self.space.experiment(point)  # a value that is none is refused before anything is written
        told = self.told()
        for trial in told:
            if self.space.key(trial.point) == self.space.key(point):
                return trial_name(trial.number)
        row = self._trial(len(told), point).model_copy(update={"by_hand": True})
        self._enter(row)
        return row.trial

    def raise_to(self, trials: int) -> str:
        """Let the search have so many trials in all; what that means, in words."""
        self._raised = max(trials, self._raised or 0)
        self._around.guard()
        runs.update_manifest(self._folder, runs.Facts(raised_trials=self._raised))
        self.search.raise_to(self._raised)
        limit = self.sweep.budget.trials
        kept = f", but budget.trials={limit}" if limit is not None and limit < trials else ""
        return f"its search has {self._raised} trials{kept}"

    def obey(self, order: Order) -> str:
        """Do what somebody asked for; what was done, in words."""
        if order.what == "add" and order.trials:
            return self.raise_to(order.trials)
        if order.what == "add":
            return f"added as {self.add(order.point)}"
        if order.trial not in self.fields:
            return f"there is no trial '{order.trial}'"
        if order.what == "stop":
            self.stop(order.trial, "stopped by hand")
            return f"{order.trial} is {self.state(order.trial)}"
        self.rerun(order.trial)
        return f"{order.trial} starts again"

    def finals(self) -> dict[str, str]:
        """The best trial with alignment and the best without: of those that got furthest, the most
        robust at that rung.

        A trial that failed for good is none: its full budget cannot be reached. Nor is one that was
        stopped by hand, or a repeat.
        """
        named = {row.trial for row in self._trials.rows if row.number is not None}
        able = {
            name: row
            for name, row in self._last.items()
            if name in named and _is_scored(row) and not self._is_stopped_by_hand(name)
        }
        kinds = {
            "dra": [n for n in able if self.experiment(n).align.weight > 0],
            "baseline": [n for n in able if self.experiment(n).align.weight == 0],
        }
        return {
            kind: max(names, key=lambda n: (able[n].images_seen, able[n].robust_accuracy, n))
            for kind, names in kinds.items()
            if names
        }

    def require_a_trial(self) -> None:
        """Raise `LastingError` where every trial failed."""
        if self.fields and all(self._ended.get(name) == "failed" for name in self.fields):
            first = next(row for row in self.rows if row.decision == "failed")
            raise LastingError(
                f"all {len(self.fields)} trials failed, the first since {first.reason}"
            )

    # -- budget ----------------------------------------------------------------------------------
    def spent(self, row: RungRow | None = None) -> Spent:
        """What the sweep has cost, with a report that is not recorded yet."""
        images, gpu_s, device_s = self._more(row) if row is not None else (0, 0.0, 0.0)
        beside_h = self._around.beside_hours()
        device_h = (self._device_s + device_s) / 3600 + beside_h
        return Spent(
            trials=len(self.fields),
            images=self._images + images,
            gpu_hours=(self._gpu_s + gpu_s) / 3600 + beside_h,
            money=self._around.money(device_h) if self._around.money else None,
        )

    def _more(self, row: RungRow) -> tuple[int, float, float]:
        """Images, seconds times GPUs and seconds times devices since the trial's last report."""
        last = self._last.get(row.trial)
        images = row.images_seen - (last.images_seen if last else 0)
        seconds = (row.elapsed_s or 0.0) - ((last.elapsed_s or 0.0) if last else 0.0)
        resources = self.experiment(row.trial).resources
        gpus = resources.workers * resources.gpus_per_worker
        devices = gpus or resources.workers * resources.cpus_per_worker
        return images, max(seconds, 0.0) * gpus, max(seconds, 0.0) * devices

    def exhausted(self) -> str | None:
        """Which limit of the budget is reached, in words; None where there is room.

        The number of trials is no limit of those that have begun: `start` gives no further one.
        """
        return self._exhausted_by(None)

    def _exhausted_by(self, row: RungRow | None) -> str | None:
        budget = self.sweep.budget
        if budget.images is None and budget.gpu_hours is None and budget.money is None:
            return None
        spent = self.spent(row)
        for name, used, limit in (
            ("images", spent.images, budget.images),
            ("gpu_hours", spent.gpu_hours, budget.gpu_hours),
            ("money", spent.money, budget.money),
        ):
            if limit is not None and used is not None and used >= limit:
                return f"budget.{name}={limit:,} is spent ({used:,.6g})"
        return None

    # -- records ---------------------------------------------------------------------------------
    def _decide(self, row: RungRow) -> schedulers.Decision:
        """The scheduler's decision; every report is told to it once, in the order of the file."""
        if row.trial not in self._end_images:  # outlines the data, which may mean reading them
            experiment = self.experiment(row.trial)
            images = experiment.optim.epochs * self._around.images_per_epoch(experiment)
            self._end_images[row.trial] = images
        report = schedulers.report(row, self._end_images[row.trial])
        decision = self.scheduler.decide(report) if report is not None else "continue"
        return "continue" if row.trial in self._finals else decision

    def _take(self, row: RungRow) -> None:
        """A row of an earlier driver, as if it had just happened."""
        before = self._last.get(row.trial)
        if before is not None and before.images_seen >= row.images_seen:
            self._note(row)  # what became of it after its report
            return
        if _is_scored(row) and row.trial in self.fields:
            self._decide(row)
        self._note(row)

    def _note(self, row: RungRow) -> None:
        if row.trial in self.fields:
            images, gpu_s, device_s = self._more(row)
            self._images += images
            self._gpu_s += gpu_s
            self._device_s += device_s
        self._last[row.trial] = row
        if row.decision == "waiting":
            self._waiting.add(row.trial)
        else:
            self._waiting.discard(row.trial)
        if end := runs.end_of(row.decision):
            self._ended[row.trial] = end
        else:
            self._ended.pop(row.trial, None)

    def _append(self, *rows: RungRow) -> None:
        self._around.guard()
        self._rungs.append(*rows)
        for row in rows:
            self._note(row)
            self.on_row(row)


def _is_scored(row: RungRow) -> bool:
    return row.robust_accuracy is not None and row.decision != "failed"
