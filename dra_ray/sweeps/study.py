"""A sweep as an Optuna study in its folder, for optuna-dashboard: `optuna-dashboard
SWEEP/optuna.journal`. A mirror of the recorded points and rungs; nothing reads decisions from it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dra_ray import runs
from dra_ray.runs import Record, RungRow
from dra_ray.storage import Store

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

JOURNAL = "optuna.journal"
UPLOAD_S = 30.0  # to an object store at most as often
TRIAL, EPOCH, CLEAN, REASON = "trial", "epoch", "clean_accuracy", "reason"  # attributes of a trial
EARLIER = "goes_on_from"  # number of the trial that was stopped and then went on as this one
Fields = Mapping[str, Any]
_PLAIN = (bool, int, float, str, type(None))


@dataclasses.dataclass
class _Mirrored:
    """A trial as the study has it; `steps` are the images seen at its scores."""

    id: int
    number: int
    scores: dict[int, float]
    is_finished: bool


class Study:
    """The study of a sweep, brought up row by row; rows that it has change nothing.

    A trial's intermediate values are robust accuracies by images seen. "stop" is Optuna's pruned,
    "failed" its fail. Optuna's finished trials cannot change, so one that its sweep stopped and
    later took up again goes on as a further trial.

    Args:
        space: `space` of the sweep's config, as its manifest holds it.
        points: the fields that each trial changes; trials that come later may be added to it.
    """

    def __init__(self, sweep: Store, space: Fields, points: Mapping[str, Fields]) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._file = sweep.resolved() / JOURNAL
        self._folder = None if self._file.is_local else tempfile.TemporaryDirectory(prefix="dra-")
        self._here = Store(f"{self._folder.name}/{JOURNAL}") if self._folder else self._file
        if self._folder and (before := self._file.read_dated()):
            self._here.write_bytes(before[0])
        self._here.append_bytes(b"")  # Optuna makes no folder
        self._points, self._ranges = points, ranges(space)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(self._here.uri)),
            study_name=sweep.name,
            direction="maximize",
            load_if_exists=True,
        )
        if self._study.metric_names is None:
            with warnings.catch_warnings():  # Optuna calls it experimental
                warnings.simplefilter("ignore")
                self._study.set_metric_names(["robust_accuracy"])
        self._trials = {
            trial.user_attrs[TRIAL]: _Mirrored(
                trial._trial_id,
                trial.number,
                dict(trial.intermediate_values),
                trial.state.is_finished(),
            )
            for trial in self._study.get_trials(deepcopy=False)
            if TRIAL in trial.user_attrs
        }
        self._sent_at = time.monotonic()

    def row(self, trial: str, row: Record) -> None:
        if not isinstance(row, RungRow):
            return
        there, at = self._trials.get(trial), row.images_seen
        if there is None:
            there = self._begin(trial, row, None)
        elif there.is_finished:
            if at <= max(there.scores, default=at):
                return
            there = self._begin(trial, row, there)
        storage = self._study._storage
        if row.robust_accuracy is not None and at not in there.scores:
            storage.set_trial_intermediate_value(there.id, at, row.robust_accuracy)
            there.scores[at] = row.robust_accuracy
        end = runs.end_of(row.decision)
        if end is not None and at >= max(there.scores, default=0):
            self._finish(there, row, end)
        if time.monotonic() - self._sent_at >= UPLOAD_S:
            self._send()

    def end(self, status: str) -> None:
        self._send()
        if self._folder:
            self._folder.cleanup()

    def _begin(self, trial: str, row: RungRow, earlier: _Mirrored | None) -> _Mirrored:
        from optuna.trial import TrialState, create_trial

        point = {field: shown(value) for field, value in self._points.get(trial, {}).items()}
        inside = {
            field: value
            for field, value in point.items()
            if field in self._ranges and _is_in(self._ranges[field], value)
        }
        scores = dict(earlier.scores) if earlier else {}
        begun = create_trial(
            state=TrialState.RUNNING,
            params=inside,
            distributions={field: self._ranges[field] for field in inside},
            intermediate_values=scores,
            user_attrs={TRIAL: trial}
            | {field: value for field, value in point.items() if field not in inside}
            | ({EARLIER: earlier.number} if earlier else {}),
        )
        if row.at is not None:  # of its first score, which comes after `elapsed_s` of training
            trained_s = 0.0 if earlier else row.elapsed_s or 0.0
            begun.datetime_start = datetime.datetime.fromtimestamp(row.at - trained_s)
        storage = self._study._storage
        number = storage.create_new_trial(self._study._study_id, template_trial=begun)
        self._trials[trial] = _Mirrored(
            number, storage.get_trial_number_from_id(number), scores, False
        )
        return self._trials[trial]

    def _finish(self, there: _Mirrored, row: RungRow, end: runs.End) -> None:
        storage = self._study._storage
        facts = {EPOCH: row.epoch, CLEAN: row.clean_accuracy, REASON: row.reason}
        for name, value in facts.items():
            if value is not None:
                storage.set_trial_user_attr(there.id, name, value)
        score = row.robust_accuracy if row.decision != "failed" else None
        values = None if score is None else [score]
        storage.set_trial_state_values(there.id, _state(end), values=values)
        there.is_finished = True

    def _send(self) -> None:
        if self._folder:
            self._file.write_bytes(self._here.read_bytes())
        self._sent_at = time.monotonic()


def _state(end: runs.End) -> optuna.trial.TrialState:
    from optuna.trial import TrialState

    states: Mapping[runs.End, TrialState] = {
        "stopped": TrialState.PRUNED,
        "done": TrialState.COMPLETE,
        "failed": TrialState.FAIL,
    }
    return states[end]


def ranges(space: Fields) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each axis of a `space`: a list of values, or a mapping with one of
    choice, uniform, log_uniform and integer.
    """
    return {field: _range(axis) for field, axis in space.items()}


def _range(axis: Sequence[Any] | Fields) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Mapping):
        axis = {"choice": axis}
    if bounds := axis.get("integer"):
        low, high = bounds
        step = axis.get("step") or 1
        return IntDistribution(low, high - (high - low) % step, step=step)
    if bounds := axis.get("log_uniform"):
        return FloatDistribution(bounds[0], bounds[1], log=True)
    if bounds := axis.get("uniform"):
        return FloatDistribution(bounds[0], bounds[1])
    return CategoricalDistribution(list(dict.fromkeys(map(shown, axis["choice"]))))


def shown(value: Any) -> bool | int | float | str | None:
    """A value as Optuna can hold it: lists and mappings as JSON."""
    return value if isinstance(value, _PLAIN) else json.dumps(value, sort_keys=True)


def _is_in(distribution: BaseDistribution, value: Any) -> bool:
    """Points that somebody added may lie outside of the axes."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False
