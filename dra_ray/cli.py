"""The `dra` command: parse, check, say what will run, call one function, print.

Everything that is slow to import (torch, Ray) is imported inside a command, after its arguments were found good.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Annotated, Any, TypeVar

import typer

from dra_ray import config, storage, terminal
from dra_ray.errors import ConfigError, DraError
from dra_ray.storage import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Robust image classifiers with diffusion teachers, on Ray."
)
bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks: ratios measured in one run on this machine.")
app.add_typer(bench_app, name="bench")
pool_app = typer.Typer(no_args_is_help=True, help="Teacher pools of the cluster that RAY_ADDRESS names.")
app.add_typer(pool_app, name="pool")
teacher_app = typer.Typer(no_args_is_help=True, help="Diffusion teachers.")
app.add_typer(teacher_app, name="teacher")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the config, such as optim.epochs=2; may be repeated.")
]
Storage = Annotated[str, typer.Option("--storage", metavar="URI", help="Folder of runs: a path, s3://bucket/runs, gs://...")]
Name = Annotated[str | None, typer.Option(help="The run's folder in the storage; default: the recipe's name. An unfinished run is resumed.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the printed table to this file, as JSON.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Batches that are attacked at the same time.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe's name (see `dra recipes`) or a .yaml file at any URI.")]
TeacherArgument = Annotated[str, typer.Argument(metavar="TEACHER", help="Folder of a teacher: a path, any URI, or package:NAME.")]
DataSet = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the data, such as name=cifar10 or uri=...; may be repeated.")
]
EvaluationSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="name=cifar10 or uri=... of the data, evaluation.batch=64, resources.gpus_per_worker=1, ..."),
]
Number = TypeVar("Number", int, float)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: a path or any URI.")]


@app.command()
def quickstart(
    name: Annotated[str, typer.Option(help="The run's folder in the storage.")] = "quickstart",
    storage_uri: Storage = "runs",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, under the first free name; nothing is deleted.")] = False,
    set_: Set = None,
) -> None:
    """The main job on real digits, in about ten minutes on two cores: teacher, synthetic images, sweep, AutoAttack, report.

    Run it again to resume it, or to hear that it is done.
    """
    settings = config.load("quickstart", config.Quickstart, set_)
    run = _free(Store(storage_uri), name) if fresh else Store(storage_uri) / name
    found = storage.check_run(run.resolved(), "quickstart", settings.model_dump(mode="json"), settings.digest())
    report = run.resolved() / "report.html"
    if found and found["status"] == "done" and report.exists():
        terminal.err.print(f"run '{run}' is done; start anew with --fresh")
        terminal.out.print(str(report))
        return
    sweep = settings.sweep
    parts = (
        f"teacher on {settings.teacher.images_seen:,} images",
        f"{settings.synthesis.images:,} synthetic images",
        f"{len(sweep.experiments())} trials of up to {sweep.base.optim.epochs} epochs",
        f"AutoAttack on {sweep.base.data.test_images} test images, twice",
    )
    terminal.err.print(f"{'resuming' if found else 'starting'} '{run}': {', '.join(parts)}")
    with terminal.Bars() as bars:
        bars.say("starting Ray on this machine (about 10 s)")
        from dra_ray import cluster
        from dra_ray import quickstart as job

        rows = {
            "teacher": terminal.teacher_rows(bars, settings.teacher),
            "synthetic": terminal.synthetic_rows(bars),
            "sweep": terminal.sweep_rows(bars, sweep),
            "autoattack": terminal.evaluate_rows(bars, 2),
        }
        with cluster.connect():
            report = job.run(settings, run, lambda stage, row: rows[stage](row))
    terminal.out.print(str(report))


@app.command()
def train(recipe: ConfigArgument, set_: Set = None, storage_uri: Storage = "runs", name: Name = None, json: Json = None) -> None:
    """Train one student with TRADES, and DRA where align.weight is above 0."""
    experiment = config.load(recipe, config.Experiment, set_).with_sources()
    run = _run(storage_uri, name, recipe)
    _announce(run, "train", experiment)
    if experiment.model.name.startswith("timm/") and not experiment.model.weights:
        terminal.err.print(f"note: '{experiment.model.name}' starts from random weights; give pretrained ones with --set model.weights=URI")
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray import train as job

        with cluster.connect():
            row = job.fit(experiment, run, terminal.train_rows(bars, experiment))
    terminal.table([row], f"last epoch of {run}", json)


@app.command()
def sweep(file: ConfigArgument, set_: Set = None, storage_uri: Storage = "runs", name: Name = None, json: Json = None) -> None:
    """Train many students under ASHA, sharing one teacher pool; the best with and without alignment go to the full budget."""
    settings = config.load(file, config.Sweep, set_)
    for experiment in settings.experiments().values():
        experiment.with_sources()
    run = _run(storage_uri, name, file)
    _announce(run, "sweep", settings)
    with terminal.Bars() as bars:
        from dra_ray import cluster, report
        from dra_ray import sweep as job

        with cluster.connect():
            job.run(settings, run, terminal.sweep_rows(bars, settings))
    terminal.table(report.rows(run.resolved()), f"trials of {run}", json)


@app.command()
def evaluate(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A run's folder, a checkpoint, timm/NAME, module:function (gives a torch module), or robustbench:URI."),
    ],
    set_: EvaluationSet = None,
    eps_255: Annotated[float | None, typer.Option(min=0, help="Radius, in pixel steps of 1/255; 127.5 is an l2 radius of 0.5.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2.")] = None,
    version: Annotated[str | None, typer.Option(help="Of AutoAttack: standard, plus, or rand for randomised models.")] = None,
    level: Annotated[
        str | None, typer.Option(help="reference: AutoAttack to the bit; fast: the same maths rounded otherwise; screen: an upper bound.")
    ] = None,
    streams: Annotated[str | None, typer.Option(help="Random numbers per batch, as AutoAttack draws them, or per sample.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="URI", help="Folder of the results; needed unless WHAT is a run.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="URI", help="Of timm/NAME.")] = None,
    images: Annotated[
        str | None, typer.Option(metavar="FILE", help="An .npz with image (uint8 NHWC, or float NCHW in [0,1]) and label, instead of a data set.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(metavar="NAME", help="Of robustbench:URI, as model.name.")] = None,
    robustbench: Annotated[
        str | None, typer.Option(metavar="FILE", help="A YAML file with title, authors, year, venue and link: also write RobustBench's entry.")
    ] = None,
    workers: Workers = None,
    json: Json = None,
) -> None:
    """Clean, PGD and AutoAttack accuracy of a training run, or of any classifier, on test images.

    What is not a run's is given: data (--set name=cifar10 --set uri=URI, or --images), radius and norm. Start it again to go on.
    """
    with terminal.Bars() as bars:
        from dra_ray import subjects

        changes = config.parse_settings(set_ or [])
        options = subjects.Options(changes, eps_255, norm, version, level, streams, Store(to) if to else None, weights, images, architecture)
        subject = subjects.read(what, options)
        if robustbench:
            from dra_ray.report import robustbench as board

            facts = board.facts(Store(robustbench), subject.experiment)

        from dra_ray import cluster
        from dra_ray import evaluate as job

        with cluster.connect():
            result = job.evaluate(subject, workers, terminal.evaluate_rows(bars, 1))
    threat = result["threat"]
    terminal.table(job.table(result), f"{what}: {result['images']} test images, {threat['norm']} eps {threat['eps_255']:g}/255", json)
    terminal.err.print(f"results in '{subject.folder}'")
    for flag in result["flags"]:
        terminal.err.print(f"note: {flag}")
    if robustbench:
        entry, text = board.write(result, facts, subject.folder / "robustbench")
        terminal.out.print(text)
        terminal.out.print(str(entry))


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="Folder of an evaluated run, such as the baseline.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Folder of another, evaluated alike.")],
    what: Annotated[str, typer.Option(help="What the sentence is about: autoattack, pgd or clean.")] = "autoattack",
    json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the comparison to this file, as JSON.")] = None,
) -> None:
    """Compare two evaluated runs image by image: is their difference more than noise?"""
    from dra_ray.analysis import paired

    found = paired.compare_runs(Store(run_a), Store(run_b), what)
    terminal.table(paired.table(found), f"A: {run_a}, B: {run_b}, the same {found['images']} test images")
    terminal.out.print(found["sentence"])
    for note in found["notes"]:
        terminal.err.print(f"note: {note}")
    if json:
        Store(json).write_json(found)


@app.command()
def synthesize(
    recipe: ConfigArgument = "digits-synthesis", set_: Set = None, storage_uri: Storage = "runs", name: Name = None, json: Json = None
) -> None:
    """Sample a class-balanced set of images from a teacher: --set teacher=runs/digits-edm."""
    settings = config.load(recipe, config.Synthesis, set_)
    run = _run(storage_uri, name, recipe)
    _writable(run)
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray import synthesize as job

        with cluster.connect():
            manifest = job.run(settings, run, terminal.synthetic_rows(bars))
    terminal.table([{"class": label, "images": count} for label, count in manifest["counts"].items()], f"{run}", json)


@teacher_app.command("train")
def teacher_train(
    recipe: ConfigArgument = "digits-edm", set_: Set = None, storage_uri: Storage = "runs", name: Name = None, json: Json = None
) -> None:
    """Train a class-conditional EDM on real images; its folder is what teacher.uri takes."""
    settings = config.load(recipe, config.TeacherTraining, set_)
    run = _run(storage_uri, name, recipe)
    _announce(run, "teacher", settings)
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray import teach as job

        with cluster.connect():
            manifest = job.fit(settings, run, terminal.teacher_rows(bars, settings))
    terminal.table([{key: manifest[key] for key in ("images_seen", "sigma_data", "elapsed_s", "teacher_digest")}], f"{run}", json)


@teacher_app.command("import")
def teacher_import(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A published EDM pickle, at a path or any URI.")],
    to: Annotated[str, typer.Option("--to", metavar="URI", help="The teacher's new folder, which teacher.uri takes.")],
    json: Json = None,
) -> None:
    """Turn a published EDM pickle into a teacher's folder (safetensors and a card) without executing anything of it."""
    from dra_ray.teachers import official

    card = official.import_edm(Store(source), Store(to))
    facts = {"file": card["source"]["file"], "class": card["source"]["class"], "sha256": card["source"]["sha256"][:16], "digest": card["digest"][:16]}
    terminal.table([facts], to, json)
    terminal.err.print(f"note: {card['licence']}")


