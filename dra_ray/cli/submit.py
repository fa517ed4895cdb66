"""`dra submit` hands a workload to a cluster through Ray Jobs; `dra jobs ...` looks after it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import Commands, Json, Set, Storage, run_folder, to_write, warn_of_unread
from dra_ray.errors import ConfigError, DraError, RunError, StoppedError
from dra_ray.runs import MANIFEST, read_manifest
from dra_ray.storage import Store, masked
from dra_ray.submission import work as of
from dra_ray.sweeps import schedulers, spaces

if TYPE_CHECKING:
    from dra_ray.submission.client import Jobs
    from dra_ray.submission.records import Job

STOP_S = of.STOP_WAIT_S + 60.0  # until a job that is told to stop counts as one that does not

jobs_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Jobs that `dra submit` gave to a cluster."
)
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Dashboard of the cluster, such as http://127.0.0.1:8265.",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    ),
]
JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Its id, the beginning of it, or the name of its run (the last job)."
    ),
]


def submit(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(of.KINDS)}.")],
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|FILE",
            help="A recipe's name or a .yaml file, which need not be on the cluster; evaluate "
            "takes none.",
        ),
    ] = None,
    address: Address = None,
    storage_uri: Storage = "runs",
    name: Annotated[
        str | None,
        typer.Option(help="The run's folder in the storage; default: the recipe's name."),
    ] = None,
    set_: Set = None,
    code: Annotated[
        str,
        typer.Option(
            metavar="installed|tree",
            help="Run the dra_ray that the cluster has, or this machine's, which is uploaded.",
        ),
    ] = "installed",
    follow: Annotated[
        bool,
        typer.Option("--follow/--no-follow", help="Print the job's log until it ends; or leave."),
    ] = True,
    again: Annotated[
        bool, typer.Option("--again", help="Also where a job of this work has succeeded.")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", callback=to_write, help="Also write the job as JSON."
        ),
    ] = None,
) -> None:
    """Run a workload on a cluster as a Ray job. The same command again attaches to the job that
    runs, says that it is done, or goes on with what was stopped or failed.
    """
    address = _address(address)
    work = _work(kind, recipe, address, storage_uri, name, set_, code)
    with terminal.busy(f"asking {address}"):
        jobs = _jobs(address)
        submitted = jobs.submit(work, "tree" if code == "tree" else "installed", again)
    job, run = submitted.job, work.run
    if submitted.outcome == "done":
        terminal.err.print(
            f"job '{job.id}' has succeeded: '{run}' is done; --again submits it anew"
        )
    elif submitted.outcome == "attached":
        terminal.err.print(f"job '{job.id}' runs already for '{run}'; attaching to it")
        if job.exact != work.exact:
            terminal.alert.print(
                "note: it runs with other fields that change no result, such as resources or a "
                f"budget; `dra jobs stop {job.id}` and submit again to use these"
            )
    else:
        terminal.err.print(f"submitted job '{job.id}' for '{run}'")
    if follow and submitted.outcome != "done":
        job = _followed(jobs, job, json)
        return
    if json:
        _write(json, job)
    terminal.out.print(job.id)


def _work(
    kind: str,
    recipe: str | None,
    address: str,
    storage_uri: str,
    name: str | None,
    set_: list[str] | None,
    code: str,
) -> of.Work:
    """What is to be run, checked as far as this machine can."""
    of.require_kind(kind)
    if code not in ("installed", "tree"):
        raise ConfigError(f"--code '{code}': write installed or tree")
    reads = of.KINDS[kind][1]
    if reads is None and (recipe or set_):
        raise ConfigError(f"{kind} takes no RECIPE and no --set; name the run with --name")
    if reads is not None and recipe is None:
        raise ConfigError(f"RECIPE|FILE is not given; name one for {kind} (see `dra recipes`)")
    if reads is None and name is None:
        raise ConfigError(f"--name is not given; name the run that is to be used by {kind}")
    storage = of.placed(storage_uri, address, "--storage")
    run = run_folder(storage, name, recipe or "")
    if reads is None:
        return of.Work(kind, storage, run.name, None)
    settings = config.load(recipe or "", reads, set_)
    if isinstance(settings, config.Experiment | config.Sweep):
        warn_of_unread(settings, set_)
        _require_sources(settings)
    return of.Work(
        kind,
        storage,
        run.name,
        of.located(settings, address, "tree" if code == "tree" else "installed"),
    )


def _require_sources(settings: config.Experiment | config.Sweep) -> None:
    """`ConfigError` where a teacher or images are needed and not named."""
    if isinstance(settings, config.Experiment):
        settings.with_sources()
        return
    schedulers.require_known(settings.scheduler)
    for experiment in spaces.experiments(settings).values():
        experiment.with_sources()


# -- dra jobs --------------------------------------------------------------------------------------
@jobs_app.command("list")
def list_(address: Address = None, json: Json = None) -> None:
    """The cluster's jobs, the oldest first."""
    found = _open(address).jobs()
    if json:
        Store(json).write_json([_facts(job) for job in found])
    now = time.time()
    rows = [
        {
            "job": job.id,
            "status": job.status.lower(),
            "run": job.run,
            "age": terminal.duration(now - job.started) if job.started else "",
            "took": terminal.duration((job.ended or now) - job.started) if job.started else "",
        }
        for job in found
    ]
    if rows:
        terminal.table(rows, "jobs")
    else:
        terminal.err.print("there are no jobs")


