"""Train one student with TRADES and Diffusion Representation Alignment on Ray Train.

`fit` is what a user calls; `train_worker` is the loop that every Ray Train worker runs. A worker's
step is a pure function of (config, step, weights): batches, crops, attack noise and teacher noise
are drawn from (seed, step) for the whole batch, and each worker takes its slice. So a run that lost
a worker repeats a step to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray.train
import torch
from ray.train import RunConfig, UserCallback
from torch import Tensor

from dra_ray import cluster, config, data, meters, runs
from dra_ray.config.metrics import PARTS
from dra_ray.data import Pictures
from dra_ray.data import batches as batch_plan
from dra_ray.data.loader import Batches
from dra_ray.errors import ConfigError, LastingError, StorageError
from dra_ray.plan import ready
from dra_ray.pool import sources as feature_sources
from dra_ray.runs import StepRow, ValidationRow
from dra_ray.storage import Lease, Store
from dra_ray.students import checkpoint
from dra_ray.training import (
    arithmetic,
    averaging,
    losses,
    optimisers,
    schedule,
    tracking,
    workers,
)
from dra_ray.training.clock import Clock
from dra_ray.training.step import Feed, State, Unjudged, initial_state, step
from dra_ray.workloads import judging
from dra_ray.workloads.session import (
    KEPT,
    InProcess,
    OnRayTrain,
    Place,
    Session,
    checkpoints,
    read_snapshot,
)

logger = logging.getLogger("dra_ray")
LOSSES = ("total", "clean", "robust", "align", "distill")  # in metrics
Row = ValidationRow | StepRow


def fit(
    experiment: config.Experiment,
    run: Store,
    progress: Callable[[Row], None] | None = None,
    callbacks: list[UserCallback] | None = None,
    facts: runs.Facts | None = None,
) -> ValidationRow:
    """Train `experiment` into the run directory, or go on where it stopped; returns the last row of
    its metrics.

    Args:
        progress: receives every new row of metrics.jsonl and of steps.jsonl.
        callbacks: of Ray Train, such as Tune's.
        facts: what `ready.of_experiment` found, where it was asked before.

    Raises:
        ConfigError: the directory holds another config, or the experiment lacks a teacher or
            images.
        LeaseError: another driver trains into the directory.
        LastingError: training diverged, or failed in its own code; the same call fails alike.
        RunError: training failed by what it runs on; the run can be resumed by the same call.
    """
    experiment, run = experiment.with_sources(), run.resolved()
    facts = facts or ready.of_experiment(experiment)
    manifest = _begin(experiment, run, facts, lambda: _require_room(experiment, run))
    if manifest.is_done:
        return runs.read_rows(run / runs.METRICS, ValidationRow)[-1]
    with contextlib.ExitStack() as stack:
        if not callbacks:  # a trial's is its sweep's
            stack.enter_context(Lease(run))
        if experiment.teachers and experiment.pool.kind == "pool":
            from dra_ray.pool import service  # with Ray Serve

            for number, teacher in enumerate(dict.fromkeys(experiment.teachers)):
                log = None if callbacks else run / service.log_name(number)
                stack.enter_context(service.serving(teacher, experiment.pool, log))
        return _fit(experiment, run, progress, callbacks or [])


def fit_in_process(
    experiment: config.Experiment, run: Store, on_row: Callable[[Mapping[str, Any]], None]
) -> ValidationRow:
    """`fit` for an experiment of one worker, in this process of a cluster, which it may use for
    further runs; a pool that it needs is up.

    Args:
        on_row: gets the row of every validation once its checkpoint is committed; it may end the
            training by raising.

    Raises what `fit` raises; errors of the training itself as they are.
    """
    experiment, run = experiment.with_sources(), run.resolved()
    manifest = _begin(experiment, run, ready.facts(experiment))
    if manifest.is_done:
        return runs.read_rows(run / runs.METRICS, ValidationRow)[-1]
    with cluster.training(run.uri), _completing(run):
        cluster.end_if_stopped(run.uri)
        runs.update_manifest(run, _starting(experiment))
        try:
            train(experiment, run, InProcess(run, on_row))
        finally:
            torch.cuda.empty_cache()  # the next run of this process has other shapes
        cluster.end_if_stopped(run.uri)
    return _finish(run)


def _begin(
    experiment: config.Experiment,
    run: Store,
    facts: runs.Facts,
    require: Callable[[], object] = lambda: None,
) -> runs.Manifest:
    """The manifest of a run that is free, or its own; raises what `require` raises."""
    tree = experiment.model_dump(mode="json")
    return runs.begin_run(run, "train", tree, experiment.digest(), facts, require)


def _require_room(experiment: config.Experiment, run: Store) -> None:
    resources = experiment.resources
    cluster.require(
        cluster.least_workers(resources),
        resources.cpus_per_worker,
        resources.gpus_per_worker,
        f"training '{run.name}'",
        feature_sources.reserved(experiment),
    )


def _fit(
    experiment: config.Experiment,
    run: Store,
    progress: Callable[[Row], None] | None,
    callbacks: list[UserCallback],
) -> ValidationRow:
    resources = experiment.resources
    trainer = cluster.Trainer(
        train_worker,
        train_loop_config={"experiment": experiment.model_dump(mode="json"), "run": run.uri},
        backend_config=cluster.backend(resources),
        scaling_config=cluster.scaling(resources),
        run_config=RunConfig(
            name=run.name,  # a stable name is what lets Ray Train find the run's checkpoints again
            failure_config=cluster.failures(resources),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT),
            callbacks=callbacks,  # type: ignore[arg-type]  # mypy sees the class of Train V1
            **(run / runs.CHECKPOINTS).for_ray(),
        ),
    )
    runs.update_manifest(run, _starting(experiment))
    with (
        # of a trial its sweep's driver tells
        contextlib.nullcontext(progress)
        if callbacks
        else _tracked(experiment, run, progress) as on_row,
        cluster.following(run / runs.METRICS, ValidationRow, on_row),
        cluster.following(run / runs.STEPS, StepRow, on_row),
        _completing(run),
    ):
        cluster.fit(
            trainer,
            run.uri,
            f"training '{run}'",
            resources,
            lambda: bool(_manifest(run).started_at),
        )
    return _finish(run)


def _finish(run: Store) -> ValidationRow:
    """The last row of a training that has returned; `LastingError` where it stopped by itself."""
    if stopped := _manifest(run).stopped:
        raise LastingError(f"training '{run}' stopped: {stopped}")
    last = runs.read_rows(run / runs.METRICS, ValidationRow)[-1]
    runs.update_manifest(
        run, runs.Facts(status="done", images_seen=last.images_seen, elapsed_s=last.elapsed_s)
    )
    return last


@contextlib.contextmanager
def _tracked(
    experiment: config.Experiment, run: Store, progress: Callable[[Row], None] | None
) -> Iterator[Callable[[Row], None]]:
    """What hands a row to the run's trackers and to `progress`."""
    with tracking.of_training(experiment, run) as trackers:

        def on_row(row: Row) -> None:
            trackers.row(run.name, row)
            if progress:
                progress(row)

        yield on_row


