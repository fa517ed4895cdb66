"""`dra pool ...`: teacher pools of the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import Commands, ConfigArgument, Json, Set
from dra_ray.errors import ConfigError
from dra_ray.storage import Store

pool_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Teacher pools of the cluster that RAY_ADDRESS names."
)


@pool_app.command("status")
def pool_status(json: Json = None) -> None:
    """The pools that are up: replicas, requests, hits, retries, by teacher and by trial."""
    from dra_ray import cluster
    from dra_ray.pool import service, sources

    with cluster.connect_to_running():
        pools = [
            service.status(app)
            for app in sorted(service.applications())
            if app.startswith(sources.PREFIX)
        ]
    if json:
        Store(json).write_json([status.as_json() for status in pools])
    terminal.table([status.row() for status in pools], "teacher pools", None)
    for status in pools:
        trials = status.books.trials if status.books else {}
        rows = [
            {"trial": trial or "-", **dataclasses.asdict(totals)}
            for trial, totals in trials.items()
        ]
        terminal.table(rows, status.pool, None)


@pool_app.command("up")
def pool_up(recipe: ConfigArgument, set_: Set = None, json: Json = None) -> None:
    """Bring up the pool that a training run or sweep would use, or change its size; it stays until
    `dra pool down`.
    """
    settings = config.load(recipe, None, set_)
    experiment = getattr(settings, "base", settings)
    if not isinstance(experiment, config.Experiment):
        raise ConfigError(
            f"{recipe}: is of kind '{settings.kind}'; a pool belongs to a training run or a sweep"
        )
    experiment = experiment.with_sources()
    if not experiment.teacher.uri:
        raise ConfigError(
            "teacher.uri is not set; pass --set teacher.uri=URI (see `dra teacher list`)"
        )
    from dra_ray import cluster
    from dra_ray.pool import service

    with cluster.connect_to_running():
        app = service.up(
            experiment.teacher, experiment.pool.model_copy(update={"keep": True}), change=True
        )
        terminal.table([service.status(app).row()], "teacher pool", json)


@pool_app.command("down")
def pool_down(
    name: Annotated[
        str | None,
        typer.Argument(metavar="POOL", help="As `dra pool status` names it; default: all."),
    ] = None,
) -> None:
    """Take pools down. Runs that use one wait for it until pool.timeout_s and can be resumed."""
    from dra_ray import cluster
    from dra_ray.pool import service, sources

    with cluster.connect_to_running():
        found = sorted(app for app in service.applications() if app.startswith(sources.PREFIX))
        if name is not None and name not in found:
            raise ConfigError(
                f"there is no pool '{name}'; "
                f"{'there are ' + ', '.join(found) if found else 'none is up'}"
            )
        for app in [name] if name else found:
            service.down(app)
            terminal.err.print(f"'{app}' is down")
