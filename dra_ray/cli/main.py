"""The `dra` command: parse, check, say what will run, call one function, print.

Everything that is slow to import (torch, Ray) is imported inside a command, after its arguments
were found good.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from dra_ray import __version__, config, runs
from dra_ray.cli import status as status_commands
from dra_ray.cli import terminal
from dra_ray.cli.analyse import analyse
from dra_ray.cli.bench import bench_app
from dra_ray.cli.canonical import canonical_app
from dra_ray.cli.dashboards import dashboards_app
from dra_ray.cli.data import data_app
from dra_ray.cli.options import (
    Check,
    Commands,
    ConfigArgument,
    EvaluationSet,
    Json,
    Name,
    RunArgument,
    Set,
    Storage,
    Workers,
    announce,
    look_at_targets,
    require_free,
    require_teacher,
    require_teachers,
    require_writable,
    run_folder,
    to_write,
    warn_of_unread,
)
from dra_ray.cli.pool import pool_app
from dra_ray.cli.submit import jobs_app, submit
from dra_ray.cli.sweep import sweep_app
from dra_ray.cli.teacher import teacher_app
from dra_ray.config import networks
from dra_ray.config.text import printable
from dra_ray.errors import ConfigError, DraError
from dra_ray.storage import Store, masked
from dra_ray.sweeps import schedulers, spaces

if TYPE_CHECKING:
    from dra_ray import plan as job
    from dra_ray.plan import speed, timing

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Robust image classifiers with diffusion teachers, on Ray.",
)
app.add_typer(bench_app, name="bench")
app.add_typer(canonical_app, name="canonical")
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(data_app, name="data")
app.add_typer(jobs_app, name="jobs")
app.add_typer(pool_app, name="pool")
app.add_typer(sweep_app, name="sweep")
app.add_typer(teacher_app, name="teacher")
app.command("runs")(status_commands.runs)
app.command("analyse")(analyse)
app.command("status")(status_commands.status)
app.command("submit")(submit)


def _show_version(wanted: bool) -> None:
    if wanted:
        of = runs.versions()
        terminal.out.print(
            f"dra_ray {__version__} (Python {of['python']}, torch {of['torch']}, ray {of['ray']})"
        )
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Say the version and leave."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show an error's traceback; may stand anywhere in a command."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", help="Print results, warnings and errors only; may stand anywhere."
        ),
    ] = False,
) -> None:
    """Robust image classifiers with diffusion teachers, on Ray."""


@app.command()
def quickstart(
    name: Annotated[str, typer.Option(help="The run's folder in the storage.")] = "quickstart",
    storage_uri: Storage = "runs",
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start anew, under the first free name; nothing is deleted."),
    ] = False,
    set_: Set = None,
) -> None:
    """The main job on real digits, in about ten minutes on two cores: teacher, synthetic images,
    sweep, AutoAttack, report.

    Run it again to resume it, or to hear that it is done.
    """
    settings = config.load("quickstart", config.Quickstart, set_)
    run = run_folder(storage_uri, name, "quickstart")
    run = require_free(Store(storage_uri), name) if fresh else run
    manifest = runs.check_run(
        run.resolved(), "quickstart", settings.model_dump(mode="json"), settings.digest()
    )
    report = run.resolved() / runs.REPORT
    if manifest and manifest.is_done and report.exists():
        terminal.err.print(f"run '{run}' is done; start anew with --fresh")
        terminal.out.print(str(report))
        return
    sweep = settings.sweep
    parts = (
        f"teacher on {settings.teacher.images_seen:,} images",
        f"{settings.synthesis.images:,} synthetic images",
        f"{len(spaces.experiments(sweep))} trials of up to {sweep.base.optim.epochs} epochs",
        f"AutoAttack on {sweep.base.data.test_images} test images, twice",
    )
    terminal.err.print(f"{'resuming' if manifest else 'starting'} '{run}': {', '.join(parts)}")
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.workloads import quickstart as job

        progress = job.Progress(
            teacher=terminal.teacher_rows(bars, settings.teacher),
            synthetic=terminal.synthetic_rows(bars),
            sweep=terminal.sweep_rows(bars, sweep),
            autoattack=terminal.evaluate_rows(bars, 2),
        )
        job.check(settings)  # before Ray is started
        with cluster.connect():
            report = job.run(settings, run, progress)
    terminal.out.print(str(report))


@app.command()
def train(
    recipe: ConfigArgument,
    set_: Set = None,
    storage_uri: Storage = "runs",
    name: Name = None,
    check: Check = True,
    json: Json = None,
) -> None:
    """Train one student with TRADES, and DRA where align.weight is above 0."""
    experiment = config.load(recipe, config.Experiment, set_).with_sources()
    warn_of_unread(experiment, set_)
    run = run_folder(storage_uri, name, recipe)
    require_teachers([experiment])
    starts = announce(run, "train", experiment)
    if experiment.model.name.startswith(networks.TIMM) and not experiment.model.weights:
        terminal.err.print(
            f"note: '{experiment.model.name}' starts from random weights; give pretrained ones "
            "with --set model.weights=URI"
        )
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.plan import ready
        from dra_ray.workloads import train as job

        facts = ready.of_experiment(experiment)  # before Ray is started
        if check and starts:
            look_at_targets(bars, [experiment])
        with cluster.connect():
            row = job.fit(experiment, run, terminal.train_rows(bars, experiment), facts=facts)
    terminal.table([terminal.row(row)], f"last epoch of {run}", json, hidden=("verdicts",))


@app.command()
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A run's folder (of a sweep: its best trials), a checkpoint, timm/NAME, "
            "module:function (gives a torch module), or robustbench:URI.",
        ),
    ],
    set_: EvaluationSet = None,
    eps_255: Annotated[
        float | None,
        typer.Option(min=0, help="Radius, in pixel steps of 1/255; 127.5 is an l2 radius of 0.5."),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2.")] = None,
    version: Annotated[
        str | None,
        typer.Option(help="Of AutoAttack: standard, plus, or rand for randomised models."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="reference: AutoAttack to the bit; fast: the same maths rounded otherwise; "
            "screen: an upper bound."
        ),
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(help="Random numbers per batch, as AutoAttack draws them, or per sample."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="URI", help="Folder of the results; needed unless WHAT is a run."
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="URI", help="Of timm/NAME.")] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="An .npz with image (uint8 NHWC, or float NCHW in [0,1]) and label, instead of a "
            "data set.",
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of robustbench:URI, as model.name.")
    ] = None,
    robustbench: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A YAML file with title, authors, year, venue and link: also write RobustBench's "
            "entry.",
        ),
    ] = None,
    workers: Workers = None,
    json: Json = None,
) -> None:
    """Clean, PGD and AutoAttack accuracy of a training run, or of any classifier, on test images.

    What is not a run's is given: data (--set name=cifar10 --set uri=URI, or --images), radius and
    norm. Start it again to go on.
    """
    if finalists := runs.finalists(Store(what)) if _is_folder_of_run(what) else {}:
        options_of_one = {
            "--set": set_,
            "--eps-255": eps_255,
            "--norm": norm,
            "--version": version,
            "--level": level,
            "--streams": streams,
            "--to": to,
            "--weights": weights,
            "--images": images,
            "--architecture": architecture,
            "--robustbench": robustbench,
        }
        _evaluate_finalists(what, finalists, options_of_one, workers, json)
        return
    with terminal.Bars() as bars:
        from dra_ray.evaluation import subjects

        changes = config.parse_settings(set_ or [])
        options = subjects.Options(
            changes,
            eps_255,
            norm,
            version,
            level,
            streams,
            Store(to) if to else None,
            weights,
            images,
            architecture,
        )
        subject = subjects.read(what, options)
        if robustbench:
            from dra_ray.report import robustbench as board

            facts = board.facts(Store(robustbench), subject.experiment)

        from dra_ray import cluster
        from dra_ray.workloads import evaluate as job

        with cluster.connect():
            result = job.evaluate(subject, workers, terminal.evaluate_rows(bars, 1))
    threat = subject.experiment.threat
    terminal.table(
        job.table(result),
        f"{what}: {result.images} test images, {threat.norm} eps {threat.eps_255:g}/255",
        json,
    )
    terminal.err.print(f"results in '{subject.folder}'")
    for flag in result.flags:
        terminal.err.print(f"note: {flag}")
    if robustbench:
        entry, text = board.write(result.tree(), facts, subject.folder / "robustbench")
        terminal.out.print(text)
        terminal.out.print(str(entry))


def _is_folder_of_run(what: str) -> bool:
    """Whether WHAT is the folder of a run: timm/NAME, robustbench:URI, module:function and files
    are not. `DataError` where a path leads nowhere.
    """
    if what.startswith(("timm/", "robustbench:")) or (":" in what and "://" not in what):
        return False
    runs.require_there(Store(what))  # before torch is imported
    return (Store(what) / runs.MANIFEST).exists()


def _evaluate_finalists(
    what: str,
    finalists: Mapping[str, Store],
    options_of_one: Mapping[str, object],
    workers: int | None,
    json: str | None,
) -> None:
    """The best trials of a sweep, as they are, at the same time."""
    if given := [option for option, value in options_of_one.items() if value]:
        raise ConfigError(
            f"{given[0]} is for one model, but '{what}' is a sweep; evaluate one of its trials: "
            f"{', '.join(map(str, finalists.values()))}"
        )
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.workloads import evaluate as job

        with cluster.connect():
            show = terminal.evaluate_rows(bars, len(finalists))
            results = job.evaluate_many(list(finalists.values()), workers, show)
    rows = [
        {"trial": run.name, "role": role, **row}
        for (role, run), result in zip(finalists.items(), results, strict=True)
        for row in job.table(result)
    ]
    terminal.table(rows, f"best trials of {what}, {results[0].images} test images", json)
    if len(finalists) > 1:
        pair = (finalists.get("baseline"), finalists.get("dra"))
        terminal.out.print(f"next:\n  dra compare {' '.join(map(str, pair))}")


@app.command()
def compare(
    run_a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Folder of an evaluated run, such as the baseline; or of several that differ in "
            "their training seed, with commas between them.",
        ),
    ],
    run_b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="Folder of another, evaluated alike; or as many, in A's order of seeds.",
        ),
    ],
    what: Annotated[
        str, typer.Option(help="What the sentence is about: autoattack, pgd or clean.")
    ] = "autoattack",
    json: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            callback=to_write,
            help="Also write the comparison to this file, as JSON.",
        ),
    ] = None,
) -> None:
    """Compare two evaluated runs, or two ways of training over several seeds, image by image: is
    their difference more than noise?
    """
    with terminal.busy(f"comparing '{run_a}' with '{run_b}'"):
        from dra_ray.evaluation import arms
        from dra_ray.evaluation import compare as pair

        one, two = ([Store(uri) for uri in given.split(",") if uri] for given in (run_a, run_b))
        if len(one) == len(two) == 1:
            found, rows = pair.compare_runs(one[0], two[0], what), pair.table
        else:
            found, rows = arms.compare_runs(one, two, what), arms.table
    terminal.table(rows(found), f"A: {run_a}, B: {run_b}, the same {found['images']} test images")
    terminal.out.print(found["sentence"])
    for note in found["notes"]:
        terminal.err.print(f"note: {note}")
    if json:
        Store(json).write_json(found)


@app.command()
def synthesize(
    recipe: ConfigArgument = "digits-synthesis",
    set_: Set = None,
    storage_uri: Storage = "runs",
    name: Name = None,
    device_price: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of an hour of a GPU, or of a CPU where none is used: says what is left to pay.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Sample a class-balanced set of images from a teacher: --set teacher=runs/digits-edm. With
    more images than a set of that name has, it grows.
    """
    settings = config.load(recipe, config.Synthesis, set_)
    if settings.teacher is not None:
        require_teacher(settings.teacher)
    run = run_folder(storage_uri, name, recipe)
    require_writable(run)
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.workloads import synthesize as job

        job.check(settings)  # before Ray is started
        with cluster.connect():
            devices = settings.workers * (settings.gpus_per_worker or settings.cpus_per_worker)
            price = None if device_price is None else device_price * devices
            manifest = job.run(settings, run, terminal.synthetic_rows(bars, price))
    terminal.table(
        [{"class": label, "images": count} for label, count in manifest.counts.items()],
        f"{run}",
        json,
    )


