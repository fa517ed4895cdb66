"""Many runs under Ray Tune, sharing one teacher pool. `sweeps.tournament` decides what is tried,
stopped and spent, and a killed sweep goes on with it.

A trial is a training run with a stable name: interrupted, it resumes from its own checkpoints.
The objective is the robust accuracy on held-out images; the fidelity clock is `images_seen`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.execution import class_cache
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from dra_ray import cluster, config, data, meters, plan, runs
from dra_ray.config.metrics import DECISIONS
from dra_ray.config.sweep import Budget
from dra_ray.errors import ConfigError, DraError, RunError, StorageError, is_lasting
from dra_ray.inspection import listing
from dra_ray.plan import ready, speed, timing
from dra_ray.pool import sources
from dra_ray.pool.records import LogRow
from dra_ray.runs import RungRow
from dra_ray.storage import Lease, Store
from dra_ray.storage.unpickle import CUT_SHORT
from dra_ray.sweeps import orders, spaces, study
from dra_ray.sweeps.tournament import Circumstances, Scores, Tournament
from dra_ray.training import tracking
from dra_ray.workloads import train
from dra_ray.workloads.fidelity import Late

OBJECTIVE = "robust_accuracy"
log = logging.getLogger("dra_ray")
DRIVER_CPUS = 0.01  # a trial's driver only waits; one that held a CPU could starve its own workers
Progress = Callable[[RungRow], None]
Trainer = Callable[[config.Experiment, Store], object]


def trained(experiment: config.Experiment, run: Store) -> None:
    """Train a trial inside of Ray Tune, which gets the row of every validation."""
    if experiment.resources.is_single:
        train.fit_in_process(experiment, run, lambda row: tune.report(dict(row)))
    else:
        validations = _Validations()  # type: ignore[no-untyped-call]
        train.fit(experiment, run, callbacks=[validations])


def run(
    sweep: config.Sweep,
    store: Store,
    progress: Progress | None = None,
    trainer: Trainer = trained,
    trials: ready.Trials | None = None,
) -> runs.Manifest:
    """Run the trials of a sweep, then bring the best with and without alignment to the full budget,
    with all training seeds.

    Returns the manifest, with `finals`: {"dra": trial, "baseline": trial} (those that the sweep
    has). A trial that fails in a way that comes again is ranked last; the others go on. Where the
    budget is spent, trials keep their checkpoints, the manifest says so in `paused`, and the same
    call with a larger budget goes on.

    Args:
        trainer: trains a trial: it reports rows with the keys of `ValidationRow` to Ray Tune.
        trials: what `looked_at` gave, where it was asked before.

    Raises `ConfigError` before anything starts, `LeaseError` while another driver has the sweep,
    `LastingError` when every trial failed for good, `RunError` when trials were lost with what they
    ran on; the same call resumes those.
    """
    store = store.resolved()
    trials = trials or looked_at(sweep, store)
    table = speed.table(sweep.prices) if sweep.prices else None
    manifest = runs.begin_run(
        store,
        "sweep",
        sweep.model_dump(mode="json"),
        sweep.digest(),
        runs.Facts(seed=sweep.seed),
        require=lambda: _slots(trials.possible, sweep),
    )
    if manifest.is_done and not orders.pending(store):
        return manifest
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(Lease(store))
        slots = _slots(trials.possible, sweep)
        basis = functools.partial(_basis, sweep, trials.planned, table or speed.table())
        raised = orders.raised(store, manifest)
        expected = _planned(sweep, manifest.plan, raised, _Expecting(table, slots, basis))
        started, started_at = time.monotonic(), runs.utc_now()
        pools = _Pools(stack, store)
        for experiment in trials.possible.values():
            pools.bring_up(experiment)
        late = (
            stack.enter_context(Late(sweep, store, lease.require)) if sweep.fidelity.is_on else None
        )
        around = Circumstances(
            images_per_epoch=data.images_per_epoch,
            at=time.time,
            beside_hours=lambda: pools.hours() + (late.gpu_hours() if late else 0.0),
            money=None if table is None else lambda hours: hours * _price(table),
            guard=lease.require,
        )
        tournament = Tournament(sweep, store, around)
        before_s = _elapsed_s(manifest, tournament.rows)
        begun = runs.Facts(
            status="running",
            config=sweep.model_dump(mode="json"),
            paused=None,
            plan=expected,
            started_at=started_at,
            elapsed_s=before_s,
        )
        runs.update_manifest(store, begun)
        trackers = stack.enter_context(
            tracking.of_sweep(
                sweep.base.tracking,
                store,
                tournament.fields,
                tournament.rows,
                {"optuna": lambda: study.Study(store, sweep.space, tournament.fields)},
            )
        )

        shown = stack.enter_context(
            contextlib.closing(_Shown(store, tournament, sweep.budget, expected))
        )

        def on_row(row: RungRow) -> None:
            shown.decided(row)
            if late:
                late.after(row)
            trackers.row(row.trial, row)
            if progress:
                progress(row)

        tournament.on_row = on_row
        if late:
            late.begin(tournament.fields, tournament.experiment, tournament.rows)
        log.info("waiting for the first validation of %d trials", len(trials.planned))
        facts = _Driver(sweep, store, tournament, slots, trainer, pools).run()
        if late:
            late.finish(tournament.rows, finals=not facts.paused)
            facts = facts.model_copy(update=_spent(tournament))
        lease.require()
        elapsed_s = round(before_s + time.monotonic() - started, 3)
        return runs.update_manifest(store, facts.model_copy(update={"elapsed_s": elapsed_s}))


def looked_at(sweep: config.Sweep, store: Store) -> ready.Trials:
    """The trials of a sweep in its folder; what would fail in one of them fails here. Needs no
    Ray.
    """
    return ready.of_sweep(sweep, orders.raised(store, runs.read_manifest(store)))


@dataclasses.dataclass(frozen=True)
class _Expecting:
    """What a plan goes by: prices if any, trials at the same time, and how fast they are."""

    table: speed.Table | None
    slots: int
    basis: Callable[[], timing.Basis]


def _planned(
    sweep: config.Sweep, old: runs.Planned | None, raised: int | None, by: _Expecting
) -> runs.Planned:
    """What the sweep is expected to take, from its first start on; anew where its trials or its
    budget were raised.
    """
    budget = sweep.budget.model_dump(mode="json", exclude_none=True)
    trials = len(spaces.Space(sweep).trials(raised))
    if old is not None and (old.budget, old.trials) == (budget, trials):
        return old
    basis, table = by.basis(), by.table
    prices = plan.Prices(_price(table), _price(table), table.currency) if table else None
    planned = plan.plan(sweep, basis.tflops, prices, raised, basis.pace, by.slots)
    assert isinstance(planned, plan.SweepPlan)
    return plan.recorded(planned, sweep.budget, basis.pace is not None)


def _basis(
    sweep: config.Sweep, experiments: Mapping[str, config.Experiment], table: speed.Table
) -> timing.Basis:
    """How fast this machine's CPU threads train; the cards of a cluster are those of the table."""
    if sweep.base.resources.gpus_per_worker:
        name = _known_gpu(table)
        known = speed.of_gpu(name, table, sweep.base.compute.precision) if name else None
        return timing.by_arithmetic(known)
    log.info("timing a few steps of a trial, alone, for the plan")
    timed = timing.of_sweep(sweep, list(experiments.values()))
    basis = timing.basis(timed, train.__name__, speed.measured)
    log.info("the plan's hours: %s", basis.said)
    if basis.pace is None:
        return basis
    cores = max(basis.pace.cores, cluster.joined_cpus())  # nodes are taken to be like this one
    return dataclasses.replace(basis, pace=dataclasses.replace(basis.pace, cores=cores))


