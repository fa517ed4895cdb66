"""Many runs under Ray Tune and ASHA, sharing one teacher pool; rung scores are ours, so a killed
sweep goes on with them.

A trial is one Ray Train run with a stable name: interrupted, it resumes from its own checkpoints.
The objective is the robust accuracy on held-out images; the fidelity clock is `images_seen`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.execution import class_cache
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from dra_ray import cluster, config, data, runs, students
from dra_ray.errors import ConfigError, LastingError, RunError, is_lasting
from dra_ray.pool import client, service
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.sweeps import spaces
from dra_ray.workloads import train

OBJECTIVE, CLOCK = "robust_accuracy", "images_seen"
log = logging.getLogger("dra_ray")
DRIVER_CPUS = 0.01  # a trial's driver only waits; one that held a CPU could starve its own workers
Progress = Callable[[RungRow], None]


def run(sweep: config.Sweep, store: Store, progress: Progress | None = None) -> runs.Manifest:
    """Run every trial under ASHA, then bring the best trial with and without alignment to the full
    budget.

    Returns the manifest, with `finals`: {"dra": trial, "baseline": trial} (those that the sweep
    has). A trial that fails in a way that comes again is ranked last and never started again; the
    others go on. Raises `ConfigError` before anything starts, `LastingError` when every trial
    failed like that, `RunError` when trials were lost with what they ran on; the same call resumes
    those.
    """
    store = store.resolved()
    experiments = {
        name: experiment.with_sources() for name, experiment in spaces.experiments(sweep).items()
    }
    _check(experiments)
    changed = {
        name: {field: _field(experiment, field) for field in sweep.space}
        for name, experiment in experiments.items()
    }
    manifest = runs.begin_run(
        store,
        "sweep",
        sweep.model_dump(mode="json"),
        sweep.digest(),
        runs.Facts(trials=changed, seed=sweep.seed),
    )
    if manifest.is_done:
        return manifest
    with contextlib.ExitStack() as stack:
        _pools(stack, experiments, store)
        scores = Rungs(sweep, store / runs.RUNGS, progress)
        log.info("waiting for the first validation of %d trials", len(experiments))
        at_once = min([sweep.asha.max_concurrent, *_slots(experiments)])
        _tune(store, experiments, scores.unfinished(experiments), scores, at_once)
        finals = finalists(experiments, scores.rows)
        while behind := [
            name
            for name in finals.values()
            if scores.last(name).epoch < experiments[name].optim.epochs
        ]:
            scores.racing = False
            _tune(store, experiments, behind, scores, at_once)
            finals = finalists(
                experiments, scores.rows
            )  # one that failed on the way makes room for the next
        if not finals:
            reason = scores.last(next(iter(experiments))).reason
            raise LastingError(
                f"all {len(experiments)} trials of '{store}' failed, the first since {reason}"
            )
    return runs.update_manifest(store, runs.Facts(status="done", finals=finals))


def finalists(experiments: dict[str, config.Experiment], rows: Iterable[RungRow]) -> dict[str, str]:
    """The best trial with alignment and the best without: of those that got furthest, the most
    robust at that rung.

    A trial that failed for good is none: its full budget cannot be reached.
    """
    last = {row.trial: row for row in rows}
    last = {name: row for name, row in last.items() if row.decision != "failed"}
    kinds = {
        "dra": [n for n in last if experiments[n].align.weight > 0],
        "baseline": [n for n in last if experiments[n].align.weight == 0],
    }
    return {
        kind: max(names, key=lambda n: (last[n].images_seen, last[n].robust_accuracy, n))
        for kind, names in kinds.items()
        if names
    }


def _check(experiments: dict[str, config.Experiment]) -> None:
    """What would fail in every trial fails here, in one line."""
    largest = max(experiments.values(), key=lambda e: e.synthetic.images)
    log.info("loading the data '%s'", largest.data.name)
    images = data.load(largest.data)
    train.load_synthetic(largest, images)
    for experiment in experiments.values():
        train.check_teacher(experiment, images.num_classes)
    for model in dict.fromkeys(experiment.model for experiment in experiments.values()):
        students.check(model, images.shape)
    clocks = {
        (e.optim.epochs, e.optim.batch, e.selection.every_epochs) for e in experiments.values()
    }
    if len(clocks) > 1:
        raise ConfigError(
            "space changes optim.epochs, optim.batch or selection.every_epochs: ASHA compares "
            "trials of one length; sweep those one by one"
        )


def _field(experiment: config.Experiment, field: str) -> Any:
    return dict(config.flatten(experiment.model_dump(mode="json")))[field]


def _pools(
    stack: contextlib.ExitStack, experiments: dict[str, config.Experiment], store: Store
) -> None:
    """One pool per different teacher, up before the first trial and shared by all."""
    pooled = {
        service.app_name(e.teacher): e
        for e in experiments.values()
        if e.align.weight and e.pool.kind == "pool"
    }
    for number, experiment in enumerate(pooled.values()):
        log = store / (f"pool-{number}.jsonl" if number else runs.POOL)
        stack.enter_context(service.serving(experiment.teacher, experiment.pool, log))


def _slots(experiments: dict[str, config.Experiment]) -> list[int]:
    """Trials that fit at once beside the pools: more would take each other's resources and none
    would start.
    """
    kept = {
        service.app_name(e.teacher): client.reserved(e)
        for e in experiments.values()
        if e.align.weight
    }
    beside = (sum(cpus for cpus, _ in kept.values()), sum(gpus for _, gpus in kept.values()))
    needs = [
        (
            e.resources.workers,
            e.resources.cpus_per_worker + (0 if _is_single(e.resources) else DRIVER_CPUS),
            e.resources.gpus_per_worker,
        )
        for e in experiments.values()
    ]
    fitting = (cluster.require(*need, "a trial", beside) for need in needs)
    return [trials for trials in fitting if trials is not None]


# -- Ray Tune --------------------------------------------------------------------------------------
def _tune(
    store: Store,
    experiments: dict[str, config.Experiment],
    names: list[str],
    scores: Rungs,
    max_concurrent: int,
) -> None:
    if not names:
        return
    # Ray Tune would copy these keys into every trial's runtime environment, which Ray logs and
    # shows on its dashboard. Processes of a cluster of our own inherit the environment; nodes of
    # another have roles or keys of their own.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
        {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    )
    trees = {name: experiments[name].model_dump(mode="json") for name in names}

    def trial(job: dict[str, Any]) -> None:
        name = job["trial"]
        experiment, folder = (
            config.Experiment.model_validate(trees[name]),
            store / runs.TRIALS / name,
        )
        if _is_single(experiment.resources):
            train.fit_in_process(experiment, folder, lambda row: tune.report(dict(row)))
        else:
            train.fit(experiment, folder, callbacks=[_Validations()])  # type: ignore[no-untyped-call]

    def room(job: dict[str, Any]) -> tune.PlacementGroupFactory:
        return _room(experiments[job["trial"]].resources)

    tuner = tune.Tuner(
        tune.with_resources(trial, room),
        param_space={"trial": tune.grid_search(names)},
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            scheduler=scores.scheduler(),
            max_concurrent_trials=max_concurrent,
            reuse_actors=True,  # the next trial of a slot finds its process with all imports done
        ),
        run_config=tune.RunConfig(
            name="tune",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            **store.for_ray(),
        ),
    )
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # tracebacks of trials, whose reasons we give in a line each
    folders = [(store / runs.TRIALS / name).uri for name in names]
    # trials that wait would only find that they are not to begin
    cluster.stoppable(tuner.fit, folders, lambda: not any(map(cluster.is_training, folders)))
    for name in names:
        train.complete_rows(store / runs.TRIALS / name)
    if lost := scores.settle():
        reason = next(iter(lost.values()))
        raise RunError(
            f"{len(lost)} of {len(names)} trials of '{store}' were lost ({reason}); start the same "
            "command again to resume them"
        )


def _is_single(resources: config.Resources) -> bool:
    """Whether a trial trains in its own process: Ray Train is there for several workers, for an
    elastic number of them, and for workers that need nodes of a kind.
    """
    return resources.workers == 1 and not resources.min_workers and not resources.labels


def _room(resources: config.Resources) -> tune.PlacementGroupFactory:
    """What a trial itself takes; workers of Ray Train ask for their own."""
    if not _is_single(resources):
        return tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}])
    usual = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return tune.PlacementGroupFactory(
        [{name: each for name, each in (usual | dict(resources.custom)).items() if each}]
    )


class _Validations(TuneReportCallback):
    """Hands Tune what a validation reports, and not the checkpoints between validations."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        if OBJECTIVE in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