@teacher_app.command("import-dit")
def teacher_import_dit(
    dit: Annotated[str, typer.Argument(metavar="DIT", help="A published LightningDiT checkpoint, at a path or any URI.")],
    vae: Annotated[str, typer.Argument(metavar="VAE", help="The published VA-VAE checkpoint.")],
    stats: Annotated[str, typer.Argument(metavar="STATS", help="The published latents_stats.pt.")],
    to: Annotated[str, typer.Option("--to", metavar="URI", help="The teacher's new folder, which teacher.uri takes.")],
    massive: Annotated[
        str, typer.Option(metavar="CHANNELS", help="Massive channels, which features go without; empty for none. The default is of XL/1.")
    ] = "1053,259",
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels a side of the students' images; default: the autoencoder's 256.")] = None,
    decoder: Annotated[bool, typer.Option("--decoder", help="Keep the autoencoder's decoder, which `dra synthesize` needs.")] = False,
    json: Json = None,
) -> None:
    """Turn a published LightningDiT with its VA-VAE into a teacher's folder. Files are read weights-only: nothing of them is executed."""
    channels = _numbers("--massive", massive, int)
    from dra_ray.teachers import official_dit

    card = official_dit.import_dit(Store(dit), Store(vae), Store(stats), Store(to), channels, resolution, decoder)
    facts = {"file": card["source"]["dit"]["file"], "sha256": card["source"]["dit"]["sha256"][:16], "digest": card["digest"][:16]}
    terminal.table([facts], to, json)
    terminal.err.print(f"note: {card['licence']}")


