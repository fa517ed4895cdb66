"""The `dra` command: parse, check, say what will run, call one function, print.

Everything that is slow to import (torch, Ray) is imported inside a command, after its arguments were found good.
"""

from __future__ import annotations

import os
import sys
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
def evaluate(run: RunArgument, workers: Workers = None, json: Json = None) -> None:
    """Clean, PGD and standard AutoAttack accuracy of a training run on the test images."""
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray import evaluate as job
        from dra_ray.models import checkpoint

        checkpoint.load(Store(run))
        with cluster.connect():
            result = job.evaluate(Store(run), workers, terminal.evaluate_rows(bars, 1))
    terminal.table(job.table(result), f"{run}: {result['images']} test images, eps {result['threat']['eps_255']:g}/255", json)
    for flag in result["flags"]:
        terminal.err.print(f"note: {flag}")


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


@app.command()
def report(run: RunArgument, json: Json = None) -> None:
    """Write report.html and summary.json of a quickstart, sweep or training run, and print its table of trials."""
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