@app.command()
def report(
    runs_: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Folder of a run: a path or any URI; several sweeps compare."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FILE", callback=to_write, help="Page on which several sweeps are compared."
        ),
    ] = "comparison.html",
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Write it anew every few seconds until the run ends; a browser that shows it "
            "keeps up.",
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Write report.html and summary.json of a run or of an evaluation alone, and print its table of
    trials or scores; of several sweeps, compare them on one page.
    """
    for run in runs_:
        runs.require_folder(Store(run))
    if follow and len(runs_) > 1:
        raise ConfigError("--follow keeps up with one run; give one, or leave --follow out")
    if len(runs_) > 1:
        with terminal.busy(f"comparing {len(runs_)} sweeps"):
            from dra_ray.report import versus

            table = versus.write([Store(run) for run in runs_], Store(to))
        terminal.table(table, "sweeps", json)
        terminal.out.print(to)
        return
    run = runs_[0]
    if follow:
        status_commands.follow_page(Store(run).resolved())
    with terminal.busy(f"writing the report of '{run}'"):
        from dra_ray import report as job

        written, rows = job.write(Store(run)), job.rows(Store(run))
    terminal.table(rows, f"trials of {run}", json)
    terminal.out.print(str(written))


@app.command()
def bundle(
    what: Annotated[
        str, typer.Argument(metavar="RUN|FILE", help="A run's folder; with --check, a bundle.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Compare every file of a bundle with its SHA-256.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="URI",
            help="The bundle's file, default NAME.tar; with --check, a new folder to unpack into.",
        ),
    ] = None,
) -> None:
    """Pack a finished run into one archive that evaluates elsewhere: config, environment, data
    hashes, weights, verdicts, report and model card.
    """
    with terminal.busy(f"reading '{what}'"):
        from dra_ray.report import bundle as job

        checked = job.check(Store(what), Store(to) if to else None) if check else None
    if checked:
        terminal.out.print(f"{len(checked.files)} files of '{checked.run}' are as they were packed")
        terminal.out.print(f"index {checked.digest}")
        if to:
            terminal.out.print(f"next:\n  dra evaluate {to}")
        return
    file = Store(to or f"{Store(what).resolved().name}{job.ENDING}")
    with terminal.busy(f"packing '{what}'"):
        packed = job.pack(Store(what), file)
    terminal.err.print(f"{len(packed.files)} files, index {packed.digest}")
    terminal.out.print(str(file))


@app.command()
def export(
    run: RunArgument,
    form: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="safetensors, timm or onnx.")
    ] = "safetensors",
    folder: Annotated[
        str | None,
        typer.Option("--folder", metavar="URI", help="Where; default: export/FORMAT in the run."),
    ] = None,
) -> None:
    """Write a run's weights for other programs, with the lines that load them; its logits are
    checked to be those of the run.
    """
    with terminal.busy(f"writing the weights of '{run}'"):
        from dra_ray.report import export as job

        written = job.export(Store(run), form, Store(folder) if folder else None)
    terminal.err.print(
        f"logits differ by at most {written.difference:.1g} on {written.images} images"
    )
    terminal.out.print(written.snippet)
    terminal.out.print(str(written.folder))


@app.command()
def plan(
    recipe: ConfigArgument,
    set_: Set = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Sustained TFLOP/s of one GPU (or CPU thread), for arithmetic; default: a few "
            "steps are timed here.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Such as h100, a100, l4: hours by its published peak."),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Your own copy of dra_ray/plan/gpus.yaml, with your prices."
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A cluster.yaml or RayCluster: is there room for the run, what does an hour cost, "
            "and which role sets the pace?",
        ),
    ] = None,
    analyses: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Also what `dra analyse` would cost for this student on N images: the analyses "
            "are timed on a few hundred.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Check a config and print what it would run: sizes, steps, arithmetic, memory, hours, money.
    Starts nothing.
    """
    settings = config.load(recipe, None, set_)
    warn_of_unread(settings, set_)
    with terminal.busy(f"planning {recipe}"):
        from dra_ray import plan as job
        from dra_ray.plan import nodes, speed

        known = speed.table(prices)
        nodes_ = nodes.read(cluster) if cluster else None
        fit: nodes.Fit | None = None
        basis = _basis(settings, tflops, gpu, known)
        prices_ = _prices(settings, gpu, known)
        planned = job.plan(settings, basis.tflops, prices_, pace=basis.pace)
        rows = job.rows(planned)
        if cluster and nodes_:
            fit = nodes.fit(settings, planned, nodes_, known, cluster)
            rows = [*rows, *nodes.rows(fit, known)]
        if analyses is not None:
            rows = [*rows, *_analyses(settings, analyses, basis)]
    if json:
        Store(json).write_json([dataclasses.asdict(row) for row in rows])
    for stage in dict.fromkeys(row.stage for row in rows if row.stage):
        shown = [{"quantity": r.quantity, "value": r.text} for r in rows if r.stage == stage]
        terminal.table(shown, f"plan of {recipe}: {stage}")
        terminal.out.print()
    terminal.out.print(job.summary(planned))
    terminal.err.print(f"hours: {basis.said}")
    for row in rows:
        if not row.stage:
            terminal.err.print(f"note: {row.text}")
    if fit and fit.remedy:
        if not fit.is_enough:
            raise ConfigError(fit.remedy)
        terminal.err.print(f"note: {fit.remedy}")


