"""Late verdicts of a sweep: stronger attacks than the validations' PGD, on checkpoints of trials,
in Ray tasks of their own beside the training.

In the sweep's folder:

    fidelity.jsonl       a row per verdict, or the reason why there is none
    fidelity/NAME/       while a verdict is due: the weights, kept before the trial drops its
                         checkpoint, and the batches of its evaluation that are done

An evaluation is `workloads.evaluate`'s: a verdict is to the bit what that gives for the weights,
the images and the settings, and goes on where a killed driver left it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from dra_ray import config, runs
from dra_ray.config.catalogue import STANDARD, Effort
from dra_ray.errors import DraError, StorageError
from dra_ray.evaluation import subjects
from dra_ray.evaluation.subjects import Subject
from dra_ray.runs import FidelityRow, RungRow
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.sweeps import fidelity
from dra_ray.sweeps.equal import Fields
from dra_ray.sweeps.fidelity import Key
from dra_ray.workloads import evaluate
from dra_ray.workloads.session import checkpoints, read_snapshot

log = logging.getLogger("dra_ray")
LOOKS, LOOK_S = 40, 0.25  # for a checkpoint whose commit its validation's report overtook
END_S = 5.0  # for verdicts that are cancelled


class _Ended(Exception):
    """The driver ends: what is under way is not recorded."""


class Late:
    """The late verdicts of a sweep while its driver runs; leaving the `with` block cancels those
    that are under way.

    Args:
        guard: called before a row is written; raises where another driver has the sweep.
    """

    def __init__(self, sweep: config.Sweep, folder: Store, guard: Callable[[], None]) -> None:
        self._settings, self._folder = sweep.fidelity, folder
        self._guard = guard
        self._log = runs.Log(folder / runs.FIDELITY, FidelityRow)
        self._trials: Mapping[str, Fields] = {}
        self._experiment: Callable[[str], config.Experiment]  # of a trial, from `begin` on
        self._known: set[Key] = set()  # of this driver, whatever became of them
        self._jobs: queue.Queue[tuple[Key, RungRow, int]] = queue.Queue()
        self._changed = threading.Condition()
        self._open = 0  # verdicts that are due
        self._failure: Exception | None = None  # that kept a verdict from being recorded
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"late-verdicts-{number}", daemon=True)
            for number in range(self._settings.workers)
        ]

    def __enter__(self) -> Late:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        until = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    @property
    def rows(self) -> list[FidelityRow]:
        return self._log.rows

    def gpu_hours(self) -> float:
        """Of all verdicts so far."""
        seconds = sum(row.seconds or 0.0 for row in self.rows)
        return seconds * self._settings.gpus_per_worker / 3600

    # -- what is due -------------------------------------------------------------------------------
    def begin(
        self,
        trials: Mapping[str, Fields],
        experiment: Callable[[str], config.Experiment],
        rows: Iterable[RungRow],
    ) -> None:
        """Go on with the verdicts that an earlier driver left.

        Args:
            trials: name -> the fields that it changes; further ones may come.
            experiment: of a trial's name.
        """
        self._trials, self._experiment = trials, experiment
        for row in rows:
            self.after(row)

    def after(self, row: RungRow) -> None:
        """A row of rungs.jsonl: where APGD is to judge it, keep its weights and have it judged."""
        epochs = self._experiment(row.trial).optim.epochs
        self._judge_all(fidelity.due(self._settings, [row], {row.trial: epochs}), [row])

    def finish(self, rows: Sequence[RungRow], finals: bool) -> None:
        """Wait for the verdicts that are due and, where the sweep is over (`finals`), for those on
        its finalists.

        Raises what kept one from being recorded, `StorageError` or `LeaseError`; the same sweep,
        started again, makes those that are missing.
        """
        self._wait()
        if finals:
            keys = fidelity.due_of_finalists(self._settings, self._trials, rows)
            # nothing else is under way: where finalists are few, each gets several tasks
            at_once = max(1, self._settings.workers // max(1, len(keys)))
            self._judge_all(keys, rows, at_once)
            self._wait()
        (self._folder / runs.JUDGING).remove()

    def _judge_all(self, keys: Sequence[Key], rows: Sequence[RungRow], at_once: int = 1) -> None:
        of = {(row.trial, row.images_seen): row for row in rows}
        missing = [k for k in fidelity.missing(keys, self.rows) if k not in self._known]
        for key in missing:
            self._known.add(key)
            row = of[key[:2]]
            with contextlib.suppress(DraError):  # its turn tries again
                self._keep(key, row)
            with self._changed:
                self._open += 1
            self._jobs.put((key, row, at_once))

    def _wait(self) -> None:
        with self._changed:
            while self._open:
                self._changed.wait(1.0)
        if self._failure is not None:
            raise self._failure

    # -- one verdict, in a thread ------------------------------------------------------------------
    def _work(self) -> None:
        while not self._ending.is_set():
            try:
                key, row, at_once = self._jobs.get(timeout=0.2)
            except queue.Empty:
                continue
            failure: Exception | None = None
            try:
                self._record(key, self._verdict(key, row, at_once))
            except _Ended:
                return
            except Exception as error:  # nothing is recorded, so the next start tries again
                failure = error
            with self._changed:
                self._open -= 1
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _verdict(self, key: Key, row: RungRow, at_once: int) -> FidelityRow:
        trial, images_seen, attack = key
        known: dict[str, Any] = {
            "trial": trial,
            "epoch": row.epoch,
            "images_seen": images_seen,
            "step": self._step(key),
            "attack": attack,
        } | ({"weights": row.weights} if row.weights else {})
        try:
            if not self._is_kept(key, row):
                return FidelityRow(**known, reason="its checkpoint is gone", at=time.time())
            return FidelityRow(**known, **self._evaluated(key, at_once), at=time.time())
        except (_Ended, StorageError):  # the store is away: nothing is known of the verdict
            raise
        except Exception as error:  # whatever it is, the sweep goes on without this verdict
            if self._ending.is_set():
                raise _Ended from None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return FidelityRow(**known, reason=reason, at=time.time())

    def _evaluated(self, key: Key, at_once: int) -> dict[str, Any]:
        place = self._place(key)
        effort = STANDARD
        if key[2] == "apgd":
            effort = Effort(apgd_steps=self._settings.apgd_steps)
        subject = self._subject(key)
        (result,) = evaluate.evaluate_many([subject], at_once, self._go_on, effort, quiet=True)
        arrays = (place / runs.VERDICTS).read_npz()
        return {
            "images": result.images,
            "clean_accuracy": result.clean_accuracy,
            "robust_accuracy": result.autoattack_accuracy,
            "verdicts": runs.pack_verdicts(arrays["robust"]),
            "digest": result.digest,
            "seconds": round(sum(result.attack_s.values()), 3),
        }

    def _subject(self, key: Key) -> Subject:
        """The trial's student as it was at the validation, on the held-out images."""
        trial, _, attack = key
        place, late = self._place(key), self._settings
        run = self._folder / runs.TRIALS / trial
        level = self._experiment(trial).evaluation.level
        screen = attack == "apgd"
        settings: dict[str, Any] = {
            "evaluation.version": "standard" if screen else late.finalists,
            "evaluation.level": "screen" if screen else level.replace("screen", "reference"),
            "evaluation.curve_255": [],
            "evaluation.corruptions": None,
            "resources.gpus_per_worker": late.gpus_per_worker,
            "resources.custom": {},  # of the nodes of training workers, as labels are
            "resources.labels": {},
        }
        weights = (place / runs.MODEL).read_tensors()
        return subjects.held_out(
            run, weights, settings, place, late.apgd_images if screen else None
        )

    def _go_on(self, _: object) -> None:
        """Called after each batch."""
        if self._ending.is_set():
            raise _Ended

    def _record(self, key: Key, row: FidelityRow) -> None:
        with self._changed:
            if self._ending.is_set():
                raise _Ended
            self._guard()
            self._log.append(row)
        if row.robust_accuracy is None:
            log.warning("%s has no verdict by %s: %s", row.trial, row.attack, row.reason)
        else:
            log.info(
                "%s after epoch %d withstands %s on %.1f %% of %d validation images",
                *(row.trial, row.epoch, row.attack, 100 * row.robust_accuracy, row.images),
            )
        with contextlib.suppress(StorageError):
            self._place(key).remove()

    # -- weights -----------------------------------------------------------------------------------
    def _place(self, key: Key) -> Store:
        trial, images_seen, attack = key
        return self._folder / runs.JUDGING / f"{trial}-{images_seen}-{attack}"

    def _is_kept(self, key: Key, row: RungRow) -> bool:
        """Whether the weights are there; the commit of a checkpoint may lag behind its report."""
        for _ in range(LOOKS):
            if self._keep(key, row):
                return True
            latest = read_snapshot(self._run(key)).get("latest_checkpoint_result")
            if latest is not None and latest["metrics"]["step"] >= self._step(key):
                return False
            if self._ending.wait(LOOK_S):
                raise _Ended
        return False

    def _keep(self, key: Key, row: RungRow) -> bool:
        """Copy the weights that the validation judged, unless they are there; returns whether they
        are. A trial keeps its last checkpoints alone.
        """
        place, run, step = self._place(key), self._run(key), self._step(key)
        if (place / runs.MODEL).exists():
            return True
        for result in read_snapshot(run).get("checkpoint_results", []):
            if result["metrics"].get("step") == step:
                folder = checkpoints(run) / result["checkpoint_dir_name"]
                state = (folder / subjects.STATE).read_torch()
                checkpoint.save(place, state["student" if row.weights == "raw" else "average"])
                return True
        return False

    def _run(self, key: Key) -> Store:
        return (self._folder / runs.TRIALS / key[0]).resolved()

    def _step(self, key: Key) -> int:
        trial, images_seen, _ = key
        return images_seen // self._experiment(trial).optim.batch