@teacher_app.command("latents")
def teacher_latents(
    vae: Annotated[str, typer.Argument(metavar="VAE", help="The published VA-VAE checkpoint.")],
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="The .safetensors file to write, which import-dit takes as STATS.")],
    set_: DataSet = None,
    images: Annotated[int, typer.Option(min=1, help="The first so many training images; the published ones are of 10,000.")] = 10_000,
    device: str = "cpu",
    json: Json = None,
) -> None:
    """Measure the mean and deviation of an autoencoder's latents on your images: --set name=imagenet --set uri=URI --set resolution=256."""
    settings = _data(set_ or [])
    from dra_ray import analyse as job

    terminal.table(job.latent_statistics(Store(vae), settings, images, Store(to), device), f"latents of {vae}", json)
    terminal.out.print(to)


@teacher_app.command("list")
def teacher_list(json: Json = None) -> None:
    """Teachers that come with the package: teacher.uri=package:NAME, or the folder that is printed."""
    rows = [{"name": f"package:{name}", "folder": config.teacher_path(f"package:{name}")} for name in config.teacher_names()]
    terminal.table(rows, "teachers in the package", json)


@teacher_app.command("probe")
def teacher_probe(
    teacher: TeacherArgument,
    set_: DataSet = None,
    sigmas: Annotated[str, typer.Option(help="Noise levels; a flow's time t is sigma = (1-t)/t.")] = "0.02,0.06,0.14,0.3",
    layers: Annotated[str, typer.Option(help="Names with commas between them; default: every layer.")] = "",
    images: Annotated[int, typer.Option(min=2, help="Training images, and at most as many held-out ones.")] = 2000,
    label: Annotated[str, typer.Option(help="null or true: the class that the teacher is given; true leaks the answer.")] = "null",
    seed: int = 0,
    device: str = "cpu",
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Also write an .html page with a plot.")] = None,
    json: Json = None,
) -> None:
    """Linear probe accuracy of a teacher's features by layer and noise level: where align.sigma and teacher.layer may come from."""
    levels = _numbers("--sigmas", sigmas, float)
    names = [name.strip() for name in layers.split(",") if name.strip()]
    uri = _teacher(teacher)
    rows = []
    with terminal.Bars() as bars:
        from dra_ray import analyse as job

        for row in job.probe_teacher(Store(uri), set_ or [], levels, names, images, label, seed, os.cpu_count() or 1, device):
            rows.append(row)
            bars.say(f"{row['layer']} at sigma {row['sigma']:g}: {row['accuracy']:.2%}")
    terminal.table(rows, f"linear probes of {teacher}", json)
    if out:
        from dra_ray.report import probes

        probes.write(Store(out), teacher, {"images": images, "label": label, "seed": seed, "set": " ".join(set_ or []) or "as trained"}, rows)
        terminal.out.print(out)


