"""The folder of a run: the names of its files and the records that they hold. The manifest is begun
once, checked at every resume and updated atomically; logs are `.jsonl` files of one record a line.

Folders outlive the code: a record reads what older and newer versions wrote, keeps the keys that it
does not know, and writes only the keys that were set.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import difflib
import hashlib
import json
import math
import os
import platform
import reprlib
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
)

from dra_ray.config.base import NOT_IN_DIGEST
from dra_ray.errors import ConfigError, DataError
from dra_ray.storage import Store, folder_name, masked_tree, read_json
from dra_ray.storage.plain_json import strict_json
from dra_ray.storage.segments import Lines, segments

MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**23  # one of a sweep of 10,000 trials has 3 MB
METRICS = "metrics.jsonl"  # ValidationRow of a student's training, TeacherRow of a teacher's
STEPS = "steps.jsonl"  # StepRow
RUNGS = "rungs.jsonl"  # RungRow, of a sweep
TRIAL_ROWS = "trials.jsonl"  # TrialRow, of a sweep
FIDELITY = "fidelity.jsonl"  # FidelityRow, of a sweep
POOL = "pool.jsonl"
MODEL = "model.safetensors"
SAMPLES = "samples.png"  # of synthetic images
SUMMARY = "summary.json"
REPORT = "report.html"
# an evaluation, in its own folder or in the folder EVALUATION of its run
RESULT = "autoattack.json"  # written last
VERDICTS = "per_sample.npz"
ADVERSARIAL = "adversarial.npz"
# folders
CHECKPOINTS, EVALUATION, TRIALS = "checkpoints", "evaluation", "trials"
JUDGING = "fidelity"  # in a sweep: weights that wait for a verdict, and verdicts under way
TEACHER, SYNTHETIC, SWEEP = "teacher", "synthetic", "sweep"  # the stages of a quickstart

Kind = Literal["analysis", "canonical", "quickstart", "sweep", "synthetic", "teacher", "train"]
Weights = Literal["average", "raw"]
LateAttack = Literal["apgd", "autoattack"]
Decision = Literal["continue", "done", "failed", "paused", "stop", "waiting"]


End = Literal["stopped", "done", "failed"]
ENDS: Mapping[Decision, End] = {"stop": "stopped", "done": "done", "failed": "failed"}


def end_of(decision: Decision) -> End | None:
    """What a trial's last decision makes of it; None for one that is to go on."""
    return ENDS.get(decision)


# -- records ---------------------------------------------------------------------------------------
class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue]  # also bounds how deep unknown values nest

    def on_disk(self) -> dict[str, Any]:
        """Plain JSON values by the keys of the file, in its order; only what was set."""
        return dict(sorted(self.model_dump(exclude_unset=True).items()))


R = TypeVar("R", bound=Record)

Seconds = Annotated[float, Field(allow_inf_nan=False)]
# JSON has no NaN: a file may hold null for a loss that is not a number
Loss = Annotated[float, BeforeValidator(lambda loss: math.nan if loss is None else loss)]


class WorldSize(Record):
    """Workers from one start on: at a `step` of a student, or `at_images_seen` of a teacher."""

    workers: int
    step: int | None = None
    at_images_seen: int | None = None
    at: str | None = None  # ISO 8601


class Stage(Record):
    """A stage of the quickstart; the seconds of its resumed parts add up."""

    name: str
    seconds: float


class Estimate(Record):
    """`low` and `high` bound what early stopping and chance may make of it."""

    expected: float
    low: float
    high: float


class Planned(Record):
    """What a sweep was expected to take before it started, within its `budget` of then."""

    trials: int
    images: Estimate
    seconds: Estimate | None = None  # None where the speed of its devices is not known
    measured: bool = False  # whether seconds are of timed steps, or of arithmetic alone
    money: Estimate | None = None
    currency: str | None = None
    budget: dict[str, JsonValue] = {}


