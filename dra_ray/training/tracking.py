"""Other people's trackers: MLflow, W&B and Trackio get the rows that our logs hold.

A tracker never matters to a run: it works in a thread of its own, and one that fails says so once
and is left out until the run is started again. Rows that it has are not sent twice, so a resumed
run hands it all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from dra_ray import config, runs
from dra_ray.errors import DataError
from dra_ray.runs import RungRow, StepRow, ValidationRow
from dra_ray.storage import Store, sha256
from dra_ray.training import tensorboard
from dra_ray.training.tensorboard import curve, scalars

log = logging.getLogger("dra_ray")
Row = ValidationRow | StepRow | RungRow
FIELDS = Mapping[str, Any]
PROGRESS = "tracking.json"  # the last row that each tracker was given
END_S, SWEEP_END_S = 20.0, 60.0  # how long a run waits at its end for trackers that are behind


class Tracker(Protocol):
    """Whoever is told of rows. Both calls come from one thread, and may raise anything."""

    def row(self, trial: str, row: Row) -> None:
        """A row of a trial, or of the run itself; perhaps one that it was given before. After a
        `RungRow` that is no "continue" its trial trains no more, or not for a while.
        """

    def end(self, status: str) -> None:
        """The run's driver ends: the run is "done", or "unfinished" where it may be resumed."""


@dataclasses.dataclass(frozen=True)
class Tracked:
    """What trackers say about a run.

    Attributes:
        run: its folder.
        fields: config by trial, dotted; of a sweep what the trial changes.
        group: the sweep's name; None for a run of its own.
    """

    run: Store
    fields: Mapping[str, FIELDS]
    group: str | None = None


class Trackers:
    """Trackers behind a queue, for the length of a `with` block; `row` returns at once.

    Args:
        begin: by name, what makes a tracker; called in the trackers' thread, as it may connect.
    """

    def __init__(self, begin: Mapping[str, Callable[[], Tracker]], end_s: float = END_S) -> None:
        self._begin, self._end_s = begin, end_s
        self._rows: queue.SimpleQueue[tuple[str, Row] | str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="dra-trackers")

    def row(self, trial: str, row: Row) -> None:
        if self._begin:
            self._rows.put((trial, row))

    def __enter__(self) -> Trackers:
        if self._begin:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._begin:
            return
        self._rows.put("done" if kind is None else "unfinished")
        self._thread.join(self._end_s)
        if self._thread.is_alive():
            log.warning(
                "%s did not take the last rows within %g s; the run's own logs have them all",
                " and ".join(self._begin),
                self._end_s,
            )

    def _loop(self) -> None:
        trackers: dict[str, Tracker] = {}
        for name, begin in self._begin.items():
            with _excused(name, trackers):
                trackers[name] = begin()
        while True:
            entry = self._rows.get()
            for name, tracker in list(trackers.items()):
                with _excused(name, trackers):
                    if isinstance(entry, str):
                        tracker.end(entry)
                    else:
                        tracker.row(*entry)
            if isinstance(entry, str):
                return


@contextlib.contextmanager
def _excused(name: str, trackers: dict[str, Tracker]) -> Iterator[None]:
    """Whatever a tracker raises is one warning, and the end of that tracker."""
    try:
        yield
    except Exception as error:
        trackers.pop(name, None)
        reason = str(error).strip().splitlines()
        log.warning(
            "%s gets no more rows until this run is started again: %s",
            name,
            reason[0] if reason else type(error).__name__,
        )


# -- which -----------------------------------------------------------------------------------------
def services(settings: config.Tracking, tracked: Tracked) -> dict[str, Callable[[], Tracker]]:
    """What makes each tracker that the settings name. Raises `ConfigError` for one that is not
    installed.
    """
    settings.require_installed()
    begin: dict[str, Callable[[], Tracker]] = {}
    if uri := settings.mlflow:
        begin["mlflow"] = lambda: MLflow(uri, tracked)
    if project := settings.wandb:
        begin["wandb"] = lambda: Wandb(project, tracked)
    if place := settings.trackio:
        begin["trackio"] = lambda: Trackio(place, tracked)
    return begin


@contextlib.contextmanager
def of_training(experiment: config.Experiment, run: Store) -> Iterator[Trackers]:
    """The event file of a training run of its own and the trackers that its config names; they
    have the rows so far.
    """
    fields = dict(config.flatten(experiment.model_dump(mode="json")))
    begin: dict[str, Callable[[], Tracker]] = {"tensorboard": lambda: TensorBoard(run)}
    begin |= services(experiment.tracking, Tracked(run, {run.name: fields}))
    with Trackers(begin) as trackers:
        for row in tensorboard.logged(run):
            trackers.row(run.name, row)
        yield trackers


