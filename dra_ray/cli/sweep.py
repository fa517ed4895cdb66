"""`dra sweep RECIPE` runs a sweep; `dra sweep stop|rerun|add` ask something of one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dra_ray import config, runs
from dra_ray.cli import terminal
from dra_ray.cli.options import (
    Check,
    Commands,
    ConfigArgument,
    Json,
    Name,
    Set,
    Storage,
    announce,
    look_at_targets,
    require_teachers,
    run_folder,
    warn_of_unread,
)
from dra_ray.config.reading import parse_settings
from dra_ray.config.text import refusal
from dra_ray.storage import Store
from dra_ray.sweeps import orders, spaces


class _OrRun(Commands):
    """A group whose first argument may be a recipe: then `run` is meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options before the recipe are those of `run`."""
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=_OrRun,
    no_args_is_help=True,
    help="Many runs sharing one teacher pool: `dra sweep RECIPE|FILE`, and what can be asked of a "
    "sweep meanwhile. Options of a run: `dra sweep run --help`.",
)
SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="Folder of a sweep: any URI.")]
TrialArgument = Annotated[str, typer.Argument(metavar="TRIAL", help="Such as trial-003.")]


@sweep_app.command()
def run(
    file: ConfigArgument,
    set_: Set = None,
    storage_uri: Storage = "runs",
    name: Name = None,
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Also evaluate the best trials, as `dra evaluate` does."),
    ] = False,
    check: Check = True,
    json: Json = None,
) -> None:
    """Train many students, sharing one teacher pool; the best with and without alignment go to the
    full budget. `run` may be left out.
    """
    settings = config.load(file, config.Sweep, set_)
    warn_of_unread(settings, set_)
    experiments = [e.with_sources() for e in spaces.experiments(settings).values()]
    require_teachers(experiments)
    folder = run_folder(storage_uri, name, file)
    starts = announce(folder, "sweep", settings)
    with terminal.Bars() as bars:
        from dra_ray import cluster, report
        from dra_ray.report import planned
        from dra_ray.workloads import sweep as job

        trials = job.looked_at(settings, folder.resolved())  # before Ray is started
        if check and starts:
            look_at_targets(bars, experiments)
        with cluster.connect():
            show = terminal.sweep_rows(bars, settings)
            manifest = job.run(settings, folder, show, trials=trials)
            if evaluate and manifest.is_done:
                from dra_ray.workloads import evaluate as evaluation

                finalists = runs.finalists(folder.resolved())
                judged = terminal.evaluate_rows(bars, len(finalists))
                evaluation.evaluate_many(list(finalists.values()), progress=judged)
    terminal.table(report.rows(folder.resolved()), f"trials of {folder}", json)
    text, recipe = report.answered(folder.resolved(), settings)
    terminal.out.print(text)
    if manifest.plan:
        compared = planned.compare(manifest.plan, planned.spent(manifest))
        terminal.out.print(planned.sentence(manifest.plan, compared))
    if manifest.paused:
        terminal.out.print(
            f"paused: {manifest.paused}; start the same command with a larger budget to go on"
        )
        return
    best = {"dra": "best with alignment", "baseline": "best without"}
    for role, trial in manifest.finals.items():
        terminal.out.print(f"{best.get(role, role)}: {trial}")
    terminal.out.print("next:")
    if recipe:
        terminal.out.print(f"  dra train {recipe}")
    if not evaluate:
        terminal.out.print(f"  dra evaluate {folder}")
    terminal.out.print(f"  dra report {folder}")


@sweep_app.command()
def stop(sweep: SweepArgument, trial: TrialArgument) -> None:
    """End a trial after its step under way, with a checkpoint; the sweep goes on."""
    _order(sweep, orders.Order("stop", trial))


@sweep_app.command()
def rerun(sweep: SweepArgument, trial: TrialArgument) -> None:
    """Let a trial that failed or was stopped go on from its last checkpoint."""
    _order(sweep, orders.Order("rerun", trial))


@sweep_app.command()
def add(
    sweep: SweepArgument,
    point: Annotated[
        list[str] | None,
        typer.Argument(metavar="FIELD=VALUE...", help="Values of the axes; base's where missing."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead of a point: let the search have so many trials in all, by its sampler's "
            "further suggestions or the rest of its grid.",
        ),
    ] = None,
) -> None:
    """Add a trial, or more trials of the search, to a sweep that runs, or is done: then start its
    command again.
    """
    if bool(point) == bool(trials):
        raise refusal("name either a point to add, such as align.weight=3, or --trials N")
    _order(
        sweep, orders.Order("add", point=parse_settings(point or [], "point"), trials=trials or 0)
    )


def _order(sweep: str, order: orders.Order) -> None:
    from dra_ray.storage.lease import has_driver

    folder = Store(sweep)
    orders.give(folder, order)
    if has_driver(folder):
        terminal.out.print("its driver does that within seconds")
    else:
        terminal.out.print("no driver runs: start the sweep's command again")
