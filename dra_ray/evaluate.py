"""Clean, PGD and AutoAttack accuracy of trained runs: every batch of every attack is a Ray task and a checkpoint.

The verdicts are those of one AutoAttack process with the same seed and batch, to the bit (see robust/autoattack.py),
whatever the number of workers, and however often the evaluation was killed and started again. Below `<run>/evaluation`:

    chunks/<attack>-<k>.npz   one batch each, with a digest of all it depends on
    autoattack.json           the result, as `evaluate` returns it
    per_sample.npz            clean_correct, pgd_correct, robust (bool [N]); first_failure ("" for robust); labels
    adversarial.npz           images float32 [N,C,H,W]: what fooled the student, else the clean image
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from dra_ray import cluster, config, data
from dra_ray.analysis.intervals import wilson
from dra_ray.errors import ConfigError, DataError, DraError, RunError
from dra_ray.models import checkpoint
from dra_ray.robust import autoattack
from dra_ray.robust.attacks import evaluate_pgd, noise_like
from dra_ray.robust.autoattack import STANDARD, Chunk, Effort, Plan
from dra_ray.storage import Store, sha256, versions

CLEAN = "clean"  # the stage before the four attacks: clean accuracy, PGD, warning flags
MAX_RETRIES = 3  # of a task whose worker or node died
AGAIN = "evaluate it again to go on with the missing batches"

Arrays = dict[str, np.ndarray]
Progress = Callable[[dict[str, Any]], None]


def evaluate(run: Store, workers: int | None = None, progress: Progress | None = None, effort: Effort = STANDARD) -> dict[str, Any]:
    """Evaluate one training run; see `evaluate_many`."""
    return evaluate_many([run], workers, progress, effort)[0]


def evaluate_many(runs: list[Store], workers: int | None = None, progress: Progress | None = None, effort: Effort = STANDARD) -> list[dict[str, Any]]:
    """Evaluate training runs at the same time on the Ray cluster that the caller has joined.

    The models share the workers, so that none idles while the last batch of one model's attack is running. A finished
    evaluation of the same weights and settings is returned as stored; an interrupted one goes on where it was.

    Args:
        workers: batches attacked at the same time; default: the largest `evaluation.workers` of the runs.
        progress: called with {"run", "attack", "done", "of" (batches), "robust", "images", "seconds"} after each batch;
            "robust" counts the images not fooled so far.
        effort: anything but the default is quicker, is no standard AutoAttack, and is flagged as such.

    Raises:
        CheckpointError, DataError: for runs that cannot be evaluated.
        RunError: when a batch failed for good; the same call goes on with the missing batches.
    """
    jobs = [_Job(run.resolved(), effort) for run in runs]
    missing = [job for job in jobs if job.result is None]
    if missing:
        wanted = max(job.experiment.evaluation.workers for job in missing) if workers is None else workers
        _drive(missing, wanted, progress or (lambda row: None))
    return [job.finish() for job in jobs]


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows {"what", "accuracy", "interval"} for printing: clean, PGD, after each attack, AutoAttack."""
    named = {"Clean": result["clean_accuracy"], f"PGD-{result['pgd_steps']}": result["pgd_accuracy"]}
    named |= {f"after {attack}": accuracy for attack, accuracy in list(result["after_attack"].items())[:-1]}
    named["AutoAttack"] = result["autoattack_accuracy"]
    return [{"what": what, "accuracy": accuracy, "interval": _interval(accuracy, result["images"])} for what, accuracy in named.items()]


def _interval(accuracy: float, images: int) -> list[float]:
    return list(wilson(round(accuracy * images), images))