@contextlib.contextmanager
def of_sweep(
    settings: config.Tracking,
    sweep: Store,
    points: Mapping[str, FIELDS],
    rows: Sequence[RungRow],
    further: Mapping[str, Callable[[], Tracker]] | None = None,
) -> Iterator[Trackers]:
    """The event files of a sweep's trials, the trackers that its config names, and `further` ones;
    they have the rows so far.

    Args:
        settings: `base.tracking` of the sweep.
        points: the fields that each trial changes; trials that come later may be added to it.
    """
    begin: dict[str, Callable[[], Tracker]] = {"tensorboard": lambda: TrialsTensorBoard(sweep)}
    begin |= services(settings, Tracked(sweep, points, sweep.name))
    with Trackers(begin | dict(further or {}), SWEEP_END_S) as trackers:
        for row in rows:
            trackers.row(row.trial, row)
        yield trackers


class TensorBoard:
    """The event file of a training run, from its rows; see `tensorboard`."""

    def __init__(self, run: Store) -> None:
        self._events = tensorboard.EventFile(run / tensorboard.EVENTS)

    def row(self, trial: str, row: Row) -> None:
        if isinstance(row, RungRow):
            return
        self._events.add(row)
        if self._events.file.is_local or isinstance(row, ValidationRow):
            self._events.send()

    def end(self, status: str) -> None:
        self._events.send()


class TrialsTensorBoard:
    """The event files of a sweep's trials: at each score what its trial has logged since. Once
    trials have ended, their logs have rows that no score came after: so all are looked at again.
    """

    def __init__(self, sweep: Store) -> None:
        self._trials, self._began_at = sweep / runs.TRIALS, time.time()
        self._going: dict[str, tensorboard.Mirror] = {}
        self._seen: set[str] = set()

    def row(self, trial: str, row: Row) -> None:
        if not isinstance(row, RungRow) or (row.at or 0.0) < self._began_at:
            return  # a former driver's row
        self._seen.add(trial)
        if trial not in self._going:
            self._going[trial] = tensorboard.Mirror(self._trials / trial)
        self._going[trial].look()
        if row.decision != "continue":
            del self._going[trial]

    def end(self, status: str) -> None:
        self._going = {}
        for trial in sorted(self._seen):
            tensorboard.Mirror(self._trials / trial).look()


def clock(row: Row) -> int:
    """A row's place on the x axis: the step, or the images seen where trials' steps differ."""
    return row.images_seen if isinstance(row, RungRow) else row.step


def _identity(tracked: Tracked, trial: str) -> str:
    """The same for the same trial of the same run, wherever its driver runs."""
    return sha256(f"{tracked.run.uri} {trial}".encode())[:16]


# -- MLflow ----------------------------------------------------------------------------------------
class MLflow:
    """A run of MLflow for each trial, in an experiment named after the sweep (or "dra_ray").

    A trial that waits for its rung to fill stays RUNNING; one that was stopped or paused and goes
    on is RUNNING again.
    """

    ENDS: ClassVar = {
        "done": "FINISHED",
        "stop": "KILLED",
        "paused": "KILLED",
        "failed": "FAILED",
        "unfinished": "KILLED",
    }

    def __init__(self, uri: str, tracked: Tracked) -> None:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # results only
        from mlflow import MlflowClient

        self._client, self._tracked = MlflowClient(tracking_uri=uri), tracked
        name = tracked.group or "dra_ray"
        known = self._client.get_experiment_by_name(name)
        self._experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._ids: dict[str, str] = {}
        self._sent: dict[str, set[tuple[str, int]]] = {}
        self._open: set[str] = set()

    def row(self, trial: str, row: Row) -> None:
        from mlflow.entities import Metric

        run = self._ids.get(trial) or self._begin(trial)
        at, key = clock(row), curve(row)
        values = scalars(row)
        if values and (key, at) not in self._known(trial, run, next(iter(values))):
            stamp = int((row.at or 0.0) * 1000)
            metrics = [Metric(name, value, stamp, at) for name, value in values.items()]
            self._client.log_batch(run, metrics=metrics)
            self._sent[trial].add((key, at))
        if isinstance(row, RungRow) and row.decision in self.ENDS:
            self._terminate(trial, row.decision)
        elif trial not in self._open:
            self._client.update_run(run, status="RUNNING")
            self._open.add(trial)

    def end(self, status: str) -> None:
        is_sweep = self._tracked.group is not None  # whose finished trials have said so
        for trial in sorted(self._open):
            self._terminate(trial, "unfinished" if is_sweep else status)

    def _begin(self, trial: str) -> str:
        """The trial's run: the one that a former driver began, going on, or a new one."""
        from mlflow.entities import Param

        tag = _identity(self._tracked, trial)
        there = self._client.search_runs(
            [self._experiment], filter_string=f"tags.`dra.run` = '{tag}'", max_results=1
        )
        if there:
            run = there[0].info.run_id
            self._client.update_run(run, status="RUNNING")
        else:
            tags = {"dra.run": tag, "dra.folder": self._tracked.run.uri}
            run = self._client.create_run(self._experiment, tags=tags, run_name=trial).info.run_id
            fields = self._tracked.fields.get(trial, {})
            params = [Param(field, str(value)[:500]) for field, value in fields.items()]
            for start in range(0, len(params), 100):  # as many as a request may have
                self._client.log_batch(run, params=params[start : start + 100])
        self._ids[trial] = run
        self._open.add(trial)
        return str(run)

    def _known(self, trial: str, run: str, name: str) -> set[tuple[str, int]]:
        """(curve, clock) of the rows that the server has of a trial; asked once for each curve."""
        sent = self._sent.setdefault(trial, set())
        of = name.split("/")[0]
        if (of, -1) not in sent:
            sent.add((of, -1))
            history = self._client.get_metric_history(run, name)
            sent |= {(of, metric.step) for metric in history}
        return sent

    def _terminate(self, trial: str, how: str) -> None:
        self._open.discard(trial)
        self._client.set_terminated(self._ids[trial], self.ENDS[how])


