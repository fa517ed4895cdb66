"""`summary.json` as a record: what `collect` reads of a run. The fields are the file's keys;
accuracies are fractions in 0..1, times seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from dra_ray.evaluation.result import Corruptions, Interval, Point, Threat
from dra_ray.runs import Stage


class Part(BaseModel):
    """Frozen, and of known fields alone; what was not set is not in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scores(Part):
    """The last validation; None where there is none yet."""

    epoch: int | None
    images_seen: int | None
    clean_accuracy: float | None
    robust_accuracy: float | None
    best_robust_accuracy: float | None
    decision: str  # or the status of a single run
    rung: int | None  # number of the rung at which it stopped


class Trial(Scores):
    """A trial of a sweep, with the fields that it changes."""

    trial: str
    fields: dict[str, JsonValue]


class Train(Scores):
    """A single training run of `epochs` epochs in all."""

    epochs: int | None


class Stop(Part):
    """Trials that stopped after one epoch, and the range of their robust accuracy there."""

    epoch: int
    rung: int | None
    trials: int
    lowest: float
    highest: float


class Asha(Part):
    """How many trials came how far."""

    trials: int
    trained_to_the_end: int
    stopped_early: int
    unfinished: int
    failed: int
    not_started: int
    stops: list[Stop]
    rungs: list[int]  # epochs


class Match(Part):
    """`sweeps.equal.Match`: DRA against none where all else is equal."""

    epoch: int
    shared: dict[str, JsonValue]
    aligned: str
    aligned_accuracy: float
    baseline: str
    baseline_accuracy: float


class Teacher(Part):
    images_seen: int | None
    params: int | None = None
    digest: str | None = None
    samples: str | None = None  # file of the last sheet


class Synthetic(Part):
    images: int | None
    counts: dict[str, int]  # by class
    sampler: dict[str, JsonValue]
    teacher_digest: str | None
    samples: str | None


class Pool(Part):
    """`replicas` that ran, one after the other; totals of the log."""

    replicas: list[int]
    max_running: int
    seconds: float
    requests: int
    images: int
    retries: int


class Paired(Part):
    """The finalists image by image; `also_differ` are fields beside the alignment's."""

    images: int
    difference: float
    interval: Interval
    p_value: float
    only_dra: int
    only_baseline: int
    distinguishable: bool
    also_differ: dict[str, list[JsonValue]]


class Other(Part):
    """Another evaluation of a run, in the folder `name` below the first."""

    name: str
    images: int | None
    clean_accuracy: float | None
    pgd_accuracy: float | None
    autoattack_accuracy: float | None
    interval: Interval | None


class Final(Part):
    """A finalist that is not evaluated yet: its folder, and that of its evaluation."""

    run: str
    trial: str
    fields: dict[str, JsonValue]
    evaluation: str
    others: list[Other] = []


class Evaluated(Final):
    """A finalist with its test scores: what is kept of `evaluation.result.Result`."""

    images: int
    clean_accuracy: float
    autoattack_accuracy: float
    interval: Interval
    after_attack: dict[str, float]
    flags: list[str]
    threat: Threat
    pgd_accuracy: float | None = None
    pgd_steps: int | None = None
    pgd_restarts: int | None = None
    eot: int | None = None
    elapsed_s: float | None = None
    seed: int | None = None
    batch: int | None = None
    batch_asked: int | None = None
    attack_s: dict[str, float] = {}
    resumed_batches: int | None = None
    curve: list[Point] = []
    corruptions: Corruptions | None = None
    version: str | None = None
    level: str | None = None
    streams: str | None = None
    effort: dict[str, int] = {}
    numerics: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    subject: dict[str, JsonValue] = {}
    tasks: dict[str, int] = {}
    settings: dict[str, JsonValue] = {}


class Summary(Part):
    """A run as a report shows it.

    Attributes:
        title: with the sweep's or run's name, where the folder lies in one.
        kind: of `runs.Kind`, or "evaluation" for a folder that holds an evaluation and no run.
        status: see `inspection.state`.
        missing: sentences on what an unfinished run lacks.
        files: what -> URI.
        sources: dotted name of a number -> files below the run that it was read or computed from.
        equal: DRA against none, where all else is equal.
        finals: by role, "dra" and "baseline", or "run" for a single one.
        spent, plan: by the names that a plan has.
        findings: `findings.Findings`, as its `tree`.
    """

    kind: str
    name: str
    title: str
    status: str
    created: str | None
    description: JsonValue
    config: dict[str, JsonValue]
    versions: dict[str, str]
    hardware: JsonValue
    stages: list[Stage]
    elapsed_s: float | None
    missing: list[str]
    files: dict[str, str]
    sources: dict[str, list[str]]
    headline: str = ""
    data: dict[str, JsonValue] = {}
    teacher: Teacher | None = None
    synthetic: Synthetic | None = None
    sweep: list[Trial] = []
    asha: Asha | None = None
    equal: list[Match] = []
    pool: Pool | None = None
    train: Train | None = None
    finals: dict[str, Annotated[Evaluated | Final, Field(union_mode="left_to_right")]] = {}
    paired: Paired | None = None
    spent: dict[str, int | float] = {}
    plan: dict[str, JsonValue] = {}
    findings: dict[str, Any] | None = None

    @property
    def evaluated(self) -> dict[str, Evaluated]:
        """The finals with test scores, by role."""
        return {role: final for role, final in self.finals.items() if isinstance(final, Evaluated)}

    def tree(self) -> dict[str, Any]:
        """Plain JSON values of the fields that were set."""
        return self.model_dump(mode="json", exclude_unset=True)


Finals = Mapping[str, Evaluated]