def _elapsed_s(manifest: runs.Manifest, rows: list[RungRow]) -> float:
    """How long drivers have run the sweep so far; one that was killed, up to its last report."""
    killed_s, since = 0.0, listing.seconds(manifest.started_at)
    if manifest.status == "running" and since is not None:
        killed_s = max((row.at - since for row in rows if row.at is not None), default=0.0)
    return (manifest.elapsed_s or 0.0) + max(0.0, killed_s)


class _Driver:
    """Lets Ray Tune train what the tournament says."""

    def __init__(
        self,
        sweep: config.Sweep,
        store: Store,
        tournament: Tournament,
        at_once: int,
        trainer: Trainer,
        pools: _Pools,
    ) -> None:
        self.sweep, self.store, self.tournament, self.at_once = sweep, store, tournament, at_once
        self._trainer, self._pools = trainer, pools

    def run(self) -> runs.Facts:
        """The race, then the finals; what the manifest is to say of it."""
        tournament = self.tournament
        _Orders(tournament, self.store).obey()
        self._tune()
        while not tournament.exhausted():
            behind = self._behind()
            if not behind:
                break
            tournament.go_on_with(behind)
            self._tune()
        facts = runs.Facts(
            status="done",
            trials=dict(tournament.fields),
            finals=tournament.finals(),
            **_spent(tournament),
        )
        if reason := tournament.exhausted():
            return facts.model_copy(update={"status": "paused", "paused": reason})
        tournament.require_a_trial()
        return facts

    def _behind(self) -> list[str]:
        """Finalists, with their repeats, that are not at their end and can get there."""
        finalists, tournament = list(self.tournament.finals().values()), self.tournament
        repeated = finalists if self.sweep.repeats.of == "finalists" else tournament.complete()
        repeats = [
            tournament.repeat(name, number)
            for name in dict.fromkeys([*finalists, *repeated])
            for number in range(1, self.sweep.repeats.seeds)
        ]
        return [name for name in finalists + repeats if not tournament.is_over(name)]

    # -- Ray Tune ------------------------------------------------------------------------------
    def _tune(self) -> None:
        """Train until the tournament has no trial to start, with a new round for those that were
        lost with a worker or a node.
        """
        lost: dict[str, str] = {}
        rounds_left = (self.sweep.base.resources.max_failures or 0) + 1
        # Ray Tune asks no more once it was told that there is none, but somebody may add one then
        while rounds_left and (first := self.tournament.start()) is not None:
            lost = self._round(first)
            rounds_left -= bool(lost)
            for name, reason in lost.items():
                log.warning(
                    "trial '%s' was lost (%s); it goes on from its checkpoint", name, reason
                )
        if rounds_left:
            return
        reason = next(iter(lost.values()))
        raise RunError(
            f"{len(lost)} of {len(self.tournament.fields)} trials of '{self.store}' were lost "
            f"({reason}); start the same command again to resume them"
        )

    def _round(self, first: str) -> dict[str, str]:
        """One run of Ray Tune from a trial on; the trials that were lost, and why."""
        _propagate_no_keys()
        queue = _Trials(self.tournament, self.store, self._pools, first)
        decisions = _Decisions(self.tournament, _Orders(self.tournament, self.store))
        folder, trainer = self.store / runs.TRIALS, self._trainer
        logging.getLogger("ray.tune").setLevel(
            logging.CRITICAL
        )  # tracebacks of trials, whose reasons we give in a line each

        def trial(job: dict[str, Any]) -> None:
            run = folder / job["trial"]
            # whose driver was killed between a checkpoint and what it was to hear of it
            for row in train.committed_rows(run):
                if row.images_seen > job["heard"]:
                    tune.report(row.on_disk())
            trainer(config.Experiment.model_validate(job["experiment"]), run)

        tuner = tune.Tuner(
            tune.with_resources(trial, _room),
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode="max",
                num_samples=-1,  # the queue says when it is empty
                search_alg=queue,
                scheduler=decisions,
                max_concurrent_trials=self.at_once,
                reuse_actors=True,  # the next trial of a slot finds its process, imports done
            ),
            run_config=tune.RunConfig(
                name="tune",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                **self.store.for_ray(),
            ),
        )
        unreadable = None
        # trials that wait would only find that they are not to begin
        try:
            cluster.stoppable(
                tuner.fit, queue.folders, lambda: not any(map(cluster.is_training, queue.folders))
            )
        except CUT_SHORT as error:
            unreadable = error
        # at its end Ray Tune reads its own files back; how the trials ended, decisions know
        errors = decisions.errors()
        if unreadable and not errors:
            raise StorageError(
                f"Ray Tune's files in '{self.store / 'tune'}' cannot be written or read "
                f"({type(unreadable).__name__}: {unreadable}); free space there, then start the "
                "same command again"
            ) from unreadable
        for name in queue.started:
            train.complete_rows(folder / name)
        return self._settled(errors)

    def _settled(self, errors: Mapping[str, BaseException]) -> dict[str, str]:
        """Record trials that failed for good; those that may be tried again, and why they ended."""
        lost = {}
        for name, error in errors.items():
            reason, lasting = ending(error)
            if self.tournament.state(name) == "stopped":  # by hand, in the middle of an epoch
                continue
            if self.tournament.fail(name, reason, lasting) or not lasting:
                lost[name] = reason
                self.tournament.start_again(name)
        return lost