class Facts(Record):
    """What a workload adds to its manifest: when the run begins, while it runs, or at its end."""

    status: str = "unknown"
    config: dict[str, JsonValue] = {}  # of the latest start: what is not in the digest may change
    seed: int | None = None
    data: dict[str, JsonValue] = {}  # `Images.facts`
    synthetic: dict[str, JsonValue] = {}  # facts of the synthetic images that it trains on
    canonical: dict[str, JsonValue] = {}  # facts of its canonical samples; of a set of them, what
    # became of it
    started_at: str | None = None  # ISO 8601; None until the workers of the last start trained
    stopped: str | None = None  # why the run ended without a retry
    world_sizes: list[WorldSize] = []
    elapsed_s: Seconds | None = None
    # of a student's training
    weights: str | None = None  # what the first weights were
    device: dict[str, JsonValue] = {}
    # of a teacher's training
    sigma_data: float | None = None
    # of a teacher's training (its own) and of synthetic images (the one that made them)
    teacher_digest: str | None = None
    # of a student's and a teacher's training, and of a sweep over its trials
    images_seen: int | None = None
    gpu_hours: float | None = None
    # of synthetic images
    images: int | None = None
    counts: dict[str, int] = {}  # by class
    sampler: dict[str, JsonValue] = {}
    shards: dict[str, str] = {}  # SHA-256 by file name
    # of a sweep
    trials: dict[str, dict[str, JsonValue]] = {}  # the fields that each trial changes
    finals: dict[str, str] = {}  # trial by role, "dra" and "baseline"
    paused: str | None = None  # which limit of its budget is spent
    plan: Planned | None = None
    money: float | None = None  # that was spent
    raised_trials: int | None = None  # of its search, where more were asked for than its config has
    # of a quickstart
    hardware: JsonValue = None
    stages: list[Stage] = []

    @field_validator("counts", mode="before")
    @classmethod
    def _by_class(cls, counts: object) -> object:
        """Older folders list the counts in the order of the classes."""
        if isinstance(counts, list):
            return {str(label): count for label, count in enumerate(counts)}
        return counts


class Manifest(Facts):
    """`manifest.json`: what the run is, what it was started with and what became of it."""

    kind: str = ""
    name: str | None = None
    created: str | None = None  # ISO 8601
    digest: str = ""
    versions: dict[str, str] = {}

    @property
    def is_done(self) -> bool:
        return self.status == "done"


class ValidationRow(Record):
    """A validation of the student's averaged weights, or of the raw ones where those are judged too
    and do better; losses are means since the one before.
    """

    step: int
    epoch: int
    images_seen: int
    loss: Loss
    loss_clean: Loss
    loss_robust: Loss
    loss_align: Loss
    loss_distill: Loss | None = None  # of canonical samples, where they teach
    lr: float
    clean_accuracy: float
    robust_accuracy: float
    images: int | None = None  # validation images
    verdicts: str | None = None  # of each, `pack_verdicts`
    weights: Weights | None = None  # that the scores are of; the average where it does not say
    validation_s: Seconds | None = None  # that this validation took, in `elapsed_s` or beside it
    elapsed_s: Seconds
    at: float  # seconds since 1970


class StepRow(Record):
    """One training step of every few, over all workers."""

    step: int
    epoch: float
    loss: Loss
    loss_clean: Loss
    loss_robust: Loss
    loss_align: Loss
    loss_distill: Loss | None = None
    lr: float
    images_per_s: float
    at: float


class RungRow(Record):
    """What a trial reported to the sweep and what was decided on it."""

    trial: str
    epoch: int
    images_seen: int
    clean_accuracy: float | None  # None for a trial that failed before it had scores
    robust_accuracy: float | None
    images: int | None = None  # validation images
    verdicts: str | None = None  # of each, `pack_verdicts`
    weights: Weights | None = None  # that the scores are of; the average where it does not say
    decision: Decision
    reason: str | None = None  # why it failed, was paused or was stopped by hand, on one line
    elapsed_s: Seconds | None = None  # of its training so far
    at: float | None = None