@teacher_app.command("quality")
def teacher_quality(
    synthetic: Annotated[str, typer.Argument(metavar="SYNTHETIC", help="Folder written by `dra synthesize`, or .npz files in DM-AT's layout.")],
    set_: DataSet = None,
    images: Annotated[int, typer.Option(min=2, help="The first so many images.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the small students.")] = 400,
    run: Annotated[str | None, typer.Option(help="A training run whose student is asked what it makes of the labels.")] = None,
    seed: int = 0,
    device: str = "cpu",
    json: Json = None,
) -> None:
    """How well a synthetic set teaches, and whether it copies training images. Downloads nothing; --set says which data, such as name=cifar10."""
    settings = _data(set_ or [])
    with terminal.Bars() as bars:
        from dra_ray import analyse as job

        report = job.synthetic_quality(Store(synthetic), settings, images, steps, Store(run) if run else None, seed, device, bars.say)
    terminal.table(job.quality_rows(report), f"{synthetic}: {report['images']} images", None)
    if json:
        Store(json).write_json(report)


@teacher_app.command("massive")
def teacher_massive(
    teacher: TeacherArgument,
    set_: DataSet = None,
    sigma: Annotated[float, typer.Option(min=0, help="Noise level; a flow's time t is sigma = (1-t)/t.")] = 1 / 3,
    layer: Annotated[str | None, typer.Option(help="Default: the feature's.")] = None,
    images: Annotated[int, typer.Option(min=1)] = 64,
    json: Json = None,
) -> None:
    """Massive channels of a transformer's residual stream: what `import-dit --massive` takes."""
    from dra_ray import analyse as job

    channels = job.massive_channels(Store(_teacher(teacher)), set_ or [], sigma, layer, images)
    terminal.table([{"channel": channel} for channel in channels], f"massive channels of {teacher}", json)


