"""`dra canonical ...`: canonical samples of training images (arXiv 2506.09955)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import (
    Commands,
    ConfigArgument,
    Json,
    Name,
    Set,
    Storage,
    require_teacher,
    require_writable,
    run_folder,
)
from dra_ray.storage import Store

canonical_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Canonical samples of training images (CLAReps)."
)


@canonical_app.command("make")
def canonical_make(
    recipe: ConfigArgument = "fashion-canonical",
    set_: Set = None,
    storage_uri: Storage = "runs",
    name: Name = None,
    json: Json = None,
) -> None:
    """Make canonical samples with a class-conditional teacher; canonical.uri takes the folder."""
    settings = config.load(recipe, config.Canonical, set_)
    if settings.teacher is not None:
        require_teacher(settings.teacher)
    run = run_folder(storage_uri, name, recipe)
    require_writable(run)
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.workloads import canonical as job

        job.check(settings)  # before Ray is started
        with cluster.connect():
            manifest = job.run(settings, run, terminal.canonical_rows(bars))
    terminal.table([{"images": manifest.images, **manifest.canonical}], f"{run}", json)


@canonical_app.command("show")
def canonical_show(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Folder written by `dra canonical make`.")
    ],
    json: Json = None,
) -> None:
    """What a set is like: how many samples its judge accepts, how far they are from the originals,
    how well features fall into classes before and after, and where the sheet is.
    """
    from dra_ray.inspection import canonical_set

    shown = canonical_set.show(Store(uri))
    terminal.table([dataclasses.asdict(shown)], uri, json)