class TrialRow(Record):
    """A trial of a sweep, written before it starts."""

    trial: str
    number: int | None = None  # in the order of the search; None for a repeat of another trial
    fields: dict[str, JsonValue]  # what it changes of the sweep's base
    known: int = 0  # rows of rungs.jsonl when the search suggested it
    by_hand: bool = False  # added to the search by somebody
    at: float | None = None


class FidelityRow(Record):
    """A stronger attack's verdict on a validation of a trial; or why there is none, as `reason`."""

    trial: str
    epoch: int
    images_seen: int
    step: int  # of the checkpoint
    attack: LateAttack
    weights: Weights | None = None  # as in the validation's row
    images: int | None = None  # validation images, the first so many
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    verdicts: str | None = None  # of each, `pack_verdicts`
    digest: str | None = None  # of the evaluation: weights, images, attack and its settings
    reason: str | None = None  # on one line
    seconds: Seconds | None = None  # of work, summed over its tasks
    at: float | None = None


class TeacherRow(Record):
    """A teacher's mean loss since the row before; the control's accuracy where a checkpoint was
    written.
    """

    images_seen: int
    loss: Loss
    lr: float
    validation_accuracy: float | None = None
    elapsed_s: Seconds
    at: float

    def on_disk(self) -> dict[str, Any]:
        return {key: value for key, value in super().on_disk().items() if value is not None}


class SyntheticProgress(Record):
    """Synthetic images that are written, of all that will be; in no file."""

    images: int
    images_total: int
    elapsed_s: Seconds


class AnalysisProgress(Record):
    """Batches, autoencoders and attacks of an analysis that are made, of all that were to be; in no
    file.
    """

    done: int
    total: int
    elapsed_s: Seconds


class EvaluationProgress(Record):
    """A batch of an evaluation that is done; in no file."""

    run: str
    attack: str  # or another stage, by its name in the catalogue
    done: int  # batches of this stage
    of: int
    robust: int  # images not fooled so far
    images: int
    seconds: float  # of work on this stage, summed over batches
    stages: list[str]  # all that there may be


def metric_labels(run: Store) -> dict[str, str]:
    """{"run", "trial"} of a run's metrics: its folder's name with six characters of the digest of
    its URI, so that namesakes are told apart, and no trial; a trial has those of its sweep, and its
    own name.
    """
    folder, trial = run.resolved().uri.rstrip("/"), ""
    above, _, name = folder.rpartition("/")
    if above.endswith(f"/{TRIALS}"):
        folder, trial = above.removesuffix(f"/{TRIALS}"), name
    name = folder.rpartition("/")[2]
    return {"run": f"{name}-{hashlib.sha256(folder.encode()).hexdigest()[:6]}", "trial": trial}


def pack_verdicts(withstood: NDArray[np.bool_]) -> str:
    """Verdicts [N] of N images, image 0 first, as text of N/6 characters: eight to a byte, base64.

    Two runs that were judged on the same images with the same attack compare image by image.
    """
    return base64.b64encode(np.packbits(withstood).tobytes()).decode("ascii")