@contextlib.contextmanager
def _completing(run: Store) -> Iterator[None]:
    try:
        yield
    finally:
        complete_rows(run)


def complete_rows(run: Store) -> None:
    """Bring metrics.jsonl up to the newest committed checkpoint, whose commit the workers may not
    have lived to see.
    """
    rows, file = committed_rows(run), run / runs.METRICS
    if len(rows) > len(runs.read_rows(file, ValidationRow)):
        runs.write_rows(file, rows)


def committed_rows(run: Store) -> list[ValidationRow]:
    """The validations that the newest committed checkpoint knows, which a resumed run does not
    repeat.
    """
    committed = _committed(run)
    if committed is None:
        return []
    state = checkpoints(run) / committed["checkpoint_dir_name"] / "state.json"
    return [runs.parse(ValidationRow, row, f"'{state}'") for row in state.read_json()["rows"]]


def _committed(run: Store) -> dict[str, Any] | None:
    """{"checkpoint_dir_name", "metrics"} of the newest checkpoint that a resumed run would
    take up.
    """
    return read_snapshot(run).get("latest_checkpoint_result")


class Rows:
    """`metrics.jsonl`: a row is there once its checkpoint is committed, so a resumed run has every
    row that anybody has seen.
    """

    PERIOD_S = 0.5

    def __init__(self, run: Store, rows: list[ValidationRow]) -> None:
        self._run, self._rows, self._looked_at = run, rows, time.monotonic()
        self._written = 0
        self._since = [row.step for row in rows]  # of each, the step of its first checkpoint
        self._write(len(rows))  # of the checkpoint that training goes on from

    def checkpoint(self, step: int) -> None:
        """A checkpoint is about to be made at this step, with all rows so far."""
        self._since += [step] * (len(self._rows) - len(self._since))

    def look(self) -> None:
        """Write what has been committed since; costs nothing while nothing is under way."""
        if self._written == len(self._rows) or time.monotonic() - self._looked_at < self.PERIOD_S:
            return
        self._looked_at = time.monotonic()
        if committed := _committed(self._run):
            self._write(sum(step <= committed["metrics"]["step"] for step in self._since))

    def _write(self, count: int) -> None:
        if count > self._written:
            runs.write_rows(self._run / runs.METRICS, self._rows[:count])
            self._written = count