# -- W&B and Trackio -------------------------------------------------------------------------------
class Progress:
    """The last row of each curve of each trial that a tracker was given: neither W&B nor Trackio
    refuses a row that it has. Written before the row is given: one that is lost with its driver is
    missing there, and none comes twice.
    """

    def __init__(self, run: Store, tracker: str) -> None:
        self._file, self._tracker = run / PROGRESS, tracker
        self._last: dict[str, int] = self._read().get(tracker, {})

    def is_new(self, trial: str, row: Row) -> bool:
        key, at = f"{trial}/{curve(row)}", clock(row)
        if at <= self._last.get(key, -1):
            return False
        self._last[key] = at
        self._file.write_json(self._read() | {self._tracker: self._last})
        return True

    def _read(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        value = self._file.read_json()
        if not isinstance(value, dict):
            raise DataError(f"'{self._file}' is damaged; delete it")
        return value


class Wandb:
    """A run of W&B for each trial, grouped by sweep; signed in by `wandb login` or WANDB_API_KEY.

    Args:
        project: PROJECT or ENTITY/PROJECT.
    """

    def __init__(self, project: str, tracked: Tracked) -> None:
        self._entity, _, self._project = project.rpartition("/")
        self._tracked, self._progress = tracked, Progress(tracked.run, "wandb")
        self._runs: dict[str, Any] = {}

    def row(self, trial: str, row: Row) -> None:
        is_last = isinstance(row, RungRow) and row.decision != "continue"
        if self._progress.is_new(trial, row):
            run = self._runs.get(trial) or self._begin(trial)
            # rows of two logs come in no common order, so each curve has a clock of its own
            run.log({**scalars(row), f"{curve(row)}/clock": clock(row)})
        if is_last and trial in self._runs:
            self._runs.pop(trial).finish()

    def end(self, status: str) -> None:
        for run in self._runs.values():
            run.finish(exit_code=0 if status == "done" else 1)
        self._runs = {}

    def _begin(self, trial: str) -> Any:
        import wandb

        run = wandb.init(
            entity=self._entity or None,
            project=self._project,
            group=self._tracked.group,
            name=trial,
            id=_identity(self._tracked, trial),
            resume="allow",
            reinit="create_new",
            config=dict(self._tracked.fields.get(trial, {})),
            dir=tempfile.gettempdir(),
            settings=wandb.Settings(console="off", silent=True),
        )
        for name in ("validation", "steps", "rungs"):
            run.define_metric(f"{name}/*", step_metric=f"{name}/clock")
        self._runs[trial] = run
        return run


class Trackio:
    """A run of Trackio for each trial, in a project named after the sweep (or "dra_ray").

    Args:
        place: "local", the URL of a server, or OWNER/NAME of a Space.
    """

    def __init__(self, place: str, tracked: Tracked) -> None:
        self._where: dict[str, Any] = {}
        if "://" in place:
            self._where = {"server_url": place}
        elif place != "local":
            self._where = {"space_id": place}
        self._tracked, self._progress = tracked, Progress(tracked.run, "trackio")
        self._runs: dict[str, Any] = {}

    def row(self, trial: str, row: Row) -> None:
        if self._progress.is_new(trial, row):
            run = self._runs.get(trial) or self._begin(trial)
            run.log(scalars(row), step=clock(row))
        if isinstance(row, RungRow) and row.decision != "continue" and trial in self._runs:
            self._runs.pop(trial).finish()

    def end(self, status: str) -> None:
        for run in self._runs.values():
            run.finish()
        self._runs = {}

    def _begin(self, trial: str) -> Any:
        import trackio

        self._runs[trial] = trackio.init(
            project=self._tracked.group or "dra_ray",
            name=trial,
            resume="allow",
            config=dict(self._tracked.fields.get(trial, {})),
            embed=False,
            auto_log_gpu=False,
            **self._where,
        )
        return self._runs[trial]