@pool_app.command("status")
def pool_status(json: Json = None) -> None:
    """The pools that are up: replicas, requests, hits, retries, by teacher and by trial."""
    from dra_ray import cluster, pool

    with cluster.connect_to_running():
        found = [pool.status(app) for app in sorted(pool.applications()) if app.startswith(pool.PREFIX)]
    if json:
        Store(json).write_json(found)
    terminal.table([pool.row(status) for status in found], "teacher pools", None)
    for status in found:
        terminal.table([{"trial": trial or "-", **totals} for trial, totals in status.get("trials", {}).items()], status["pool"], None)


@pool_app.command("up")
def pool_up(recipe: ConfigArgument, set_: Set = None, json: Json = None) -> None:
    """Bring up the pool that a training run or sweep would use, or change its size; it stays until `dra pool down`."""
    settings: Any = config.load(recipe, None, set_)
    experiment = getattr(settings, "base", settings)
    if not isinstance(experiment, config.Experiment):
        raise ConfigError(f"{recipe}: is of kind '{settings.kind}'; a pool belongs to a training run or a sweep")
    experiment = experiment.with_sources()
    if not experiment.teacher.uri:
        raise ConfigError("teacher.uri is not set; pass --set teacher.uri=URI (see `dra teacher list`)")
    from dra_ray import cluster, pool

    with cluster.connect_to_running():
        app = pool.up(experiment.teacher, experiment.pool.model_copy(update={"keep": True}), change=True)
        terminal.table([pool.row(pool.status(app))], "teacher pool", json)


@pool_app.command("down")
def pool_down(
    name: Annotated[str | None, typer.Argument(metavar="POOL", help="As `dra pool status` names it; default: all.")] = None,
) -> None:
    """Take pools down. Runs that use one wait for it until pool.timeout_s and can be resumed."""
    from dra_ray import cluster, pool

    with cluster.connect_to_running():
        found = sorted(app for app in pool.applications() if app.startswith(pool.PREFIX))
        if name is not None and name not in found:
            raise ConfigError(f"there is no pool '{name}'; {'there are ' + ', '.join(found) if found else 'none is up'}")
        for app in [name] if name else found:
            pool.down(app)
            terminal.err.print(f"'{app}' is down")


@bench_app.command("policy")
def bench_policy(
    sweeps_at_h: Annotated[str, typer.Option(help="Hours of the day at which a sweep arrives.")] = "9,11,14,16",
    trials: Annotated[int, typer.Option(min=1, help="Trials of a sweep.")] = 200,
    gpus: Annotated[int, typer.Option(min=1, help="Student GPUs.")] = 64,
    node_start_s: Annotated[float, typer.Option(min=0, help="From the order of a teacher node to Ray on it.")] = 240.0,
    seed: int = 0,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Also write an .html page with plots.")] = None,
    json: Json = None,
) -> None:
    """Simulate a day of sweeps: replica-hours and waiting of the pool's policy, of Ray Serve's default and of fixed pools. Starts nothing."""
    from dra_ray import simulate as job

    try:
        hours = tuple(float(hour) for hour in sweeps_at_h.split(","))
    except ValueError:
        raise ConfigError(f"--sweeps-at-h {sweeps_at_h}: write hours with commas between them, such as 9,11,14") from None
    workload = job.Workload(gpus=gpus, sweeps_at_h=hours, trials=trials, node_start_s=node_start_s, seed=seed)
    outcomes = job.compare(workload, job.suited(workload))
    terminal.table([outcome.row for outcome in outcomes], f"{len(hours)} sweeps of {trials} trials on {gpus} GPUs", json)
    if out:
        job.write(Store(out), workload, outcomes)
        terminal.out.print(out)