def _analyses(settings: config.Config, images: int, basis: timing.Basis) -> list[job.PlannedRow]:
    """What `dra analyse` would cost, as lines of the plan."""
    from dra_ray import plan as job
    from dra_ray.plan import looks

    if not isinstance(settings, config.Experiment):
        raise ConfigError(
            f"--analyses {images}: analyses are of a trained student; give a recipe that trains one"
        )
    found = []
    for look in looks.of(settings, images, basis):
        spent = "not known" if look.seconds is None else f"{look.seconds:,.3g} s"
        text = f"{spent}, {look.memory_gb:.2g} GB"
        stage = f"dra analyse, {images:,} images of one model"
        found.append(job.PlannedRow(stage, look.part, dataclasses.asdict(look), text))
    return found


def _asked_gpus(settings: config.Config) -> float:
    """GPUs that a training worker asks for; 0 means CPU threads."""
    if isinstance(settings, config.Synthesis | config.Canonical):
        return settings.gpus_per_worker
    if isinstance(settings, config.Analysis):
        return 0.0
    if isinstance(settings, config.Quickstart):
        return settings.sweep.base.resources.gpus_per_worker
    experiment = settings.base if isinstance(settings, config.Sweep) else settings
    return experiment.resources.gpus_per_worker


def _basis(
    settings: config.Config, tflops: float | None, gpu: str | None, known: speed.Table
) -> timing.Basis:
    """What hours go by: as given, a card's peak, or what this machine does; nothing where the GPU
    that is asked for is not here.
    """
    from dra_ray.plan import speed, timing

    if tflops is not None:
        if not _SLOWEST <= tflops <= _FASTEST:
            raise ConfigError(
                f"--tflops {tflops:g}: a device's speed must lie between {_SLOWEST:g} and "
                f"{_FASTEST:g}, such as 50"
            )
        return timing.by_arithmetic(speed.Speed(tflops, "as given by --tflops"))
    if gpu:
        compute = getattr(getattr(settings, "base", settings), "compute", None)
        precision = compute.precision if compute else "fp32"
        return timing.by_arithmetic(speed.of_gpu(gpu, known, precision))

    def here() -> speed.Speed | None:
        import torch

        if not _asked_gpus(settings):
            return speed.measured()
        return speed.measured("cuda") if torch.cuda.is_available() else None

    if isinstance(settings, config.Sweep):
        trials = list(spaces.experiments(settings).values())
        return timing.basis(timing.of_sweep(settings, trials), _WORKER, here)
    if isinstance(settings, config.Experiment):
        return timing.basis(settings, _WORKER, here)
    return timing.by_arithmetic(here())


