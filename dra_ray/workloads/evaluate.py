"""Clean, PGD and AutoAttack accuracy of any classifier: every batch of every attack is a Ray task
and a checkpoint.

The verdicts are those of one AutoAttack process with the same seed and batch, to the bit (see
attacks/autoattack.py), whatever the number of workers, and however often the evaluation was killed
and started again. In the subject's folder, which is `<run>/evaluation` for a run:

    chunks/<stage>-<k>.npz    one batch each, with a digest of all it depends on; in batch-<n>/
                              where the batch had to shrink
    autoattack.json           the result, as `evaluate` returns it
    per_sample.npz            clean_correct, pgd_correct, robust, after_<attack> (bool [N]);
                              first_failure ("" for robust); labels
    adversarial.npz           images float32 [N,C,H,W]: what fooled the student, else the clean
                              image
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import ray
import torch
from torch import Tensor, nn

from dra_ray import cluster, config, meters, runs
from dra_ray.attacks.pgd import noise_like
from dra_ray.attacks.plan import Chunk
from dra_ray.config import catalogue
from dra_ray.config.catalogue import STANDARD, Effort
from dra_ray.data import corruptions
from dra_ray.errors import ConfigError, DataError, DraError, RunError
from dra_ray.evaluation import batches, result, subjects, verdicts
from dra_ray.evaluation.batches import Arrays, Kind, Work
from dra_ray.evaluation.result import FILE, Result
from dra_ray.evaluation.subjects import Subject
from dra_ray.evaluation.verdicts import Verdicts
from dra_ray.runs import EvaluationProgress, versions
from dra_ray.storage import Store, large, sha256
from dra_ray.workloads.tasks import Tasks

log = logging.getLogger("dra_ray")
# stages beside AutoAttack's own
CLEAN, CURVE = catalogue.CLEAN.name, catalogue.CURVE.name
CORRUPTIONS = catalogue.CORRUPTIONS.name
KINDS: dict[str, Kind] = {CLEAN: "clean", CURVE: "radius", CORRUPTIONS: "corrupted"}
MAX_RETRIES = 3  # of a task whose worker or node died
AGAIN = "evaluate it again to go on with the missing batches"
SHRUNK = (
    "A batch of {configured} images did not fit the GPU, so all were attacked in batches of "
    "{batch}: another reference configuration, whose verdicts may differ on a few images."
)

Progress = Callable[[EvaluationProgress], None]
Batch = Callable[[nn.Module, Work, Store, str], Arrays]
# corruption, severity, images uint8 [n,C,H,W] (clean where the worker corrupts them)
Pictures = tuple[str, int, Tensor]
table = verdicts.table


def evaluate(
    subject: Store | Subject,
    workers: int | None = None,
    progress: Progress | None = None,
    effort: Effort = STANDARD,
) -> Result:
    """Evaluate one training run or other subject; see `evaluate_many`."""
    return evaluate_many([subject], workers, progress, effort)[0]


def evaluate_many(
    evaluated: list[Store] | list[Subject] | list[Store | Subject],
    workers: int | None = None,
    progress: Progress | None = None,
    effort: Effort = STANDARD,
    batch: Batch = batches.run,
    quiet: bool = False,
) -> list[Result]:
    """Evaluate training runs and other subjects at the same time on the Ray cluster that the caller
    has joined.

    The models share the workers, so that none idles while the last batch of one model's attack is
    running. A finished evaluation of the same weights and settings is returned as stored; an
    interrupted one goes on where it was. A model whose batch does not fit a GPU starts over with
    half of it, and its result says so.

    Args:
        workers: batches attacked at the same time; default: the largest `evaluation.workers` of the
            subjects.
        progress: called after each batch.
        effort: anything but the default is quicker, is no standard AutoAttack, and is flagged as
            such.
        batch: what a task does with a batch; anything else than the default is for measuring the
            driver.
        quiet: say nothing of the wait for the first batch.

    Raises:
        CheckpointError, ConfigError, DataError: for what cannot be evaluated.
        RunError: when a batch failed for good; the same call goes on with the missing batches.
    """
    jobs = [
        _Job(subjects.of_run(one) if isinstance(one, Store) else one, effort, batch)
        for one in evaluated
    ]
    if not quiet:
        log.info("waiting for the first batch of the evaluation")
    missing = [job for job in jobs if job.result is None]
    if missing:
        if workers is None:
            workers = max(job.evaluation.workers for job in missing)
        _drive(missing, workers, progress or (lambda row: None))
    return [job.finish() for job in jobs]


# -- the driver: one loop over all models ----------------------------------------------------------
def _drive(jobs: list[_Job], workers: int, progress: Progress) -> None:
    if workers < 1:
        raise ConfigError(f"workers={workers}: an evaluation needs at least 1")
    cluster.require(1, 1, max(job.gpus for job in jobs), "an evaluation")

    def submit() -> tuple[ray.ObjectRef[Any], tuple[_Job, Chunk]] | None:
        job = _next(jobs)
        if job is None:
            return None
        chunk = job.take()
        return job.submit(chunk), (job, chunk)

    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(meters.gauges(job.metric_labels, job.show))
        tasks = stack.enter_context(Tasks[tuple[_Job, Chunk]](workers))
        for ref, (job, chunk) in tasks.finished(submit):
            try:
                outcome = _outcome(ref, job, chunk)
            except torch.OutOfMemoryError:
                # its other batches have the size that does not fit, so what they find is of no use
                tasks.cancel(functools.partial(_belongs, job))
                job.start_over()
                continue
            job.absorb(chunk, outcome)
            progress(job.row(chunk))


def _next(jobs: list[_Job]) -> _Job | None:
    """The model with the most left to do among those that have a batch ready."""
    for job in jobs:
        job.advance()
    return min(
        (job for job in jobs if job.ready),
        key=lambda job: (job.stages_done, -job.ready),
        default=None,
    )


def _belongs(job: _Job, key: tuple[_Job, Chunk]) -> bool:
    return key[0] is job


def _outcome(ref: ray.ObjectRef[Any], job: _Job, chunk: Chunk) -> Arrays:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DraError | torch.OutOfMemoryError):
            raise error.cause from None
        raise RunError(
            f"evaluation of '{job.name}': {chunk.name} failed ({error.cause!r}); {AGAIN}"
        ) from error
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"evaluation of '{job.name}': {chunk.name} was lost ({reason}); {AGAIN}"
        ) from error


@ray.remote(num_cpus=1, max_retries=MAX_RETRIES)
def _attack(batch: Batch, student: nn.Module, work: Work, file: Store, digest: str) -> Arrays:
    # by reference: Ray pickles a remote function's own globals by value
    return batch(student, work, file, digest)


@contextmanager
def _by_value(code: tuple[ModuleType, ...]) -> Iterator[None]:
    """Meanwhile, these modules' classes are pickled with their code, since other machines may not
    have the files.
    """
    for module in code:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in code:
            ray.cloudpickle.unregister_pickle_by_value(module)


class _Job:
    """One model's way through clean images, PGD and the attacks, with further radii and corruptions
    to fill the gaps.
    """

    def __init__(self, subject: Subject, effort: Effort, batch: Batch) -> None:
        self.subject, self.effort, self._do = subject, effort, batch
        self.name, self.folder = subject.name, subject.folder
        self.evaluation, self.threat = subject.experiment.evaluation, subject.experiment.threat
        self.gpus = subject.experiment.resources.gpus_per_worker
        self.device = "cuda" if self.gpus else "cpu"
        self.images, self.labels = subject.images, subject.labels
        self.started = time.monotonic()
        self.tasks_run = 0
        self.settings = self._settings()
        self.digest = _sha256(self.settings)
        self.result = self._stored_result()
        self._ref: ray.ObjectRef[Any] | None = None
        self._begin(self.evaluation.batch)

    def _settings(self) -> dict[str, Any]:
        """What the result depends on, but for versions and machine."""
        return self.evaluation.model_dump(mode="json", exclude={"workers"}) | {
            "weights": _digest(self.subject.student),
            "code": self.subject.source.get("code", {}),
            "images": _hash(self.images),
            "labels": _hash(self.labels),
            "threat": {"norm": self.threat.norm, "eps_255": self.threat.eps_255},
            "pgd_start": self.threat.start,
            "effort": dataclasses.asdict(self.effort),
        }

    def _stored_result(self) -> Result | None:
        file = self.folder / FILE
        if not (file.exists() and (self.folder / "per_sample.npz").exists()):
            return None
        stored = file.read_json()
        if isinstance(stored, dict) and stored.get("digest") == self.digest:
            return result.parse(stored, file)
        if self.subject.keep:
            raise ConfigError(
                f"--to '{self.folder}' holds the result of another model or of other settings; "
                "give another folder"
            )
        return None

    def _begin(self, batch: int) -> None:
        """Before the first stage, with nothing known."""
        self.batch = batch
        self.verdicts = Verdicts(len(self.labels), self.evaluation.curve_255)
        self.resumed = 0
        self._stage, self._over = "", False  # of AutoAttack, clean images included
        self._main: list[Chunk] = []  # of the stage that is being done
        self._beside: list[Chunk] = []  # for whoever is free at a barrier
        self._of: Counter[str] = Counter()  # batches of each stage, and how many of them are done
        self._done: Counter[str] = Counter()
        self._pictures: dict[int, Pictures] = {}
        source = self.evaluation.corruptions
        self._sets = self._corrupted(source) if source and self.result is None else iter(())

    def start_over(self) -> None:
        """With half the batch, after one did not fit."""
        if self.batch == 1:
            raise RunError(
                f"evaluation of '{self.name}': not even one image fits the GPU's memory; take a "
                "larger GPU"
            )
        self._begin(self.batch // 2)

    # -- what can be done now ----------------------------------------------------------------------
    @property
    def ready(self) -> int:
        """Batches that can start now."""
        return len(self._main) + len(self._beside)

    @property
    def stages_done(self) -> int:
        return len(self.verdicts.plan.robust_after) + 1 if self.verdicts.plan else 0

    def take(self) -> Chunk:
        return (self._main or self._beside).pop(0)

    def advance(self) -> None:
        """At a barrier, make the next batches ready and take those that are already stored; after
        the last, finish.
        """
        while not self._over and self._done[self._stage] == self._of[self._stage]:
            chunks = self._next_stage()
            self._over = not chunks
            self._offer(chunks, self._main)
        while self.verdicts.plan and not self.ready and (pictures := next(self._sets, None)):
            self._offer([self._corruption(pictures)], self._beside)
        if self._over and not self.ready and self._done == self._of:
            self.finish()

    def _next_stage(self) -> list[Chunk]:
        everyone = torch.arange(len(self.labels))
        if not self._stage:
            self._stage = CLEAN
            return [Chunk(CLEAN, k, part) for k, part in enumerate(everyone.split(self.batch))]
        if self.verdicts.plan is None:
            self.verdicts.begin_attacks(self.images, self.batch, self.evaluation)
            parts = [part for _ in self.verdicts.curve for part in everyone.split(self.batch)]
            self._offer([Chunk(CURVE, k, part) for k, part in enumerate(parts)], self._beside)
        assert self.verdicts.plan
        chunks = self.verdicts.plan.chunks()
        self._stage = chunks[0].attack if chunks else self._stage
        return chunks

    def _corrupted(self, source: str) -> Iterator[Pictures]:
        """Files are read one after the other; corruptions that are generated, the workers make."""
        pictures = large.empty(self.images.shape, torch.uint8)
        for rows in torch.arange(len(pictures)).split(self.batch):
            pictures[rows] = (self.images[rows] * 255).round().to(torch.uint8)
        if source == corruptions.MADE:
            return (
                (name, severity, pictures)
                for name in corruptions.GENERATED
                for severity in corruptions.SEVERITIES
            )
        sets = corruptions.sets(source, pictures, self.labels, self.evaluation.seed)
        first = next(sets)  # fail now rather than after hours of attacks
        return (
            (name, severity, images) for name, severity, images, _ in itertools.chain([first], sets)
        )

    def _corruption(self, pictures: Pictures) -> Chunk:
        k = self._of[CORRUPTIONS]
        self._pictures[k] = pictures
        return Chunk(CORRUPTIONS, k, torch.arange(len(pictures[2])))

    def _offer(self, chunks: list[Chunk], queue: list[Chunk]) -> None:
        for chunk in chunks:
            self._of[chunk.attack] += 1
            stored = self._stored_chunk(chunk)
            if stored is None:
                queue.append(chunk)
            else:
                self.resumed += 1
                self._absorb(chunk, stored)

    @property
    def metric_labels(self) -> dict[str, str]:
        """Of its metrics: those of the run, or of the folder that it is evaluated to."""
        uri = self.folder.resolved().uri.rstrip("/").removesuffix(f"/{runs.EVALUATION}")
        return runs.metric_labels(Store(uri))

    def show(self, gauges: meters.Gauges) -> None:
        """Called by a thread of its own."""
        for stage, batches_ in self._of.copy().items():
            gauges.set("dra_evaluation_batches", batches_, stage=stage)
            gauges.set("dra_evaluation_batches_done", self._done[stage], stage=stage)

    # -- one batch ---------------------------------------------------------------------------------
    def _stored_chunk(self, chunk: Chunk) -> Arrays | None:
        key = self._key(chunk)
        for folder in (self.folder, self.subject.beside):
            if folder is None or not (file := self._file(folder, chunk)).exists():
                continue
            try:
                stored = file.read_npz()
            except DataError:  # half a disk's worth of npz is worth nothing: make it again
                continue
            if str(stored.get("digest")) == key:
                return stored
        return None

    def _file(self, folder: Store, chunk: Chunk) -> Store:
        shrunk = "" if self.batch == self.evaluation.batch else f"batch-{self.batch}/"
        return folder / f"chunks/{shrunk}{chunk.name}.npz"

    def _key(self, chunk: Chunk) -> str:
        """Digest of all that the batch's arrays depend on, to the bit, and of nothing else."""
        used = ["weights", "code", "images", "labels", "seed"]
        what: dict[str, Any] = {}
        if chunk.attack == CORRUPTIONS:
            name, severity, images = self._pictures[chunk.k]
            what = {
                "corruption": name,
                "severity": severity,
                "made": self.evaluation.corruptions == corruptions.MADE,
                "pictures": _hash(images),
            }
            used += ["batch"]
        elif chunk.attack in (CLEAN, CURVE):
            used += ["pgd_steps", "pgd_restarts", "pgd_start", "eot", "version", "threat"]
            what = {"radius": self._threat(chunk).eps_255}
        else:
            used += ["threat", "effort", "version", "level", "streams"]
        settings = {name: self.settings[name] for name in used}
        return _sha256(
            settings
            | what
            | {"attack": chunk.attack, "indices": chunk.indices.tolist(), "bits": self._bits}
        )

    @functools.cached_property
    def _bits(self) -> dict[str, str]:
        """What decides the last bits, as far as the driver can know it."""
        installed = versions()
        names = ("dra-ray", "torch", "pyautoattack", "machine")
        return {name: installed[name] for name in names} | {"device": self.device}

    def _threat(self, chunk: Chunk) -> config.Threat:
        """That of the batch: a radius of the curve has its own."""
        if chunk.attack != CURVE:
            return self.threat
        radius = self._radius(chunk)
        return self.threat.model_copy(update={"eps_255": radius, "step_255": radius / 4})

    def _radius(self, chunk: Chunk) -> float:
        return self.evaluation.curve_255[chunk.k // self._parts]

    @property
    def _parts(self) -> int:
        return math.ceil(len(self.labels) / self.batch)

    def submit(self, chunk: Chunk) -> ray.ObjectRef[Any]:
        if self._ref is None:
            with _by_value(self.subject.code):
                self._ref = ray.put(self.subject.student)
        task = _attack.options(
            **cluster.placed(self.subject.experiment.resources), name=f"{self.name}:{chunk.name}"
        )
        return task.remote(
            self._do, self._ref, self._work(chunk), self._file(self.folder, chunk), self._key(chunk)
        )

    def _work(self, chunk: Chunk) -> Work:
        at = chunk.indices
        kind = KINDS.get(chunk.attack, "attack")
        evaluation = self.evaluation.model_copy(update={"batch": self.batch})
        work = Work(
            images=self.images[at],
            labels=self.labels[at],
            kind=kind,
            attack=chunk.attack,
            threat=self._threat(chunk),
            evaluation=evaluation,
            effort=self.effort,
            device=self.device,
            numbers=at,
        )
        if kind == "corrupted":
            name, severity, images = self._pictures[chunk.k]
            return dataclasses.replace(work, images=images, corruption=(name, severity))
        if kind == "attack":
            return work
        return dataclasses.replace(work, noise=self._noise[:, at], first=chunk.k == 0)

    @functools.cached_property
    def _noise(self) -> Tensor:
        """PGD's starts: float [restarts,N,C,H,W], each as one process draws it for all images."""
        generator = torch.Generator().manual_seed(self.evaluation.seed)
        shape = self.images.shape
        noise = large.empty((self.evaluation.pgd_restarts, *shape))
        for start in noise:
            noise_like(shape, self.threat, generator, out=start)
        return noise

    def absorb(self, chunk: Chunk, outcome: Arrays) -> None:
        """Take the outcome of a task."""
        self.tasks_run += 1
        self._absorb(chunk, outcome)

    def _absorb(self, chunk: Chunk, outcome: Arrays) -> None:
        self._done[chunk.attack] += 1
        self.verdicts.spend(chunk.attack, outcome)
        if chunk.attack == CLEAN:
            self.verdicts.take_clean(chunk, outcome)
        elif chunk.attack == CURVE:
            self.verdicts.take_radius(self._radius(chunk), chunk, outcome)
        elif chunk.attack == CORRUPTIONS:
            name, severity, _ = self._pictures.pop(chunk.k)
            self.verdicts.corrupted.append((name, severity, float(outcome["correct"].mean())))
        else:
            self.verdicts.take_attack(chunk, outcome)

    def row(self, chunk: Chunk) -> EvaluationProgress:
        """The row that `progress` gets after a batch."""
        stage = chunk.attack
        return EvaluationProgress(
            run=self.name,
            attack=stage,
            done=self._done[stage],
            of=self._of[stage],
            robust=self.verdicts.standing,
            images=len(self.labels),
            seconds=self.verdicts.seconds[stage],
            stages=self._stages(),
        )

    def _stages(self) -> list[str]:
        """All that there may be; attacks are left out once nobody is left."""
        named = [
            CLEAN,
            *catalogue.attacks(
                self.verdicts.num_classes or catalogue.DEFAULT_CLASSES,
                self.evaluation.version,
                self.evaluation.level,
            ),
        ]
        return (
            named
            + [CURVE] * bool(self.verdicts.curve)
            + [CORRUPTIONS] * bool(self.evaluation.corruptions)
        )

    # -- the result --------------------------------------------------------------------------------
    def finish(self) -> Result:
        """The result; written once, the JSON file last."""
        if self.result is None:
            assert self.verdicts.plan
            self.result = self._result()
            labels = self.labels.numpy()
            (self.folder / "adversarial.npz").write_npz(
                images=self.verdicts.plan.adversarial.numpy(), labels=labels
            )
            (self.folder / "per_sample.npz").write_npz(**self.verdicts.per_sample(), labels=labels)
            (self.folder / FILE).write_json(self.result.tree())
        return self.result

    def _result(self) -> Result:
        """The summary and how it came about."""
        summary = self.verdicts.summary(self.evaluation, self.threat, self.effort).given()
        summary["flags"] = [*summary["flags"], *self.subject.notes]
        if self.batch != self.evaluation.batch:
            summary["flags"].append(
                SHRUNK.format(configured=self.evaluation.batch, batch=self.batch)
            )
        return Result(
            **summary,
            batch=self.batch,
            batch_asked=self.evaluation.batch,
            subject=self.subject.source,
            settings=self.settings | {"batch": self.batch},
            effort=self.settings["effort"],
            elapsed_s=round(time.monotonic() - self.started, 3),
            resumed_batches=self.resumed,
            tasks_run=self.tasks_run,
            tasks=dict(self._of),
            versions=versions(),
            digest=self.digest,
        )


# -- digests ---------------------------------------------------------------------------------------
def _digest(student: nn.Module) -> str:
    """SHA-256 of a student: its modules' settings and every parameter and buffer, saved in
    checkpoints or not.
    """
    # addresses of functions differ in every process
    settings = re.sub(r" at 0x[0-9a-f]+", "", repr(student))
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(
        [*student.named_parameters(), *student.named_buffers()], key=lambda pair: pair[0]
    ):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _sha256(tree: Mapping[str, Any]) -> str:
    return sha256(json.dumps(tree, sort_keys=True).encode())