@jobs_app.command()
def logs(job: JobArgument, address: Address = None) -> None:
    """Print what a job has said so far."""
    jobs = _open(address)
    show = _Lines()
    show(jobs.log(jobs.named(job).id))
    show.end()


@jobs_app.command("follow")
def follow_(job: JobArgument, address: Address = None, json: Json = None) -> None:
    """Print a job's log until the job ends. Exit code: 0 where it succeeded, 1 where it failed, 3
    where it was stopped. Ctrl-C leaves the job alone.
    """
    jobs = _open(address)
    _followed(jobs, jobs.named(job), json)


@jobs_app.command()
def stop(job: JobArgument, address: Address = None) -> None:
    """End a job after its step under way, with a checkpoint; waits until it has ended and says what
    its run's folder holds.
    """
    jobs = _open(address)
    meant = jobs.named(job)
    if meant.has_ended:
        terminal.err.print(f"job '{meant.id}' has ended already: {meant.status.lower()}")
    else:
        with terminal.busy(f"stopping '{meant.id}'"):
            meant = jobs.stop(meant.id, STOP_S)
        terminal.err.print(f"job '{meant.id}': {meant.status.lower()}")
    if meant.run:
        terminal.out.print(_kept(meant.run))


def _kept(run: str) -> str:
    """What a run's folder holds, in words."""
    try:
        folder = Store(run)
        manifest, files = read_manifest(folder), folder.files()
    except DraError as error:
        return f"'{run}' cannot be read from here ({error})"
    if manifest is None:
        return f"'{run}' holds no {MANIFEST}: the run had not begun"
    checkpoints = {
        path.rpartition("/")[0]
        for path in files
        if path.rpartition("/")[0].rpartition("/")[2].startswith("checkpoint_")
    }
    count = len(checkpoints)
    return (
        f"'{run}' ({manifest.status}) holds {count} checkpoint{'s' * (count != 1)} and "
        f"{len(files)} files; the same `dra submit` goes on from there"
    )


# -- shared ----------------------------------------------------------------------------------------
def _address(address: str | None) -> str:
    if not address:
        raise ConfigError(
            "--address is not given, nor is RAY_API_SERVER_ADDRESS; give the URL of the cluster's "
            "dashboard, such as http://127.0.0.1:8265"
        )
    from dra_ray.submission import door

    return door.checked(address)


def _jobs(address: str) -> Jobs:
    from dra_ray.submission import door

    door.opened(address)  # before Ray is imported, which may take longer than its answer
    from dra_ray.submission.client import Jobs

    return Jobs(address)


def _open(address: str | None) -> Jobs:
    address = _address(address)
    with terminal.busy(f"asking {address}"):
        return _jobs(address)


def _followed(jobs: Jobs, job: Job, json: str | None) -> Job:
    """The job, once it has succeeded; `StoppedError` or `RunError` else."""
    show = _Lines()
    try:
        job = jobs.follow(job.id, show)
    except KeyboardInterrupt:
        terminal.alert.print(
            f"job '{job.id}' goes on without this command: `dra jobs follow {job.id}`, "
            f"`dra jobs stop {job.id}`"
        )
        raise typer.Exit from None
    finally:
        show.end()
    if json:
        _write(json, job)
    if job.status == "SUCCEEDED":
        terminal.err.print(f"job '{job.id}' succeeded")
        return job
    if job.status == "STOPPED":
        raise StoppedError(f"job '{job.id}' was stopped; the same `dra submit` goes on with it")
    raise RunError(f"job '{job.id}' failed ({_why(job)}); its log is `dra jobs logs {job.id}`")


def _why(job: Job) -> str:
    if job.exit_code is not None and job.exit_code < 0:
        return f"its driver was ended by signal {-job.exit_code}"
    if job.exit_code is not None:
        return f"exit code {job.exit_code}"
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


class _Lines:
    """Prints text that comes in parts, whole lines at a time."""

    def __init__(self) -> None:
        self._begun = ""

    def __call__(self, text: str) -> None:
        *lines, self._begun = (self._begun + text).split("\n")
        self._print(lines)

    def end(self) -> None:
        self._print([self._begun] if self._begun else [])
        self._begun = ""

    def _print(self, lines: Sequence[str]) -> None:
        for line in lines:
            terminal.out.print(masked(line.expandtabs()))


def _facts(job: Job) -> dict[str, object]:
    return {
        name: value
        for name, value in dataclasses.asdict(job).items()
        if name not in ("exact", "message")
    }


def _write(file: str, job: Job) -> None:
    Store(file).write_json(_facts(job))