def _spent(tournament: Tournament) -> dict[str, Any]:
    """Facts of the manifest."""
    spent = tournament.spent()
    money = {} if spent.money is None else {"money": round(spent.money, 4)}
    return {"images_seen": spent.images, "gpu_hours": round(spent.gpu_hours, 4), **money}


def ending(error: BaseException) -> tuple[str, bool]:
    """Why a trial ended, on one line, and whether it would end alike again; from what Ray Tune
    caught.
    """
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip()
    reason = text.splitlines()[-1] if text else type(cause).__name__
    return reason, is_lasting(cause) and not isinstance(cause, RayError)


def _error(trial: Any) -> BaseException:
    """What ended a trial, from the files that Ray Tune keeps of it."""
    try:
        kept: BaseException | None = trial.get_pickled_error()
        return kept or RunError(str(trial.get_error()))
    except CUT_SHORT:
        return StorageError("and Ray could not write down why; is there space left on its disk?")


def _propagate_no_keys() -> None:
    """Ray Tune would copy these keys into every trial's runtime environment, which Ray logs and
    shows on its dashboard. Processes of a cluster of our own inherit the environment; nodes of
    another have roles or keys of their own.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
        {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    )


def _room(job: dict[str, Any]) -> tune.PlacementGroupFactory:
    """What a trial itself takes; workers of Ray Train ask for their own."""
    resources = config.Experiment.model_validate(job["experiment"]).resources
    if not resources.is_single:
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


class _Orders:
    """What was asked of the sweep from outside, done in the thread of Ray Tune."""

    PERIOD_S, PERIOD_AT_STORE_S = 2.0, 10.0

    def __init__(self, tournament: Tournament, folder: Store) -> None:
        self._tournament, self._folder = tournament, folder
        self._looked_at = time.monotonic()

    def look(self) -> None:
        """Obey, every few seconds."""
        period_s = self.PERIOD_S if self._folder.is_local else self.PERIOD_AT_STORE_S
        if time.monotonic() - self._looked_at >= period_s:
            self._looked_at = time.monotonic()
            with contextlib.suppress(StorageError):  # the store is away: the next look tells
                self.obey()

    def obey(self) -> None:
        for file, order in orders.pending(self._folder):
            try:
                done = self._tournament.obey(order)
            except ConfigError as error:
                done = str(error)
            if order.what == "stop":  # its step under way is its last
                cluster.ask_to_stop((self._folder / runs.TRIALS / order.trial).uri)
            log.info("asked from outside: %s", done)
            file.remove()


class _Stateless:
    """Ray Tune pickles its searcher and its scheduler beside its state; nothing reads them back,
    since the tournament keeps its own records.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Trials(_Stateless, Searcher):
    """The trials that the tournament starts, one whenever Ray Tune has a free slot."""

    def __init__(self, tournament: Tournament, store: Store, pools: _Pools, first: str) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._tournament, self._store, self._pools = tournament, store, pools
        self._first = first
        self.started: list[str] = []
        self.folders = [store.uri]  # whom a stop asks: the sweep itself, and its trials

    def suggest(self, trial_id: str) -> Any:
        if cluster.is_asked_to_stop(self._store.uri):
            return Searcher.FINISHED
        name, self._first = self._first or self._tournament.start(), ""
        if name is None:
            return Searcher.FINISHED
        folder = (self._store / runs.TRIALS / name).uri
        cluster.ask_to_stop(folder, False)
        self.started.append(name)
        self.folders.append(folder)
        experiment = self._tournament.experiment(name)
        try:  # of a point that somebody added, nobody may have looked at its teacher yet
            self._pools.bring_up(experiment.with_sources())
        except DraError as error:  # as the trial itself will find
            log.warning("'%s' starts without its teacher pool: %s", name, error)
        last = self._tournament.last(name)
        heard = last.images_seen if last else 0  # by then, of what the trial has reported
        tree = experiment.model_dump(mode="json")
        return {"trial": name, "experiment": tree, "heard": heard}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The tournament knows."""

    def save(self, checkpoint_path: str) -> None:
        """The tournament is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nobody restores Ray Tune's state."""