def _starting(experiment: config.Experiment) -> runs.Facts:
    return runs.Facts(config=experiment.model_dump(mode="json"), started_at=None, stopped=None)


def _manifest(run: Store) -> runs.Manifest:
    manifest = runs.read_manifest(run)
    if manifest is None:
        raise ConfigError(f"'{run}' has no manifest.json; start the run with `dra train`")
    return manifest


def train_worker(job: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    experiment = config.Experiment.model_validate(job["experiment"])
    if experiment.resources.min_workers:
        cluster.claim_room()
    run = Store(job["run"])
    train(experiment, run, OnRayTrain(run))


def train(experiment: config.Experiment, run: Store, session: Session) -> None:
    """A worker's share of a run: set up, pick up the last checkpoint, train to the end."""
    with meters.of_stores():
        _train(experiment, run, session)


def _train(experiment: config.Experiment, run: Store, session: Session) -> None:
    rank, world, device = session.rank, session.world, session.device
    place = Place(rank, world, batch_plan.part_of(experiment.optim.batch, rank, world), device)
    arithmetic.prepare(experiment.compute, experiment.resources.threads_per_worker)
    images = data.load(experiment.data)
    extra = ready.load_synthetic(experiment, images)
    batches = data.batch_plan(
        experiment,
        len(images.train),
        len(extra) if extra else 0,
        data.windowed(experiment, extra),
    )
    samples = ready.load_canonical(experiment, images.shape)
    sources = feature_sources.sources(experiment, str(device), _sender(run), samples)
    state, origin = initial_state(experiment, images.shape, sources, device)
    session.restore(state)
    if state.aligner and state.step == 0:
        state.aligner.measure(sources, images.train, experiment.shared_seed)
    if rank == 0:
        _record_start(run, state.step, world, device, origin)
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(
            contextlib.closing(Shown(run, place, experiment.resources.gpus_per_worker, state.rows))
        )
        loader = stack.enter_context(
            contextlib.closing(
                Batches(
                    images.train,
                    extra,
                    batches,
                    device,
                    place.mine,
                    resident_bytes=int(experiment.resources.resident_gib * 2**30),
                )
            )
        )
        for source in dict.fromkeys(sources):
            stack.enter_context(contextlib.closing(source))
        feed = Feed(
            experiment,
            shown.clock.timed("data_wait", loader.get),
            place.mine,
            shown.clock.sources(sources),
            experiment.optim.epochs * batches.steps_per_epoch,
            samples,
        )
        beside = stack.enter_context(
            contextlib.closing(judging.Beside(experiment, run.name, place, images.validation))
        )
        _Loop(experiment, run, place, session, batches.steps_per_epoch).run(
            state, feed, images.validation, shown, beside
        )


def _sender(run: Store) -> str:
    """As whom a run's clients ask the pool: RUN, or RUN/TRIAL."""
    labels = runs.metric_labels(run)
    return f"{labels['run']}/{labels['trial']}".rstrip("/")


class Shown:
    """What Prometheus sees of a run on this worker; worker 0 tells what all share.

    Args:
        gpus: that this worker holds.
        rows: of the validations so far.
    """

    PERIOD_S = 2.0

    def __init__(
        self, run: Store, place: Place, gpus: float, rows: Sequence[ValidationRow] = ()
    ) -> None:
        labels = runs.metric_labels(run)
        self.clock = Clock(place.device)
        self._run, self._gpus = {"run": labels["run"]}, gpus
        self._images = meters.Counter("dra_train_images", [self._run])
        self._gpu_s = meters.Counter("dra_train_gpu_seconds", [self._run])
        self._told_at = time.monotonic()
        self._gauges: meters.Gauges | None = None
        if place.rank == 0:
            self._seconds = meters.Counter(
                "dra_train_step_seconds", [self._run | {"part": part} for part in PARTS]
            )
            self._gauges = meters.Gauges(labels)
            for row in rows[-1:]:
                self.validated(row)

    def stepped(self, images: int, step: int) -> None:
        """`step` steps are done, the last with `images` images on this worker."""
        self._images.add(images, self._run)
        if time.monotonic() - self._told_at >= self.PERIOD_S:
            self._tell()
        if self._gauges is not None:
            self._gauges.set("dra_train_step", step)

    def _tell(self) -> None:
        now = time.monotonic()
        self._gpu_s.add((now - self._told_at) * self._gpus, self._run)
        self._told_at = now
        parts = self.clock.split()
        if self._gauges is not None:
            for part, seconds in parts.items():
                self._seconds.add(seconds, self._run | {"part": part})

    def losses(self, parts: Sequence[float]) -> None:
        """Of a step, in the order of `training.step.PARTS`, with that of distillation if any."""
        if self._gauges is not None:
            for name, value in zip(LOSSES, parts, strict=False):
                self._gauges.set("dra_train_loss", value, part=name)

    def validated(self, row: ValidationRow) -> None:
        if self._gauges is not None:
            self._gauges.set("dra_train_accuracy", row.clean_accuracy, kind="clean")
            self._gauges.set("dra_train_accuracy", row.robust_accuracy, kind="robust")

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a device that failed has ended the run already
            self._tell()
        if self._gauges is not None:
            self._gauges.close()


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The training loop (DM-AT, arXiv 2302.04638; alignment: arXiv 2602.19931, section 4.2)."""

    experiment: config.Experiment
    run_folder: Store
    place: Place
    session: Session
    epoch_steps: int

    def run(
        self,
        state: State,
        feed: Feed,
        validation: Pictures,
        shown: Shown,
        beside: judging.Beside,
    ) -> None:
        experiment, run, place = self.experiment, self.run_folder, self.place
        optim, resources, selection = experiment.optim, experiment.resources, experiment.selection
        epoch_steps, total_steps = self.epoch_steps, optim.epochs * self.epoch_steps
        log = StepLog(run, state.step, optim.batch, epoch_steps) if place.rank == 0 else None
        validated = Rows(run, state.rows) if place.rank == 0 else None
        start, already_s = time.monotonic(), _elapsed_s(state)
        interruptions = Interruptions(run.uri, self.session, place)
        if state.unjudged and beside.has_room():  # of a run that was interrupted
            beside.begin(state)
        while state.step < total_steps:
            epoch = state.step // epoch_steps
            rate, momentum = schedule.at(state.step, epoch_steps, optim)
            optimisers.set_rate(state.optimizer, rate, momentum)
            with shown.clock.part("step"):
                batch = feed.take(state.step)
                parts = step(state, experiment, batch, place.mine, epoch, shown.clock)
            state.sums.add(parts)
            state.step += 1
            if optim.averaging == "step":
                decay = averaging.decay(
                    state.step,
                    optim.averaging_warmup * total_steps,
                    optim.averaging_decay,
                    optim.averaging_ramp,
                )
                averaging.update(state.average, state.student, decay)
            shown.stepped(place.mine.stop - place.mine.start, state.step)

            if state.step % resources.metrics_steps == 0:
                now = losses.of_batch(parts, place.mine, optim.batch).tolist()
                shown.losses(now)
                if log:
                    log.write(state.step, now, rate)
                if not all(map(math.isfinite, now)):
                    _stop(run, state, place.rank, f"the loss is {now[0]} at step {state.step}")
                    return
            stop, notice = interruptions.after(state.step)
            if validated:
                validated.look()
            due = resources.checkpoint_steps and state.step % resources.checkpoint_steps == 0
            if state.step % epoch_steps == 0:
                _end_epoch(state, optim, epoch)
                if (epoch + 1) % selection.every_epochs == 0 or epoch + 1 == optim.epochs:
                    elapsed_s = already_s + time.monotonic() - start
                    facts = _facts(experiment, place, state, epoch_steps, lr=rate)
                    if facts is None:
                        where = f"at step {state.step}"
                        _stop(run, state, place.rank, f"the loss or a weight is not finite {where}")
                        return
                    for row in self._validations(state, facts, elapsed_s, validation, beside):
                        shown.validated(row)
                    if log:
                        log.flush()
                    if validated:
                        validated.checkpoint(state.step)
                    told = {"step": state.step} if state.unjudged else state.rows[-1].on_disk()
                    self.session.report(state, told, at_once=notice or stop)
                    if stop:
                        return
                    continue
            if due or notice or stop:
                state.sums.agree(place.mine, optim.batch)
                if log:
                    log.flush()
                self.session.report(state, {"step": state.step}, at_once=notice or stop)
            if stop:
                return

    def _validations(
        self,
        state: State,
        facts: dict[str, Any],
        elapsed_s: float,
        validation: Pictures,
        beside: judging.Beside,
    ) -> Iterator[ValidationRow]:
        """The rows whose verdicts are there after the epoch that has just ended: that of the
        validation before, where a task had it, and this one's, unless a task takes it.
        """
        if state.unjudged:
            yield self._settled(state, beside)
        experiment = self.experiment
        students = judging.candidates(state, experiment)
        if facts["epoch"] < experiment.optim.epochs and beside.has_room():
            facts["elapsed_s"] = round(elapsed_s, 3)
            state.unjudged = Unjudged(facts, judging.copied(students))
            beside.begin(state)
            return
        began = time.monotonic()
        judged = judging.judge(students, experiment, validation, self.place)
        took_s = time.monotonic() - began
        facts["elapsed_s"] = round(elapsed_s + took_s, 3)
        row = judging.row_of(facts, judged, experiment, took_s)
        self._keep(state, row, students[judged.weights].state_dict())
        yield row

    def _settled(self, state: State, beside: judging.Beside) -> ValidationRow:
        """The row of `state.unjudged`, which is none any more."""
        assert state.unjudged is not None
        judged, took_s = beside.end(state)
        row = judging.row_of(state.unjudged.facts, judged, self.experiment, took_s)
        self._keep(state, row, state.unjudged.weights[judged.weights])
        state.unjudged = None
        return row

    def _keep(self, state: State, row: ValidationRow, weights: Mapping[str, Tensor]) -> None:
        """A row, and the weights that it is of where they are the best so far."""
        state.rows.append(row)
        if self.place.rank == 0 and row.robust_accuracy >= state.best:
            checkpoint.save(self.run_folder, weights)
        state.best = max(state.best, row.robust_accuracy)


class Interruptions:
    """Who wants this run to pause or to save: a stop that was asked for, nodes that will be taken
    away.

    All workers must stop after the same step, so they agree on worker 0's answer. That costs a
    message among them and a question to the head node, about 1 ms: nothing beside a step of
    seconds, a tenth of a small student's. So steps that are much shorter than PERIOD_S share a
    question.
    """

    PERIOD_S = 0.5

    def __init__(self, run: str, session: Session, place: Place) -> None:
        self._run, self._session, self._place = run, session, place
        self._leaving: frozenset[str] = frozenset()
        self._every = 1  # steps; the same for all workers
        self._next: int | None = None
        self._asked_at = time.monotonic()

    def after(self, step: int) -> tuple[bool, bool]:
        """(whether to stop, whether there is a new notice about nodes) after `step` steps."""
        if self._next is not None and step < self._next:
            return False, False
        now = time.monotonic()
        step_s = (now - self._asked_at) / self._every if self._next is not None else self.PERIOD_S
        every = max(1, min(1000, int(self.PERIOD_S / max(step_s, 1e-6))))
        stop = self._place.rank == 0 and cluster.is_asked_to_stop(self._run)
        leaving = self._session.leaving()
        answer = torch.tensor(
            [stop, leaving != self._leaving, every], dtype=torch.float32, device=self._place.device
        )
        workers.share_([answer])
        agreed = answer.tolist()
        self._leaving, self._every = leaving, int(agreed[2])
        self._next, self._asked_at = step + self._every, now
        return bool(agreed[0]), bool(agreed[1])


def _elapsed_s(state: State) -> float:
    """What the training took up to the newest validation of its checkpoint."""
    if state.unjudged:
        return float(state.unjudged.facts["elapsed_s"])
    return state.rows[-1].elapsed_s if state.rows else 0.0


def _facts(
    experiment: config.Experiment, place: Place, state: State, epoch_steps: int, *, lr: float
) -> dict[str, Any] | None:
    """A row of metrics.jsonl after the epoch that has just ended, without its verdicts and times;
    begins new sums. None where a loss or a weight is not finite.
    """
    batch, every = experiment.optim.batch, experiment.selection.every_epochs
    epochs_done = state.step // epoch_steps
    # the last validation may come sooner than `every` epochs after the one before
    since = ((epochs_done - 1) % every + 1) * epoch_steps
    losses_mean = state.sums.mean(since, place.mine, batch).tolist()
    if not all(map(math.isfinite, losses_mean)) or not state.finite():
        return None
    state.sums.clear()
    loss, loss_clean, loss_robust, loss_align, *others = losses_mean
    facts = {
        "step": state.step,
        "epoch": epochs_done,
        "images_seen": state.step * batch,
        "loss": loss,
        "loss_clean": loss_clean,
        "loss_robust": loss_robust,
        "loss_align": loss_align,
        "lr": lr,
    }
    return facts | ({"loss_distill": others[0]} if others else {})


def _end_epoch(state: State, optim: config.Optim, epoch: int) -> None:
    """What happens once an epoch: the average takes the BatchNorm statistics over, and IKL's class
    means change.
    """
    if optim.averaging == "epoch":
        averaging.update_all(state.average, state.student, optim.averaging_decay if epoch else 0.0)
    else:
        if optim.averaging == "none":
            averaging.update(state.average, state.student, 0.0)
        averaging.copy_buffers(state.average, state.student)
    state.class_means.end_epoch()


class StepLog:
    """`steps.jsonl`: loss, rate and speed at every k-th step; a resumed run keeps the rows up to
    its checkpoint.
    """

    def __init__(self, run: Store, step: int, batch: int, epoch_steps: int) -> None:
        self.batch, self.epoch_steps = batch, epoch_steps
        self.log = runs.Log(run / runs.STEPS, StepRow, keep=lambda row: row.step <= step)
        self.last = (step, time.monotonic())

    def write(self, step: int, parts: list[float], rate: float) -> None:
        (before, then), now = self.last, time.monotonic()
        self.last = (step, now)
        speed = (step - before) * self.batch / max(now - then, 1e-9)
        loss, loss_clean, loss_robust, loss_align, *others = parts
        row = StepRow(
            step=step,
            epoch=round(step / self.epoch_steps, 3),
            loss=loss,
            loss_clean=loss_clean,
            loss_robust=loss_robust,
            loss_align=loss_align,
            lr=rate,
            images_per_s=round(speed, 2),
            at=time.time(),
            **({"loss_distill": others[0]} if others else {}),
        )
        try:
            self.log.append(row)
        except StorageError as error:
            logger.warning("%s; training goes on, and the next row brings this one", error)

    def flush(self) -> None:
        """Before a checkpoint, from which a resumed run goes on without making these rows again;
        `StorageError` where the checkpoint could not be written either.
        """
        self.log.flush()


def _stop(run: Store, state: State, rank: int, why: str) -> None:
    """End the run without a retry, which would end alike: the driver turns this into an error."""
    if rank == 0:
        good = (
            f"the last good checkpoint, of step {state.rows[-1].step}, is in "
            f"'{run / runs.CHECKPOINTS}'"
            if state.rows
            else "no checkpoint was written yet"
        )
        why = f"{why}; {good}; lower optim.lr or set optim.clip_norm"
        runs.update_manifest(run, runs.Facts(stopped=why))


def _record_start(run: Store, at_step: int, world: int, device: torch.device, origin: str) -> None:
    """Every start: BatchNorm sees the per-worker batch, so the number of workers is part of what a
    run did; so is the device.
    """
    now = runs.utc_now()
    history = [
        *_manifest(run).world_sizes,
        runs.WorldSize(step=at_step, workers=world, at=now),
    ]
    runs.update_manifest(
        run,
        runs.Facts(
            world_sizes=history,
            started_at=now,
            weights=origin,
            device=arithmetic.facts(device),
        ),
    )