def unpack_verdicts(text: str, images: int) -> NDArray[np.bool_]:
    """What `pack_verdicts` was given, bool [images]; `DataError` for a text of another length."""
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        packed = np.empty(0, dtype=np.uint8)
    if len(packed) != -(-images // 8):
        raise DataError(
            f"verdicts of {images} images are {reprlib.repr(text)}: not {-(-images // 8)} bytes in "
            "base64; restore the file"
        )
    return np.unpackbits(packed, count=images).astype(np.bool_)


# -- logs ------------------------------------------------------------------------------------------
KEY_DEPTH = 4  # of a nested key in a message


def parse(kind: type[R], value: object, source: str) -> R:
    """`value` as a record; `DataError` names the first key that is missing or of another type."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = repr(".".join(str(part) for part in first["loc"][:KEY_DEPTH]))[1:-1]
        if first["type"] == "missing":
            what = f"has no '{key}'"
        elif not key:
            what = f"holds {reprlib.repr(value)} instead of an object"
        else:
            why = first["msg"][:1].lower() + first["msg"][1:]
            what = f"has {key}={reprlib.repr(first['input'])}: {why}"
        raise DataError(f"{source} {what}; restore or delete it") from None


def read_rows(file: Store, kind: type[R]) -> list[R]:
    """The rows of a `.jsonl` log, none where it is not written yet; `DataError` names the first
    line that is damaged.
    """
    return [row for part, text in segments(file) for _, row in _lines(part, text, kind)]


def write_rows(file: Store, rows: Iterable[Record]) -> None:
    """Write the file whole, atomically."""
    file.write_jsonl(row.on_disk() for row in rows)


def _lines(file: Store, text: str, kind: type[R]) -> list[tuple[str, R]]:
    """Each line of `text`, which `file` holds, with its row."""
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except (ValueError, RecursionError):
            raise DataError(
                f"'{file}' line {number} is not valid JSON; delete that line or restore the file"
            ) from None
        if "NaN" in line or "Infinity" in line:  # of earlier versions; no JSON
            line = strict_json(value)
        lines.append((line, parse(kind, value, f"'{file}' line {number}")))
    return lines


class Log(Generic[R]):
    """A `.jsonl` log that grows by a row at a time, in segments that are written whole, so that a
    reader never sees half a row. The lines that were there stay as they are, to the byte, unless
    they are no JSON because of a NaN.

    Args:
        keep: which of the rows that are there a resumed run goes on with; default: all.
    """

    def __init__(self, file: Store, kind: type[R], keep: Callable[[R], bool] | None = None) -> None:
        self.file = file
        self.rows: list[R] = []
        texts, changed = [], set()
        for number, (part, text) in enumerate(segments(file)):
            kept = [pair for pair in _lines(part, text, kind) if keep is None or keep(pair[1])]
            self.rows += [row for _, row in kept]
            texts.append("".join(f"{line}\n" for line, _ in kept))
            if texts[-1] != text:
                changed.add(number)
        self._lines = Lines(file, texts, changed)

    def append(self, *rows: R) -> None:
        """Add rows, all of them or none; `StorageError` where they cannot be written, and the next
        call brings them too.
        """
        self.rows += rows
        self._lines.append("\n".join(strict_json(row.on_disk()) for row in rows))

    def flush(self) -> None:
        """Write the rows that could not be written when they came; `StorageError` where they still
        cannot.
        """
        self._lines.write()


class Tail(Generic[R]):
    """New rows of a log that somebody else writes; a look reads its newest segments alone."""

    def __init__(self, file: Store, kind: type[R]) -> None:
        self._file, self._kind = file, kind
        self._segment = self._rows = 0

    def new(self) -> list[R]:
        """The rows that came since the last call.

        A resumed run takes rows back that its checkpoint does not know; those that it writes in
        their place are not new.
        """
        new: list[R] = []
        at, seen = self._segment, self._rows
        for number, (part, text) in enumerate(segments(self._file, at), at):
            rows = [row for _, row in _lines(part, text, self._kind)]
            if number > at:
                at, seen = number, 0
            new += rows[seen:]
            seen = max(seen, len(rows))
        self._segment, self._rows = at, seen  # only once every segment was read
        return new


# -- manifests -------------------------------------------------------------------------------------
def utc_now() -> str:
    """ISO 8601 time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, for a manifest."""
    names = (
        "dra-ray",
        "torch",
        "torchvision",
        "ray",
        "timm",
        "pyautoattack",
        "numpy",
        "fsspec",
        "s3fs",
        "pydantic",
    )
    installed = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def commit(folder: str | None = None) -> dict[str, str]:
    """{"commit": hash} of the checkout that this package (or `folder`) is part of, with "-dirty"
    where files differ; else {}.

    A folder that git ignores, such as an environment inside some other checkout, is no part of it.
    """
    folder = folder or os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", folder]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "."], capture_output=True, timeout=10, check=True
        )
        if not tracked.stdout:
            return {}
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return {}
    return {"commit": described.stdout.strip()}


def begin_run(
    run: Store,
    kind: Kind,
    config: Mapping[str, Any],
    digest: str,
    facts: Facts | None = None,
    require: Callable[[], object] = lambda: None,
) -> Manifest:
    """Claim a run directory: its manifest, new or as it is there. The caller returns at once when
    the run `is_done`.

    Unless it is, `require` is called before anything is written: a run for which there is no room
    raises there, and leaves no folder.

    Raises what `check_run` raises, and `DataError` when the run was begun on other data than
    `facts` now say: "data" as `Images.facts` gives it, "synthetic" as `Pictures` of a synthetic set
    have it. What an older manifest lacks is not compared.
    """
    manifest = check_run(run, kind, config, digest)
    if manifest is not None:
        if facts:
            _require_same_data(run, "data", manifest.data, facts.data)
            _require_same_data(run, "synthetic images", manifest.synthetic, facts.synthetic)
            _require_same_data(run, "canonical samples", manifest.canonical, facts.canonical)
        if not manifest.is_done:
            require()
        return manifest
    require()
    begun = {
        "kind": kind,
        "name": run.name,
        "created": utc_now(),
        "config": dict(config),
        "digest": digest,
        "versions": versions() | commit(),
        **(facts.on_disk() if facts else {}),
        "status": "running",
    }
    manifest = parse(Manifest, begun, f"'{run / MANIFEST}'")
    (run / MANIFEST).write_json(begun)
    return manifest


def check_run(run: Store, kind: Kind, config: Mapping[str, Any], digest: str) -> Manifest | None:
    """The manifest of a run that this config may go on with; None where the directory is free.

    Raises `ConfigError` when the directory holds a run of another config (equal digests are the
    same run), `DataError` when its manifest is damaged, and `StorageError` when it cannot be
    written.
    """
    manifest = read_manifest(run)
    if manifest is None:
        run.probe()
    elif manifest.kind != kind:
        raise ConfigError(
            f"run '{run}' exists and is of kind {manifest.kind!r}, not '{kind}'; choose another "
            "--name"
        )
    elif manifest.digest != digest:
        change = _first_change(manifest.config, config)
        raise ConfigError(
            f"run '{run}' exists with another config ({change}); choose another --name or go back "
            "to its config"
        )
    return manifest


def require_folder(run: Store, wanted: str = "the folder of a run") -> None:
    """`DataError` where nothing is at a run's place, or a file, and for a manifest that cannot be
    read: before anything slow is imported.
    """
    require_there(run)
    if run.is_file():
        raise DataError(f"'{run}' is a file; give {wanted}")
    read_manifest(run)


def require_there(run: Store) -> None:
    """`DataError` where nothing is at a run's place, with the nearest of the names beside it."""
    if run.exists():
        return
    parent, _, name = run.uri.rstrip("/").rpartition("/")
    beside = Store(parent or ".")
    close = difflib.get_close_matches(name, beside.names() if beside.exists() else [], n=1)
    near = f"did you mean '{beside / close[0] if parent else close[0]}'?" if close else ""
    remedy = near or "check the path; runs lie below --storage, which is 'runs' by default"
    raise DataError(f"'{run}' does not exist; {remedy}")


def read_manifest(run: Store) -> Manifest | None:
    """The manifest of a run directory, None where there is none; `DataError` for a damaged one.

    Earlier versions may have kept credentials inside a URI, which are masked.
    """
    file = run / MANIFEST
    if not file.exists():
        return None
    manifest = parse(Manifest, _masked(file), f"'{file}'")
    if manifest.kind != "sweep":
        return manifest
    # a search adds trials while the sweep runs; its manifest is not written again for each
    added = {row.trial: row.fields for row in read_rows(run / TRIAL_ROWS, TrialRow)}
    return manifest.model_copy(update={"trials": manifest.trials | added}) if added else manifest


def _masked(file: Store) -> dict[str, Any]:
    value = file.read_json(at_most=MANIFEST_BYTES)
    parse(Manifest, value, f"'{file}'")  # a stranger's file is refused before its values are walked
    masked: dict[str, Any] = masked_tree(value)
    return masked


def finalists(sweep: Store) -> dict[str, Store]:
    """Role -> run of a finished sweep's best trials, also of the one in a quickstart; empty for a
    run of another kind. `ConfigError` where the sweep has not chosen them yet.
    """
    manifest = read_manifest(sweep)
    if manifest is not None and manifest.kind == "quickstart":
        return finalists(sweep / SWEEP)
    if manifest is None or manifest.kind != "sweep":
        return {}
    if not manifest.finals:
        raise ConfigError(
            f"sweep '{sweep}' has no best trials yet; resume it with `dra sweep`, or evaluate one "
            f"of its trials below {sweep / TRIALS}"
        )
    names = {
        role: folder_name(trial, f"'{sweep / MANIFEST}': finals.{role}")
        for role, trial in manifest.finals.items()
    }
    return {role: sweep / TRIALS / trial for role, trial in names.items()}


def adopt(run: Store, config: Mapping[str, Any], digest: str) -> Manifest:
    """Let a run that is there go on with another config, which keeps all that it has made."""
    changed = _masked(run / MANIFEST) | {"status": "running", "config": dict(config)}
    (run / MANIFEST).write_json(changed | {"digest": digest})
    return parse(Manifest, changed | {"digest": digest}, f"'{run / MANIFEST}'")


def update_manifest(run: Store, facts: Facts) -> Manifest:
    """Add or replace the facts that are set, such as `Facts(status="done")`."""
    file = run / MANIFEST
    before = _masked(file)
    merged = before | facts.on_disk()  # what was there stays as it was written
    manifest = parse(Manifest, merged, f"'{file}'")
    file.write_json(merged)
    return manifest


def _first_change(before: Any, after: Any, field: str = "") -> str:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(k for k in after if k not in before)]:
            if before.get(key) != after.get(key) and key not in NOT_IN_DIGEST:
                return _first_change(
                    before.get(key), after.get(key), f"{field}.{key}" if field else str(key)
                )
    return f"{field} is {json.dumps(before)} there and {json.dumps(after)} now"