class _Decisions(_Stateless, FIFOScheduler):
    """Asks the tournament what follows from a report."""

    def __init__(self, tournament: Tournament, orders_: _Orders) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tournament, self._orders = tournament, orders_
        self._errored: list[Any] = []

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Ray Tune calls this all the time."""
        self._orders.look()
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = self._tournament.report(trial.config["trial"], Scores.of(result))
        return TrialScheduler.STOP if decision == "stop" else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._errored.append(trial)

    def errors(self) -> dict[str, BaseException]:
        """By trial; only once Ray Tune has ended."""
        return {trial.config["trial"]: _error(trial) for trial in self._errored}


class _Shown:
    """What Prometheus sees of a sweep."""

    def __init__(
        self, store: Store, tournament: Tournament, budget: Budget, planned: runs.Planned
    ) -> None:
        self._tournament = tournament
        self._run = {"run": runs.metric_labels(store)["run"]}
        self._decisions = meters.Counter(
            "dra_sweep_decisions", [self._run | {"decision": decision} for decision in DECISIONS]
        )
        self.gauges = meters.Gauges(self._run, self._show_states)
        for what, limit in budget.model_dump(exclude_none=True).items():
            self.gauges.set("dra_sweep_budget", limit, what=what)
        self.gauges.set("dra_sweep_planned", planned.trials, what="trials")
        self.gauges.set("dra_sweep_planned", planned.images.high, what="images")
        if planned.money is not None:
            self.gauges.set("dra_sweep_planned", planned.money.high, what="money")
        self._show_states(self.gauges)
        self._show_spent()

    def decided(self, row: RungRow) -> None:
        self._decisions.add(1, self._run | {"decision": row.decision})
        self._show_states(self.gauges)
        self._show_spent()

    def _show_states(self, gauges: meters.Gauges) -> None:
        for state, count in self._tournament.by_state().items():
            gauges.set("dra_sweep_trials", count, state=state)

    def _show_spent(self) -> None:
        for what, spent in dataclasses.asdict(self._tournament.spent()).items():
            if spent is not None:
                self.gauges.set("dra_sweep_spent", spent, what=what)

    def close(self) -> None:
        self.gauges.close()


# -- before the first trial ------------------------------------------------------------------------
def _price(table: speed.Table) -> float:
    """Of an hour of a device of this cluster: a GPU as its nodes call it, or a CPU."""
    name = _known_gpu(table)
    return table.gpus[name].price if name else table.cpu_hour


def _known_gpu(table: speed.Table) -> str | None:
    """The cluster's GPU as the table calls it."""
    names = [name.lower() for name in cluster.accelerators()]
    return next((name for name in table.gpus if any(name in there for there in names)), None)


