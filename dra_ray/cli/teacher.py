"""`dra teacher ...`: train, import and look at diffusion teachers."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import (
    Commands,
    ConfigArgument,
    DataSet,
    Device,
    Json,
    Name,
    Set,
    Storage,
    TeacherArgument,
    announce,
    data_settings,
    numbers,
    run_folder,
    teacher_uri,
    to_write,
)
from dra_ray.storage import Store

teacher_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Diffusion teachers.")


@teacher_app.command("train")
def teacher_train(
    recipe: ConfigArgument = "digits-edm",
    set_: Set = None,
    storage_uri: Storage = "runs",
    name: Name = None,
    json: Json = None,
) -> None:
    """Train a class-conditional EDM on real images; its folder is what teacher.uri takes."""
    settings = config.load(recipe, config.TeacherTraining, set_)
    run = run_folder(storage_uri, name, recipe)
    announce(run, "teacher", settings)
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.workloads import train_teacher as job

        job.check(settings)  # before Ray is started
        with cluster.connect():
            manifest = job.fit(settings, run, terminal.teacher_rows(bars, settings))
    terminal.table(
        [
            {
                "images_seen": manifest.images_seen,
                "sigma_data": manifest.sigma_data,
                "elapsed_s": manifest.elapsed_s,
                "teacher_digest": manifest.teacher_digest,
            }
        ],
        f"{run}",
        json,
    )


@teacher_app.command("import")
def teacher_import(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A published EDM pickle, at a path or any URI.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="URI", help="The teacher's new folder, which teacher.uri takes."
        ),
    ],
    json: Json = None,
) -> None:
    """Turn a published EDM pickle into a teacher's folder (safetensors and a card) without
    executing anything of it.
    """
    from dra_ray.teachers import official

    card = official.import_edm(Store(source), Store(to))
    facts = {
        "file": card["source"]["file"],
        "class": card["source"]["class"],
        "sha256": card["source"]["sha256"][:16],
        "digest": card["digest"][:16],
    }
    terminal.table([facts], to, json)
    terminal.err.print(f"note: {card['licence']}")


@teacher_app.command("import-dit")
def teacher_import_dit(
    dit: Annotated[
        str,
        typer.Argument(
            metavar="DIT", help="A published LightningDiT checkpoint, at a path or any URI."
        ),
    ],
    vae: Annotated[str, typer.Argument(metavar="VAE", help="The published VA-VAE checkpoint.")],
    stats: Annotated[str, typer.Argument(metavar="STATS", help="The published latents_stats.pt.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="URI", help="The teacher's new folder, which teacher.uri takes."
        ),
    ],
    massive: Annotated[
        str,
        typer.Option(
            metavar="CHANNELS",
            help="Massive channels, which features go without; empty for none. The default is of "
            "XL/1.",
        ),
    ] = "1053,259",
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels a side of the students' images; default: the autoencoder's 256."
        ),
    ] = None,
    decoder: Annotated[
        bool,
        typer.Option(
            "--decoder", help="Keep the autoencoder's decoder, which `dra synthesize` needs."
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Turn a published LightningDiT with its VA-VAE into a teacher's folder. Files are read
    weights-only: nothing of them is executed.
    """
    channels = numbers("--massive", massive, int)
    from dra_ray.teachers import official_dit

    card = official_dit.import_dit(
        Store(dit),
        Store(vae),
        Store(stats),
        Store(to),
        massive=channels,
        resolution=resolution,
        decoder=decoder,
    )
    facts = {
        "file": card["source"]["dit"]["file"],
        "sha256": card["source"]["dit"]["sha256"][:16],
        "digest": card["digest"][:16],
    }
    terminal.table([facts], to, json)
    terminal.err.print(f"note: {card['licence']}")