# -- the driver: one loop over all models --------------------------------------------------------------------------
def _drive(jobs: list[_Job], workers: int, progress: Progress) -> None:
    if workers < 1:
        raise ConfigError(f"workers={workers}: an evaluation needs at least 1")
    gpus = max(job.experiment.resources.gpus_per_worker for job in jobs)
    cluster.require(1, 1, gpus, "an evaluation")
    running: dict[ray.ObjectRef, tuple[_Job, Chunk]] = {}
    try:
        while True:
            for job in jobs:
                job.advance()
            while len(running) < workers and (free := _behind(jobs)):
                chunk = free.ready.pop(0)
                running[free.submit(chunk)] = (free, chunk)
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            job, chunk = running.pop(done)
            job.absorb(chunk, _outcome(done, job, chunk))
            progress(job.row(chunk))
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _behind(jobs: list[_Job]) -> _Job | None:
    """The model with the most left to do among those that have a batch ready."""
    return min((job for job in jobs if job.ready), key=lambda job: (job.stages_done, -len(job.ready)), default=None)


def _outcome(ref: ray.ObjectRef, job: _Job, chunk: Chunk) -> Arrays:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DraError):
            raise error.cause from None
        raise RunError(f"evaluation of '{job.run}': {chunk.name} failed ({error.cause!r}); {AGAIN}") from error
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"evaluation of '{job.run}': {chunk.name} was lost ({reason}); {AGAIN}") from error


