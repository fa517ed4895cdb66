"""What an evaluation writes: `autoattack.json` as a record. The fields are the file's keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dra_ray.errors import DataError
from dra_ray.storage import Store

FILE = "autoattack.json"  # in the evaluation's folder; written last
Interval = tuple[float, float]  # 95 %, Wilson


class Record(BaseModel):
    """Frozen; keys of other versions are kept, so that what is read and written again loses
    nothing.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    def given(self) -> dict[str, Any]:
        """The fields that were set, as they are."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def tree(self) -> dict[str, Any]:
        """Plain JSON values of the fields that were set."""
        return self.model_dump(mode="json", exclude_unset=True)


class Threat(Record):
    """`eps_255` in pixel steps of 1/255."""

    norm: str = "linf"
    eps_255: float | None = None


class Point(Record):
    """Accuracy under PGD at another radius."""

    eps_255: float
    accuracy: float
    interval: Interval | None = None


class Corrupted(Record):
    name: str
    severity: int
    accuracy: float


class Corruptions(Record):
    """Accuracies on corrupted images; `source` is the folder, or "generated"; `published_sets` says
    whether `rows` are those of published means.
    """

    rows: list[Corrupted]
    mean: float
    source: str = ""
    by_corruption: dict[str, float] = {}
    published_sets: bool = False


class Summary(Record):
    """Accuracies in 0..1 with their 95 % intervals, what they depend on, and what to know before
    believing them.

    What has no default here is in the file of every version; the rest may be absent from files of
    earlier ones, `curve` and `corruptions` also where they are not asked for.

    Attributes:
        images: how many.
        interval: of autoattack_accuracy.
        after_attack: attack -> accuracy after it and those before.
        attack_s: stage -> seconds of work, summed over batches.
        score: the name of the accuracy that counts.
        numerics: what the first batch was computed with.
    """

    images: int
    clean_accuracy: float
    autoattack_accuracy: float
    interval: Interval
    after_attack: dict[str, float]
    clean_interval: Interval | None = None
    pgd_accuracy: float | None = None
    pgd_interval: Interval | None = None
    pgd_worst_accuracy: float | None = None
    after_attack_interval: dict[str, Interval] = {}
    attack_s: dict[str, float] = {}
    threat: Threat = Threat()
    randomised: bool = False
    score: str = "autoattack_accuracy"
    flags: list[str] = []
    numerics: dict[str, Any] = {}  # as torch reports them
    version: str = "standard"
    level: str = "reference"
    streams: str = "batch"
    seed: int | None = None
    pgd_steps: int | None = None
    pgd_restarts: int = 1
    eot: int = 1
    curve: list[Point] = []
    corruptions: Corruptions | None = None


class Result(Summary):
    """A summary and how it came about.

    Attributes:
        batch: images per batch, as attacked; batch_asked: as configured.
        subject, settings: what was evaluated, and all that the verdicts depend on; `digest` is of
            them.
        tasks: stage -> batches; tasks_run of them in this call, resumed_batches were stored.
    """

    batch: int | None = None
    batch_asked: int | None = None
    subject: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    effort: dict[str, int] = {}
    elapsed_s: float | None = None
    resumed_batches: int | None = None
    tasks_run: int | None = None
    tasks: dict[str, int] = {}
    versions: dict[str, str] = {}
    digest: str | None = None


def read(folder: Store) -> Result:
    """The result in an evaluation's folder; `DataError` for what is none, `StorageError` where
    there is no file.
    """
    file = folder / FILE
    return parse(file.read_json(), file)


def parse(tree: object, file: Store) -> Result:
    """The content of `file` as a record; `DataError` names the first field that is missing or
    wrong.
    """
    if not isinstance(tree, dict):
        raise DataError(f"'{file}' holds no object; run the evaluation again")
    try:
        return Result.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        problem = "has no" if first["type"] == "missing" else f"({first['msg']}) has a wrong"
        raise DataError(f"'{file}' {problem} '{field}'; run the evaluation again") from None