_WORKER = "dra_ray.workloads.train"  # what a training process imports
_SLOWEST, _FASTEST = 1e-6, 1e6  # TFLOP/s of a device, with room: a microcontroller, a rack


def _prices(settings: config.Config, gpu: str | None, known: speed.Table) -> job.Prices | None:
    """Of a GPU where one is named, of a CPU thread where none is asked for."""
    from dra_ray import plan as job

    if gpu:
        each = known.gpu(gpu).price
    elif not _asked_gpus(settings):
        each = known.cpu_hour
    else:
        return None
    return job.Prices(each, each, known.currency)


@app.command("config")
def print_config(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE|FILE", help="A recipe's name, or a .yaml file at any URI."),
    ] = None,
    set_: Set = None,
    fields: Annotated[
        bool,
        typer.Option("--fields", help="Print every field's values, default and meaning instead."),
    ] = False,
) -> None:
    """Print a config as YAML, with every field; written to a file, it is the same config."""
    if fields:
        from dra_ray.config import reference

        typer.echo(reference.reference(), nl=False)
        return
    if recipe is None:
        raise ConfigError("RECIPE|FILE is not given; name one (see `dra recipes`), or add --fields")
    settings = config.load(recipe, None, set_)
    sweep = settings.sweep if isinstance(settings, config.Quickstart) else settings
    if isinstance(sweep, config.Sweep):
        schedulers.require_known(sweep.scheduler)
    typer.echo(config.to_yaml(settings), nl=False)