class _Job:
    """One model's way through clean images, PGD and the attacks; `ready` holds the batches that can start now."""

    def __init__(self, run: Store, effort: Effort) -> None:
        self.run, self.effort = run, effort
        self.started = time.monotonic()
        self.folder = run / "evaluation"
        self.student, self.experiment = checkpoint.load(run)
        test = data.in_memory(data.load(self.experiment.data).test)
        self.images, self.labels = data.to_float(test.images), test.labels
        self.device = "cuda" if self.experiment.resources.gpus_per_worker else "cpu"
        self.weights = _digest(self.student)
        self.settings = self._settings()
        self.digest = _sha256(self.settings)
        self.result = self._stored_result()
        self.ready: list[Chunk] = []
        self.seconds: dict[str, float] = {}
        self.resumed = 0
        self._of, self._done, self._num_classes = 0, 0, 0
        self._clean, self._pgd = torch.zeros(len(self.labels), dtype=torch.bool), torch.zeros(len(self.labels), dtype=torch.bool)
        self._plan: Plan | None = None
        self._flags: list[str] = []
        self._numerics: dict[str, Any] = {}
        self._ref: ray.ObjectRef | None = None

    def _settings(self) -> dict[str, Any]:
        """What the result depends on, but for versions and machine."""
        evaluation, threat = self.experiment.evaluation, self.experiment.threat
        return {
            "weights": self.weights,
            "images": _hash(self.images),
            "labels": _hash(self.labels),
            "threat": {"norm": threat.norm, "eps_255": threat.eps_255},
            "seed": evaluation.seed,
            "batch": evaluation.batch,
            "pgd_steps": evaluation.pgd_steps,
            "effort": dataclasses.asdict(self.effort),
        }

    def _stored_result(self) -> dict[str, Any] | None:
        file = self.folder / "autoattack.json"
        if not (file.exists() and (self.folder / "per_sample.npz").exists()):
            return None
        stored = file.read_json()
        return stored if isinstance(stored, dict) and stored.get("digest") == self.digest else None

    @property
    def stages_done(self) -> int:
        return len(self._plan.robust_after) + 1 if self._plan else 0

    def advance(self) -> None:
        """At a barrier, make the next batches ready and take those that are already stored; after the last, finish."""
        while not self.ready and self._done == self._of:
            chunks = self._next()
            if not chunks:
                self.finish()
                return
            self._of, self._done = len(chunks), 0
            for chunk in chunks:
                stored = self._stored_chunk(chunk)
                if stored is None:
                    self.ready.append(chunk)
                else:
                    self.resumed += 1
                    self.absorb(chunk, stored)

    def _next(self) -> list[Chunk]:
        batch = self.experiment.evaluation.batch
        if self._plan is None and not self._of:
            return [Chunk(CLEAN, k, part) for k, part in enumerate(torch.arange(len(self.labels)).split(batch))]
        if self._plan is None:
            self._plan = Plan(self._clean, self.images, batch, self._num_classes)
        return self._plan.chunks()

    def _stored_chunk(self, chunk: Chunk) -> Arrays | None:
        file = self._file(chunk)
        if not file.exists():
            return None
        try:
            stored = file.read_npz()
        except DataError:  # half a disk's worth of npz is worth nothing: make it again
            return None
        return stored if str(stored.get("digest")) == self._key(chunk) else None

    def _file(self, chunk: Chunk) -> Store:
        return self.folder / "chunks" / f"{chunk.name}.npz"

    def _key(self, chunk: Chunk) -> str:
        """Digest of everything that the batch's arrays depend on, to the bit."""
        found = versions()
        bits = {name: found[name] for name in ("torch", "pyautoattack", "machine")} | {"device": self.device}
        return _sha256({**self.settings, "attack": chunk.attack, "indices": chunk.indices.tolist(), "bits": bits})

    def submit(self, chunk: Chunk) -> ray.ObjectRef:
        if self._ref is None:
            self._ref = ray.put(self.student)
        work = _Work(self.images[chunk.indices], self.labels[chunk.indices], chunk.attack, self.experiment, self.effort, self.device)
        if chunk.attack == CLEAN:
            work = dataclasses.replace(work, noise=self._noise()[chunk.indices], check=chunk.k == 0)
        task = _attack.options(num_gpus=self.experiment.resources.gpus_per_worker, name=f"{self.run.name}:{chunk.name}")
        return task.remote(self._ref, work, self._file(chunk), self._key(chunk))

    def _noise(self) -> Tensor:
        return noise_like(self.images.shape, self.experiment.threat, torch.Generator().manual_seed(self.experiment.evaluation.seed))

    def absorb(self, chunk: Chunk, outcome: Arrays) -> None:
        self._done += 1
        self.seconds[chunk.attack] = self.seconds.get(chunk.attack, 0.0) + float(outcome["seconds"])
        if chunk.attack == CLEAN:
            self._clean[chunk.indices] = torch.from_numpy(np.array(outcome["clean"]))
            self._pgd[chunk.indices] = torch.from_numpy(np.array(outcome["pgd"]))
            self._num_classes = int(outcome["classes"])
            if chunk.k == 0:
                self._flags = [str(flag) for flag in outcome["flags"]]
                self._numerics = json.loads(str(outcome["numerics"]))
        else:
            assert self._plan is not None
            self._plan.merge(chunk, torch.from_numpy(np.array(outcome["broken"])), torch.from_numpy(np.array(outcome["adversarial"])))

    def row(self, chunk: Chunk) -> dict[str, Any]:
        """What `progress` is told after a batch."""
        robust = int(self._clean.sum()) if self._plan is None else self._plan.first_failure.count("")
        done = {"done": self._done, "of": self._of, "robust": robust, "images": len(self.labels)}
        return {"run": self.run.name, "attack": chunk.attack, **done, "seconds": self.seconds[chunk.attack]}

    def finish(self) -> dict[str, Any]:
        """The result; written once, the JSON file last."""
        if self.result is None:
            assert self._plan is not None
            self.result = self._summary(self._plan)
            flags = {"clean_correct": self._clean.numpy(), "pgd_correct": self._pgd.numpy(), "robust": self._plan.alive.numpy()}
            (self.folder / "adversarial.npz").write_npz(images=self._plan.adversarial.numpy(), labels=self.labels.numpy())
            (self.folder / "per_sample.npz").write_npz(**flags, first_failure=np.array(self._plan.first_failure), labels=self.labels.numpy())
            (self.folder / "autoattack.json").write_json(self.result)
        return self.result

    def _summary(self, plan: Plan) -> dict[str, Any]:
        n = len(self.labels)
        robust = int(plan.alive.sum())
        flags = self._flags + autoattack.effort_flags(self.effort) + autoattack.square_flags(plan.robust_after, n)
        return {
            "images": n,
            "clean_accuracy": int(self._clean.sum()) / n,
            "pgd_accuracy": int(self._pgd.sum()) / n,
            "pgd_steps": self.experiment.evaluation.pgd_steps,
            "autoattack_accuracy": robust / n,
            "interval": list(wilson(robust, n)),
            "after_attack": {attack: count / n for attack, count in plan.robust_after.items()},
            "attack_s": {attack: round(seconds, 3) for attack, seconds in self.seconds.items()},
            "flags": flags,
            "threat": self.settings["threat"],
            "seed": self.experiment.evaluation.seed,
            "batch": self.experiment.evaluation.batch,
            "effort": self.settings["effort"],
            "elapsed_s": round(time.monotonic() - self.started, 3),
            "resumed_batches": self.resumed,
            "numerics": self._numerics,
            "versions": versions(),
            "digest": self.digest,
        }


