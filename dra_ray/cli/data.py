"""`dra data ...`: sets of images in rows."""

from __future__ import annotations

from typing import Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import (
    Commands,
    Json,
    Name,
    Storage,
    require_writable,
    run_folder,
    to_write,
)
from dra_ray.storage import Store

data_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Sets of images in rows, for training from anywhere."
)
SetArgument = Annotated[
    str, typer.Argument(metavar="URI", help="Folder of a set: written by `dra synthesize` or here.")
]


@data_app.command("convert")
def data_convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An .npz file or a folder of them (DM-AT's), class folders, or tar shards.",
        ),
    ],
    storage_uri: Storage = "runs",
    name: Name = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of images that are decoded.")
    ] = None,
    shard_images: Annotated[
        int | None, typer.Option(min=1, help="Images per file; default: 32 MiB of them.")
    ] = None,
    block_images: Annotated[
        int | None, typer.Option(min=1, help="Neighbours in the source that are read at once.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Ray tasks at a time.")] = 2,
    json: Json = None,
) -> None:
    """Write a set in rows, shuffled once: its first images then stand for all, and trials that take
    more or fewer read the same files. synthetic.uri takes the folder.
    """
    settings = config.validate(
        config.Conversion,
        {
            "source": source,
            "resolution": resolution,
            "shard_images": shard_images,
            "block_images": block_images,
            "seed": seed,
            "workers": workers,
        },
        "dra data convert",
    )
    run = run_folder(storage_uri, name, Store(source).name.removesuffix(".npz"))
    require_writable(run)
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.data import conversion
        from dra_ray.workloads import convert as job

        conversion.check(settings)  # before Ray is started
        with cluster.connect():
            manifest = job.run(settings, run, terminal.synthetic_rows(bars))
    row = {
        "images": manifest.images,
        "classes": len(manifest.counts),
        "shards": len(manifest.shards),
        "seconds": manifest.elapsed_s,
    }
    terminal.table([row], f"{run}", json)


@data_app.command("check")
def data_check(
    uri: SetArgument,
    images: Annotated[
        int | None, typer.Option(min=1, help="Only the shards of the first ones.")
    ] = None,
    json: Json = None,
) -> None:
    """Read every shard and compare it with the index: its SHA-256, its images, its classes."""
    from dra_ray.data import checking

    with terminal.Bars() as bars:
        checked = checking.check(Store(uri), images, terminal.synthetic_rows(bars))
    terminal.table([checked.as_row()], uri, json)


@data_app.command("export")
def data_export(
    uri: SetArgument,
    to: Annotated[str, typer.Option("--to", metavar="URI", help="Folder for the tar shards.")],
) -> None:
    """Write a set as tar shards in WebDataset's layout: KEY.png and KEY.cls of every image."""
    from dra_ray.data import export

    with terminal.Bars() as bars:

        def show(done: int, total: int) -> None:
            bars.show("export", done / total, f"images exported: {done:,} of {total:,}")

        shards = export.to_tar(Store(uri), Store(to), show)
    terminal.out.print(f"{shards} shards in {to}")


@data_app.command("show")
def data_show(
    uri: SetArgument,
    sheet: Annotated[
        str | None,
        typer.Option(
            "--sheet",
            metavar="FILE",
            callback=to_write,
            help="Also write a .png of the first images of the first classes.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """What a set holds, by its index alone."""
    from dra_ray.data import checking, rows

    store = Store(uri)
    terminal.table([checking.described(rows.read_index(store))], uri, json)
    if sheet:
        from dra_ray.inspection import rows_sheet

        Store(sheet).write_bytes(rows_sheet.of_set(store))
        terminal.out.print(sheet)