class _PoolHours:
    """GPU-hours of a pool, from its log: replicas that ran, times their GPUs."""

    def __init__(self, log: Store, gpus: float) -> None:
        self._tail, self._gpus = runs.Tail(log, LogRow), gpus
        self._last: LogRow | None = None
        self._hours = 0.0

    def hours(self) -> float:
        if not self._gpus:
            return 0.0
        with contextlib.suppress(DraError):  # the store is away: the next report counts
            for row in self._tail.new():
                if self._last is not None:
                    seconds = max(0.0, row.at - self._last.at)
                    # a driver that was gone for longer had no pool
                    self._hours += self._last.running * min(seconds, 60.0) / 3600
                self._last = row
        return self._hours * self._gpus


class _Pools:
    """One pool per different teacher, up before a trial that needs it and shared by all, until
    `stack` ends.
    """

    def __init__(self, stack: contextlib.ExitStack, store: Store) -> None:
        self._stack, self._store = stack, store
        self._known: set[config.Teacher] = set()
        self._hours: dict[str, _PoolHours] = {}

    def bring_up(self, experiment: config.Experiment) -> None:
        """Those of an experiment, unless they are up. Raises `CheckpointError` where there is no
        teacher, and `PoolError`.
        """
        if experiment.pool.kind != "pool":
            return
        for teacher in experiment.teachers:
            if teacher not in self._known:
                self._bring_up(teacher, experiment.pool)
                self._known.add(teacher)

    def _bring_up(self, teacher: config.Teacher, pool: config.Pool) -> None:
        from dra_ray.pool import service  # with Ray Serve

        app = sources.app_name(teacher)
        if app not in self._hours:
            log = self._store / service.log_name(len(self._hours))
            self._stack.enter_context(service.serving(teacher, pool, log))
            self._hours[app] = _PoolHours(log, pool.gpus_per_replica)

    def hours(self) -> float:
        """GPU-hours of all."""
        return sum(pool.hours() for pool in self._hours.values())


