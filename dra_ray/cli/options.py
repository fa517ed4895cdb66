"""Options and arguments that several commands share, and how their text becomes values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from dra_ray import config, runs
from dra_ray.cli import terminal
from dra_ray.config.readers import unread
from dra_ray.errors import ConfigError
from dra_ray.storage import Store, folder_name
from dra_ray.teachers import cards


class Commands(TyperGroup):
    """A group whose list shows the first paragraph of a command's help as running text: Typer would
    keep the line ends of the docstring.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in self.commands.values():
            first = inspect.cleandoc(command.help or "").partition("\n\n")[0]
            command.short_help = command.short_help or " ".join(first.split())


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the config, such as optim.epochs=2; may be repeated.",
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        "--storage", metavar="URI", help="Folder of runs: a path, s3://bucket/runs, gs://..."
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        help="The run's folder in the storage; default: the recipe's name. An unfinished run is "
        "resumed."
    ),
]


def to_write(file: str | None) -> str | None:
    """Of an option that names a file: `StorageError` at once, and not after the work."""
    if file and file != "-":
        Store(file).require_place()
    return file


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=to_write,
        help="Also write the printed table to this file, as JSON.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Batches that are attacked at the same time.")
]
ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|FILE",
        help="A recipe's name (see `dra recipes`) or a .yaml file at any URI.",
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="First look, for seconds, at what the teacher's features can teach; warns where it "
        "is little.",
    ),
]
TeacherArgument = Annotated[
    str,
    typer.Argument(
        metavar="TEACHER", help="Folder of a teacher: a path, any URI, or package:NAME."
    ),
]
DataSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of the data, such as name=cifar10 or uri=...; may be repeated.",
    ),
]


def usable_device(name: str) -> str:
    """A device by its name in torch; `ConfigError` where torch cannot compute on it."""
    if name == "cpu":  # without importing torch
        return name
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
        raise ConfigError(
            f"--device {name}: torch cannot compute on it here ({why}); write cpu, or cuda or "
            "cuda:N where there is such a GPU"
        ) from None
    return name


Device = Annotated[
    str, typer.Option(help="Of torch, such as cpu or cuda:1.", callback=usable_device)
]
EvaluationSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="name=cifar10 or uri=... of the data, evaluation.batch=64, "
        "resources.gpus_per_worker=1, ...",
    ),
]
Number = TypeVar("Number", int, float)
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a run: a path or any URI.")
]


def teacher_uri(uri: str) -> str:
    """A teacher's URI, `package:NAME` spelled out."""
    return config.validate(config.Teacher, {"uri": uri}, "teacher").uri or uri


def require_teacher(uri: str) -> None:
    """`CheckpointError` where a folder holds no teacher: before torch and Ray are imported."""
    cards.read_card(Store(uri))


def require_teachers(experiments: Iterable[config.Experiment]) -> None:
    """`CheckpointError` where an experiment that aligns names a folder without a teacher."""
    for uri in dict.fromkeys(e.teacher.uri for e in experiments if e.teachers):
        if uri is not None:
            require_teacher(uri)


def warn_of_unread(settings: config.Config, given: list[str] | None) -> None:
    """A note for each field of `--set` that nothing reads, such as loss.alpha beside TRADES. Fields
    of recipes are not named: they are there for another choice.
    """
    flat = dict(config.flatten(settings.model_dump(mode="json")))
    of_trials = settings.possible() if isinstance(settings, config.Sweep) else None
    for field in config.parse_settings(given or []):
        if of_trials and field.startswith("base."):
            why = unread(field.removeprefix("base."), of_trials, "base.")
        else:
            why = unread(field, lambda other: [flat.get(other)])
        if why:
            terminal.err.print(f"note: {field} changes nothing: {why}")


def data_settings(settings: list[str]) -> config.Data:
    """Data by its fields; what is left out has the data set's usual values."""
    return config.validate(config.Data, config.parse_settings(settings), "--set")


def numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas between them") from None


def run_folder(storage_uri: str, name: str | None, recipe: str) -> Store:
    """The folder NAME of a run; `ConfigError` for a name that is not one folder's."""
    if name is None:
        name = recipe.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return Store(storage_uri) / folder_name(name)


def require_writable(run: Store) -> None:
    if not (run / runs.MANIFEST).exists():
        run.probe()


def announce(run: Store, kind: runs.Kind, settings: config.Frozen) -> bool:
    """Fail before Ray starts where the run's folder cannot be used; say what will happen. Returns
    whether the run starts anew.
    """
    manifest = runs.check_run(
        run.resolved(), kind, settings.model_dump(mode="json"), settings.digest()
    )
    word = (
        "starting" if manifest is None else "resuming" if not manifest.is_done else "already done:"
    )
    terminal.err.print(f"{word} '{run}'")
    return manifest is None


def look_at_targets(bars: terminal.Bars, experiments: Sequence[config.Experiment]) -> None:
    """Before aligned runs: what their teachers' features can teach, as a table and in words."""
    if not any(e.teachers for e in experiments):
        return
    bars.stage("looking at the teacher's features")
    from dra_ray.inspection import diagnosis

    check = diagnosis.check(experiments, threads=os.cpu_count() or 1)
    if check.rows:
        hidden = diagnosis.IN_FILES_ALONE
        for line in terminal.lines(check.rows, "targets", terminal.err.width, hidden):
            bars.say(line)
    for line in check.warnings:
        bars.say(f"warning: {line}")


def require_free(root: Store, name: str) -> Store:
    """The first of NAME, NAME-2, ... that is not there yet."""
    number = 1
    while (run := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return run