# -- the worker: one batch ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Work:
    """images float [n,C,H,W], labels int64 [n] and what to do with them; noise and check only on the clean stage."""

    images: Tensor
    labels: Tensor
    attack: str
    experiment: config.Experiment
    effort: Effort
    device: str
    noise: Tensor | None = None
    check: bool = False


@ray.remote(num_cpus=1, max_retries=MAX_RETRIES)
def _attack(student: nn.Module, work: _Work, file: Store, digest: str) -> Arrays:
    return _run(student, work, file, digest)  # by reference: Ray pickles a remote function's own globals by value


def _run(student: nn.Module, work: _Work, file: Store, digest: str) -> Arrays:
    """Attack one batch, write it to `file`, and return what was written. On one thread, where sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = False  # it picks kernels by a race
    started = time.monotonic()
    try:
        student = student.to(work.device)
        outcome = _measure(student, work) if work.attack == CLEAN else _break(student, work)
    finally:
        torch.set_num_threads(threads)
    outcome |= {"seconds": np.array(time.monotonic() - started), "digest": np.array(digest)}
    file.write_npz(**outcome)
    return outcome


def _measure(student: nn.Module, work: _Work) -> Arrays:
    assert work.noise is not None
    images, labels, noise = (tensor.to(work.device) for tensor in (work.images, work.labels, work.noise))
    flags = autoattack.check(student, images, labels) if work.check else []
    with torch.no_grad():
        classes = student(images).shape[1]
    return {
        "clean": autoattack.clean_correct(student, images, labels, len(labels)).cpu().numpy(),
        "pgd": evaluate_pgd(student, images, labels, work.experiment.threat, noise, work.experiment.evaluation.pgd_steps).cpu().numpy(),
        "classes": np.array(classes),
        "flags": np.array(flags, dtype=str),
        "numerics": np.array(json.dumps(_numerics(work.device))),
    }


def _break(student: nn.Module, work: _Work) -> Arrays:
    images, labels = work.images.to(work.device), work.labels.to(work.device)
    threat, seed = work.experiment.threat, work.experiment.evaluation.seed
    broken, adversarial = autoattack.attack_chunk(student, images, labels, work.attack, threat, seed, work.effort)
    return {"broken": broken.cpu().numpy(), "adversarial": adversarial.cpu().numpy()}


def _numerics(device: str) -> dict[str, Any]:
    """Settings that decide the last bits."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_version": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }


# -- digests --------------------------------------------------------------------------------------------------------
def _digest(student: nn.Module) -> str:
    """SHA-256 of a student: its modules' settings and every parameter and buffer, saved in checkpoints or not."""
    digest = hashlib.sha256(repr(student).encode())
    for name, tensor in sorted([*student.named_parameters(), *student.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hash(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().numpy().tobytes())


def _sha256(tree: Mapping[str, Any]) -> str:
    return sha256(json.dumps(tree, sort_keys=True).encode())