@bench_app.command("step")
def bench_step(
    student: Annotated[str, typer.Option(help="As model.name.")] = "wrn-16-4",
    batch: Annotated[int, typer.Option(min=2)] = 32,
    resolution: Annotated[int, typer.Option(min=8, help="Pixels a side.")] = 32,
    attack_steps: Annotated[int, typer.Option(min=1)] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each takes every kind of step once.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the machine's cores.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time compiled steps (takes a minute to compile).")] = True,
    device: str = "cpu",
    json: Json = None,
) -> None:
    """Seconds of one TRADES step: a textbook implementation against ours, in turn, from equal weights on equal images."""
    from dra_ray.bench import step as job

    rows, figures = job.compare(student, batch, resolution, attack_steps, rounds, threads or os.cpu_count() or 1, compiled, device)
    terminal.table(rows, f"TRADES-{attack_steps} step of {student}, batch {batch}, on {device}", None)
    if figures["ratio_bf16"] is None:
        terminal.err.print("note: this CPU has no bfloat16 instructions, so bf16 was left out")
    if json:
        Store(json).write_json(figures)


@bench_app.command("evaluate")
def bench_evaluate(
    run: RunArgument,
    images: Annotated[int, typer.Option(min=2, help="The first so many test images of the run.")] = 256,
    batch: Annotated[int, typer.Option(min=2)] = 64,
    eps_255: Annotated[float | None, typer.Option("--eps-255", help="Radius in pixel steps of 1/255; default: the run's.")] = None,
    effort: Annotated[float, typer.Option(min=0.001, max=1.0, help="Scales all steps and queries; below 1 it is no standard AutoAttack.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the machine's cores.")] = None,
    driver: Annotated[bool, typer.Option("--driver/--no-driver", help="Also measure how busy the driver keeps 1, 2 and 4 waiting workers.")] = True,
    device: str = "cpu",
    json: Json = None,
) -> None:
    """Seconds of AutoAttack: the package pyautoattack against the levels reference, fast and screen, on a trained run."""
    from dra_ray.bench import evaluate as job

    rows, figures = job.compare(Store(run), images, batch, eps_255, effort, threads or os.cpu_count() or 1, device)
    terminal.table(rows, f"AutoAttack on {images} images of {run}, batch {batch}, on {figures['device']}", None)
    same = "the package's to the bit" if figures["reference_bit_identical"] else "NOT the package's to the bit"
    terminal.out.print(
        f"images of level reference: {same}; verdicts of level fast that differ: {figures['fast_verdicts_differ']}; "
        f"screen overrates by {100 * figures['screen_accuracy_gap']:.2f} points; {100 * figures['survivors_share']:.1f} % survive"
    )
    if driver:
        from dra_ray import cluster
        from dra_ray.bench import driver as queue

        with tempfile.TemporaryDirectory() as folder, cluster.connect(num_cpus=4):
            figures["driver"] = queue.efficiency(Store(folder))
        terminal.table(figures["driver"], "an evaluation whose batches only wait", None)
    if json:
        Store(json).write_json(figures)


@bench_app.command("pool")
def bench_pool(
    rounds: Annotated[int, typer.Option(min=1, help="Multiplies the number of requests.")] = 1,
    student: Annotated[str, typer.Option(help="Of the training step, as model.name.")] = "wrn-16-4",
    batch: Annotated[int, typer.Option(min=2, help="Of the training step.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Timed pairs of steps, with and without alignment.")] = 9,
    json: Json = None,
) -> None:
    """The same requests through a teacher in process, plain Ray actors and the pool; the overhead of a step; scale-up; sharing."""
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.bench import pool as job

        with cluster.connect():
            rows, figures = job.compare(rounds, student, batch, steps, bars.say)
    terminal.table(rows, "requests of 3x32x32 images", None)
    terminal.table([{key: value for key, value in figures.items() if key != "rows"}], "the pool", None)
    if json:
        Store(json).write_json(figures)