@teacher_app.command("latents")
def teacher_latents(
    vae: Annotated[str, typer.Argument(metavar="VAE", help="The published VA-VAE checkpoint.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FILE",
            help="The .safetensors file to write, which import-dit takes as STATS.",
        ),
    ],
    set_: DataSet = None,
    images: Annotated[
        int,
        typer.Option(
            min=1, help="The first so many training images; the published ones are of 10,000."
        ),
    ] = 10_000,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Measure the mean and deviation of an autoencoder's latents on your images: --set
    name=imagenet --set uri=URI --set resolution=256.
    """
    settings = data_settings(set_ or [])
    from dra_ray.inspection import latents

    terminal.table(
        latents.latent_statistics(Store(vae), settings, images, Store(to), device),
        f"latents of {vae}",
        json,
    )
    terminal.out.print(to)


@teacher_app.command("list")
def teacher_list(json: Json = None) -> None:
    """Teachers that come with the package: teacher.uri=package:NAME, or the printed folder."""
    rows = [
        {"name": f"package:{name}", "folder": config.teacher_path(f"package:{name}")}
        for name in config.teacher_names()
    ]
    terminal.table(rows, "teachers in the package", json)


@teacher_app.command("probe")
def teacher_probe(
    teacher: TeacherArgument,
    set_: DataSet = None,
    sigmas: Annotated[
        str, typer.Option(help="Noise levels; a flow's time t is sigma = (1-t)/t.")
    ] = "0.02,0.06,0.14,0.3",
    layers: Annotated[
        str,
        typer.Option(
            help="Names with commas between them, or all; default: five, from first to last."
        ),
    ] = "",
    images: Annotated[
        int, typer.Option(min=2, help="Training images, and at most as many held-out ones.")
    ] = 2000,
    label: Annotated[
        str,
        typer.Option(
            help="null or true: the class that the teacher is given; true leaks the answer."
        ),
    ] = "null",
    seed: int = 0,
    device: Device = "cpu",
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            callback=to_write,
            help="Also write an .html page with a plot.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """What a teacher's features can teach, by layer and noise level: where align.sigma and
    teacher.layer may come from. Take none whose probe is not above that of raw pixels.
    """
    levels = numbers("--sigmas", sigmas, float)
    names = [name.strip() for name in layers.split(",") if name.strip()]
    uri = teacher_uri(teacher)
    rows = []
    with terminal.Bars() as bars:
        from dra_ray.inspection import diagnosis as job

        def show(done: int, of: int) -> None:
            bars.show("probe", done / of, f"probing: {done} of {of}")

        for row in job.probe_teacher(
            Store(uri),
            set_ or [],
            levels,
            names,
            images,
            label=label,
            seed=seed,
            threads=os.cpu_count() or 1,
            device=device,
            progress=show,
        ):
            rows.append(row)
            bars.say(f"{row['layer']} at sigma {row['sigma']:g}: {job.in_words(row)}")
    terminal.table(rows, f"what {teacher} can teach", json, hidden=job.IN_FILES_ALONE)
    if out:
        from dra_ray.report import probes

        probes.write(
            Store(out),
            teacher,
            {
                "images": images,
                "label": label,
                "seed": seed,
                "set": " ".join(set_ or []) or "as trained",
            },
            rows,
        )
        terminal.out.print(out)


@teacher_app.command("statistics")
def teacher_statistics(
    teacher: TeacherArgument,
    set_: DataSet = None,
    sigma: Annotated[
        float, typer.Option(min=0, help="Noise level; a flow's time t is sigma = (1-t)/t.")
    ] = 0.06,
    layer: Annotated[str | None, typer.Option(help="Default: the feature's.")] = None,
    whiten_dim: Annotated[
        int, typer.Option(min=1, help="Directions that whitening keeps: align.whiten_dim.")
    ] = 16,
    images: Annotated[
        int, typer.Option(min=2, help="Training images measured: align.statistics_images.")
    ] = 2048,
    label: Annotated[str, typer.Option(help="true or null, as teacher.label.")] = "null",
    seed: int = 0,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Along how many directions a teacher's features vary, and what each align.transform makes of
    them.
    """
    options = config.validate(config.Teacher, {"label": label, "layer": layer}, "teacher")
    align = {"sigma": sigma, "whiten_dim": whiten_dim, "statistics_images": images}
    from dra_ray.inspection import diagnosis

    variance, rows = diagnosis.teacher_statistics(
        Store(teacher_uri(teacher)),
        set_ or [],
        options,
        config.validate(config.Align, align, "statistics"),
        seed=seed,
        threads=os.cpu_count() or 1,
        device=device,
    )
    terminal.table(variance, f"share of the variance of {teacher}")
    hidden = (*diagnosis.IN_FILES_ALONE, "layer", "sigma")
    terminal.table(rows, "what a transform gives", json, hidden)


@teacher_app.command("quality")
def teacher_quality(
    synthetic: Annotated[
        str,
        typer.Argument(
            metavar="SYNTHETIC",
            help="Folder written by `dra synthesize`, or .npz files in DM-AT's layout.",
        ),
    ],
    set_: DataSet = None,
    images: Annotated[int, typer.Option(min=2, help="The first so many images.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the small students.")] = 400,
    run: Annotated[
        str | None,
        typer.Option(help="A training run whose student is asked what it makes of the labels."),
    ] = None,
    seed: int = 0,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """How well a synthetic set teaches, and whether it copies training images. Downloads nothing;
    --set says which data, such as name=cifar10.
    """
    settings = data_settings(set_ or [])
    with terminal.Bars() as bars:
        from dra_ray.inspection import quality

        report = quality.synthetic_quality(
            Store(synthetic),
            settings,
            images=images,
            steps=steps,
            run=Store(run) if run else None,
            seed=seed,
            device=device,
            say=bars.say,
        )
    terminal.table(quality.quality_rows(report), f"{synthetic}: {report['images']} images", None)
    if json:
        Store(json).write_json(report)


@teacher_app.command("massive")
def teacher_massive(
    teacher: TeacherArgument,
    set_: DataSet = None,
    sigma: Annotated[
        float, typer.Option(min=0, help="Noise level; a flow's time t is sigma = (1-t)/t.")
    ] = 1 / 3,
    layer: Annotated[str | None, typer.Option(help="Default: the feature's.")] = None,
    images: Annotated[int, typer.Option(min=1)] = 64,
    json: Json = None,
) -> None:
    """Massive channels of a transformer's residual stream: what `import-dit --massive` takes."""
    from dra_ray.inspection import massive

    channels = massive.teacher_massive_channels(
        Store(teacher_uri(teacher)), set_ or [], sigma, layer, images
    )
    terminal.table(
        [{"channel": channel} for channel in channels], f"massive channels of {teacher}", json
    )