def _slots(experiments: Mapping[str, config.Experiment], sweep: config.Sweep) -> int:
    """Trials that fit at once beside the pools and the late verdicts: more would take each other's
    resources and none would start.
    """
    kept = {
        sources.app_name(teacher): sources.of_pool(e.pool)
        for e in experiments.values()
        for teacher in e.teachers
        if e.pool.kind == "pool"
    }
    pooled, late = set(kept), sweep.fidelity
    if late.is_on:
        cluster.require(1, 1.0, late.gpus_per_worker, "a late verdict")
        if late.apgd_from is not None:  # beside the training; AutoAttack comes after it
            kept["late verdicts"] = (late.workers * 1.0, late.workers * late.gpus_per_worker)
    beside = (sum(cpus for cpus, _ in kept.values()), sum(gpus for _, gpus in kept.values()))
    others = " and ".join(
        ["the teacher pool"] * bool(pooled) + ["the late verdicts"] * (len(kept) > len(pooled))
    )
    needs = [
        (
            e.resources.workers,
            e.resources.cpus_per_worker + (0 if e.resources.is_single else DRIVER_CPUS),
            e.resources.gpus_per_worker,
        )
        for e in experiments.values()
    ]
    fitting = (cluster.require(*need, "a trial", beside, others) for need in needs)
    return min([sweep.asha.max_concurrent, *(n for n in fitting if n is not None)])