@app.command()
def report(run: RunArgument, json: Json = None) -> None:
    """Write report.html and summary.json of a run or of an evaluation alone, and print its table of trials or scores."""
    from dra_ray import report as job

    written = job.write(Store(run))
    terminal.table(job.rows(Store(run)), f"trials of {run}", json)
    terminal.out.print(str(written))


@app.command()
def plan(
    recipe: ConfigArgument,
    set_: Set = None,
    tflops: Annotated[float | None, typer.Option(min=0, help="Sustained TFLOP/s of one GPU (or CPU thread), to estimate hours.")] = None,
    json: Json = None,
) -> None:
    """Check a config and print what it would run: sizes, steps, arithmetic, workers, replicas. Starts nothing."""
    settings: Any = config.load(recipe, None, set_)
    from dra_ray import plan as job

    terminal.table(job.rows(job.plan(settings, tflops)), f"plan of {recipe}", json)


@app.command()
def recipes(json: Json = None) -> None:
    """List the recipes, with the clean and AutoAttack accuracy (%) that the paper reports."""
    rows: list[dict[str, Any]] = []
    for name in config.recipe_names():
        recipe: Any = config.load(name)
        paper = getattr(recipe, "paper", None)
        numbers = {field: getattr(paper, field, None) for field in config.PaperNumbers.model_fields}
        rows.append({"recipe": name, "kind": recipe.kind, **numbers, "description": recipe.description})
    if json:
        Store(json).write_json(rows)
    shown = {"recipe": "recipe", "kind": "kind", "table": "paper", "clean": "clean", "autoattack": "AA", "description": "description"}
    terminal.table([{title: row[field] for field, title in shown.items()} for row in rows], "recipes")


def _teacher(uri: str) -> str:
    """A teacher's URI, `package:NAME` spelled out."""
    return config.validate(config.Teacher, {"uri": uri}, "teacher").uri or uri


def _data(settings: list[str]) -> config.Data:
    """Data by its fields; what is left out has the data set's usual values."""
    return config.validate(config.Data, config.parse_settings(settings), "--set")


def _numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas between them") from None


def _run(storage_uri: str, name: str | None, recipe: str) -> Store:
    return Store(storage_uri) / (name or recipe.rsplit("/", 1)[-1].rsplit(".", 1)[0])


def _writable(run: Store) -> None:
    if not (run / "manifest.json").exists():
        run.probe()


def _announce(run: Store, kind: str, settings: config.Frozen) -> None:
    """Fail before Ray starts where the run's folder cannot be used; say what will happen."""
    found = storage.check_run(run.resolved(), kind, settings.model_dump(mode="json"), settings.digest())
    word = "starting" if found is None else "resuming" if found["status"] != "done" else "already done:"
    terminal.err.print(f"{word} '{run}'")


def _free(root: Store, name: str) -> Store:
    number = 1
    while (run := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return run


_CTRL_C = 130  # a shell's code for a process that SIGINT ended


def main() -> None:
    """Entry point: one line per error, exit code 2 for what the user can mend, 1 for what failed, 130 for Ctrl-C."""
    # Ray reads it when it is imported: many small processes are what a laptop's sweep is made of, not a mistake
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        if app(arguments, standalone_mode=False) == _CTRL_C:  # typer has caught it and gives its exit code
            raise KeyboardInterrupt
    except DraError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped; the same command resumes it", _CTRL_C)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's own errors: a wrong option and the like
        if debug:
            raise
        if usage:
            _fail(usage(), 2)
        _fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} (run it with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> None:
    terminal.err.print(f"error: {message}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