# in this order the first difference is named: numbers say more than hashes
_COUNTS = ("num_classes", "train", "validation", "test", "images")


def _require_same_data(
    run: Store, what: str, before: Mapping[str, JsonValue], now: Mapping[str, JsonValue]
) -> None:
    """`DataError` naming what differs between two records of the same data, as far as both have
    it.
    """
    both = before.keys() & now.keys()
    changes = [
        f"{key} is {before[key]} there and {now[key]} now"
        for key in _COUNTS
        if key in both and before[key] != now[key]
    ]
    if (
        not changes
        and before.get("sha256_of") == now.get("sha256_of")
        and "sha256" in both
        and before["sha256"] != now["sha256"]
    ):
        parts_before, parts_now = before.get("parts"), now.get("parts")
        changed = (
            [part for part, digest in parts_now.items() if parts_before.get(part) != digest]
            if isinstance(parts_before, Mapping) and isinstance(parts_now, Mapping)
            else []
        )
        of_parts = f" of {' and '.join(changed)}" if changed else ""
        changes = [f"the {now.get('sha256_of', 'contents')}{of_parts} are others"]
    if changes:
        raise DataError(
            f"run '{run}' was begun on other {what} ({'; '.join(changes)}); restore the files, or "
            "choose another --name"
        )