@dataclasses.dataclass
class _Named:
    """What ASHA needs of a trial: an identity, here our own name, the same before and after a
    restart.
    """

    trial_id: str


class Rungs:
    """Every score that a trial reported and what was decided, in `rungs.jsonl`; feeds ASHA after a
    restart.
    """

    def __init__(self, sweep: config.Sweep, file: Store, progress: Progress | None) -> None:
        self.sweep, self.progress = sweep, progress
        self.log = runs.Log(file, RungRow)
        # Ray Tune's trials; their errors can be read once Tune has ended
        self.errored: list[Any] = []
        self.racing = True  # ASHA decides; off for the finals, which nothing stops

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles its scheduler beside its state; a progress bar cannot go along, and
        nothing reads it back.
        """
        return self.__dict__ | {"progress": None, "errored": []}

    @property
    def rows(self) -> list[RungRow]:
        return self.log.rows

    def last(self, trial: str) -> RungRow:
        return next(row for row in reversed(self.rows) if row.trial == trial)

    def unfinished(self, experiments: Iterable[str]) -> list[str]:
        ended = {row.trial for row in self.rows if row.decision != "continue"}
        return [name for name in experiments if name not in ended]

    def add(self, trial: str, result: dict[str, Any], stop: bool) -> None:
        done = result["epoch"] >= self.sweep.base.optim.epochs
        row = RungRow(
            trial=trial,
            epoch=result["epoch"],
            images_seen=result[CLOCK],
            clean_accuracy=result["clean_accuracy"],
            robust_accuracy=result[OBJECTIVE],
            images=result.get("images"),
            verdicts=result.get("verdicts"),
            decision="stop" if stop else "done" if done else "continue",
            at=time.time(),
        )
        if any(r.trial == trial and r.images_seen >= row.images_seen for r in self.rows):
            return  # an epoch that was repeated after a restart: the same score, already there
        self._append(row)

    def settle(self) -> dict[str, str]:
        """End the trials that failed for good; the others by name, which may be resumed, and why
        each was lost.
        """
        errors = {
            trial.config["trial"]: trial.get_pickled_error() or RunError(str(trial.get_error()))
            for trial in self.errored
        }
        self.errored = []
        reasons = {name: self.fail(name, error) for name, error in errors.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def fail(self, trial: str, error: BaseException) -> str | None:
        """A trial that would fail alike again ends here, with its last scores if it has any; any
        other gives its reason.
        """
        cause = getattr(error, "cause", None) or error
        reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        if isinstance(cause, RayError) or not is_lasting(cause):
            return reason
        scores = next((row for row in reversed(self.rows) if row.trial == trial), None)
        self._append(
            RungRow(
                trial=trial,
                epoch=scores.epoch if scores else 0,
                images_seen=scores.images_seen if scores else 0,
                clean_accuracy=scores.clean_accuracy if scores else None,
                robust_accuracy=scores.robust_accuracy if scores else None,
                decision="failed",
                reason=reason,
                at=time.time(),
            )
        )
        return None

    def scored(self) -> list[RungRow]:
        """The rows of validations."""
        return [row for row in self.rows if row.decision != "failed"]

    def _append(self, row: RungRow) -> None:
        self.log.append(row)
        if self.progress:
            self.progress(row)

    def scheduler(self) -> TrialScheduler:
        """ASHA with every recorded score in its rungs, or plain recording once the race is over."""
        return _Asha(self) if self.racing else _Recorder(self)


class _Asha(ASHAScheduler):
    """Ray Tune's ASHA, with trials known by our names and scores recorded."""

    def __init__(self, rungs: Rungs) -> None:
        base, asha = rungs.sweep.base, rungs.sweep.asha
        per_epoch = (
            data.batch_plan(base, data.outline(base.data).train, 0).steps_per_epoch
            * base.optim.batch
        )
        super().__init__(
            time_attr=CLOCK,
            max_t=base.optim.epochs * per_epoch,
            grace_period=asha.grace_epochs * per_epoch,
            reduction_factor=asha.reduction_factor,
            # a trial that reaches the end finishes by itself, checkpoints and all
            stop_last_trials=False,
        )
        self._record = rungs
        self.set_search_properties(OBJECTIVE, "max")
        for name in dict.fromkeys(row.trial for row in rungs.scored()):
            super().on_trial_add(None, _Named(name))  # type: ignore[arg-type]
        for row in rungs.scored():
            super().on_trial_result(None, _Named(row.trial), row.on_disk())  # type: ignore[arg-type]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True if self._metric else super().set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        name = trial.config["trial"]
        if name not in self._trial_info:
            super().on_trial_add(tune_controller, _Named(name))  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["trial"]
        decision = super().on_trial_result(tune_controller, _Named(name), result)  # type: ignore[arg-type]
        if result["epoch"] >= self._record.sweep.base.optim.epochs:
            decision = TrialScheduler.CONTINUE  # nothing is left to stop
        self._record.add(name, result, stop=decision == TrialScheduler.STOP)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its last score is in the rungs already."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Its scores stay: they are what later trials are compared with."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._record.errored.append(trial)


class _Recorder(FIFOScheduler):
    def __init__(self, rungs: Rungs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = rungs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._record.add(trial.config["trial"], result, stop=False)
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._record.errored.append(trial)