@app.command()
def recipes(json: Json = None) -> None:
    """List the recipes, with the clean and AutoAttack accuracy (%) that the paper reports."""
    rows: list[dict[str, object]] = []
    for name in config.recipe_names():
        recipe = config.load(name)
        paper = getattr(recipe, "paper", None)
        numbers = {field: getattr(paper, field, None) for field in config.PaperNumbers.model_fields}
        rows.append(
            {"recipe": name, "kind": recipe.kind, **numbers, "description": recipe.description}
        )
    if json:
        Store(json).write_json(rows)
    shown = {
        "recipe": "recipe",
        "table": "paper",
        "clean": "clean",
        "autoattack": "AA",
        "description": "description",
    }
    for kind in dict.fromkeys(row["kind"] for row in rows):
        terminal.table(
            [
                {title: row[field] for field, title in shown.items()}
                for row in rows
                if row["kind"] == kind
            ],
            f"recipes of kind {kind}",
        )
        terminal.out.print()


_CTRL_C = 130  # a shell's code for a process that SIGINT ended


def main() -> None:
    """Entry point: one line per error, exit code 2 for what the user can mend, 1 for what failed,
    130 for Ctrl-C.
    """
    # Ray reads it when it is imported: many small processes are what a laptop's sweep is made of,
    # not a mistake
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")
    debug = "--debug" in sys.argv
    if "--quiet" in sys.argv:
        terminal.be_quiet()
    arguments = [a for a in sys.argv[1:] if a not in ("--debug", "--quiet")]
    try:
        # typer catches it and gives its exit code
        if app(arguments, standalone_mode=False) == _CTRL_C:
            raise KeyboardInterrupt
    except DraError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped; the same command resumes it", _CTRL_C)
    except Exception as caught:
        # typer makes an Abort of an EOFError
        cause = caught.__cause__ or caught if isinstance(caught, typer.Abort) else caught
        # click's own errors: a wrong option and the like
        usage = getattr(cause, "format_message", None)
        if debug:
            raise
        if usage:
            _fail(usage(), 2)
        _fail(
            f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''} (run it "
            "with --debug for the traceback)",
            1,
        )


def _fail(message: str, code: int) -> None:
    terminal.alert.print(f"error: {printable(masked(message))}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
