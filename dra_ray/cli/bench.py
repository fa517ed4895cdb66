"""`dra bench ...`: ratios measured in one run on this machine."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import Annotated

import typer

from dra_ray.cli import terminal
from dra_ray.cli.options import Commands, Device, Json, RunArgument, to_write
from dra_ray.errors import ConfigError
from dra_ray.storage import Store

bench_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Benchmarks: ratios measured in one run on this machine.",
)


Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; default: the machine's cores.")
]


@bench_app.command("policy")
def bench_policy(
    sweeps_at_h: Annotated[
        str, typer.Option(help="Hours of the day at which a sweep arrives.")
    ] = "9,11,14,16",
    trials: Annotated[int, typer.Option(min=1, help="Trials of a sweep.")] = 200,
    gpus: Annotated[int, typer.Option(min=1, help="Student GPUs.")] = 64,
    node_start_s: Annotated[
        float, typer.Option(min=0, help="From the order of a teacher node to Ray on it.")
    ] = 240.0,
    seed: int = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            callback=to_write,
            help="Also write an .html page with plots.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Simulate a day of sweeps: replica-hours and waiting of the pool's policy, of Ray Serve's
    default and of fixed pools. Starts nothing.
    """
    from dra_ray.bench import policy as job

    try:
        hours = tuple(float(hour) for hour in sweeps_at_h.split(","))
    except ValueError:
        raise ConfigError(
            f"--sweeps-at-h {sweeps_at_h}: write hours with commas between them, such as 9,11,14"
        ) from None
    workload = job.Workload(
        gpus=gpus, sweeps_at_h=hours, trials=trials, node_start_s=node_start_s, seed=seed
    )
    outcomes = job.compare(workload, job.suited(workload))
    terminal.table(
        [outcome.row.as_json() for outcome in outcomes],
        f"{len(hours)} sweeps of {trials} trials on {gpus} GPUs",
        json,
    )
    if out:
        job.write(Store(out), workload, outcomes)
        terminal.out.print(out)


@bench_app.command("step")
def bench_step(
    student: Annotated[
        str, typer.Option(help="As model.name; several with commas between them.")
    ] = "wrn-16-4",
    batch: Annotated[int, typer.Option(min=2)] = 32,
    resolution: Annotated[int, typer.Option(min=8, help="Pixels a side.")] = 32,
    attack_steps: Annotated[int, typer.Option(min=1)] = 10,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds; each takes every kind of step once.")
    ] = 3,
    threads: Threads = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Also time compiled forward passes and attacks (takes minutes to compile).",
        ),
    ] = True,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Seconds of one TRADES step: a textbook implementation against ours, in turn, from equal
    weights on equal images.
    """
    from dra_ray.bench import step as job

    found = []
    for name in student.split(","):
        figures = job.compare(
            student=name.strip(),
            batch=batch,
            resolution=resolution,
            attack_steps=attack_steps,
            rounds=rounds,
            threads=threads or os.cpu_count() or 1,
            compiled=compiled,
            device=device,
        )
        found.append(figures)
        title = f"TRADES-{attack_steps} step of {name}, batch {batch}, on {device}"
        hidden = ("seconds_min", "seconds_max", "gflop_per_s", "peak_gflop_per_s")
        terminal.table(figures["rows"], title, hidden=hidden)
        if figures["ratio_bf16"] is None:
            terminal.err.print("note: this CPU has no bfloat16 instructions, so bf16 was left out")
    if json:
        Store(json).write_json(found[0] if len(found) == 1 else {"students": found})


@bench_app.command("teacher")
def bench_teacher(
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER...",
            help="Folders, package:NAME, or with random weights: recipes of kind teacher, "
            "lightning-dit-xl.",
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="As teacher.micro_batch.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds; each encodes once in every way.")
    ] = 5,
    threads: Threads = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Also time compiled networks (takes minutes to compile)."
        ),
    ] = True,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Images per second of frozen teachers, by how they compute, and what an answer costs beside
    the network.
    """
    from dra_ray.bench import teacher as job

    found = []
    for name in teachers:
        figures = job.compare(
            name,
            batch=batch,
            rounds=rounds,
            threads=threads or os.cpu_count() or 1,
            compiled=compiled,
            device=device,
        )
        found.append(figures)
        title = (
            f"{name}, {figures['gflop_per_image']:.3g} GFLOP an image, batch {batch}, on {device}"
        )
        terminal.table(figures["rows"], title, hidden=("teacher",))
        beside = ", ".join(f"{part} {share:.2%}" for part, share in figures["beside"].items())
        terminal.out.print(f"beside the network, of fp32's time: {beside}")
    if json:
        Store(json).write_json(found)


@bench_app.command("start")
def bench_start(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A trained run; default: `dra train` alone is timed."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="That is trained.")] = "digits-dm-at",
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each command.")] = 5,
    json: Json = None,
) -> None:
    """Seconds from `dra train` to its first step, and from `dra evaluate` to its first batch, by
    part.
    """
    from dra_ray.bench import start as job

    with tempfile.TemporaryDirectory() as folder:
        rows = job.measure(Store(folder), rounds, recipe, run)
    terminal.table([dataclasses.asdict(row) for row in rows], f"{rounds} starts", json)


@bench_app.command("evaluate")
def bench_evaluate(
    run: RunArgument,
    images: Annotated[
        int, typer.Option(min=2, help="The first so many test images of the run.")
    ] = 256,
    batch: Annotated[int, typer.Option(min=2)] = 64,
    eps_255: Annotated[
        float | None,
        typer.Option("--eps-255", help="Radius in pixel steps of 1/255; default: the run's."),
    ] = None,
    effort: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1.0,
            help="Scales all steps and queries; below 1 it is no standard AutoAttack.",
        ),
    ] = 1.0,
    threads: Threads = None,
    driver: Annotated[
        bool,
        typer.Option(
            "--driver/--no-driver",
            help="Also measure how busy the driver keeps 1, 2 and 4 waiting workers, and what it "
            "holds of 2,000 images of 224 pixels.",
        ),
    ] = True,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Seconds of AutoAttack: the package pyautoattack against the levels reference, fast and
    screen, on a trained run.
    """
    from dra_ray.bench import evaluate as job

    rows, figures = job.compare(
        Store(run),
        images=images,
        batch=batch,
        eps_255=eps_255,
        effort=effort,
        threads=threads or os.cpu_count() or 1,
        device=device,
    )
    terminal.table(
        rows, f"AutoAttack on {images} images of {run}, batch {batch}, on {figures['device']}", None
    )
    same = (
        "the package's to the bit"
        if figures["reference_bit_identical"]
        else "NOT the package's to the bit"
    )
    terminal.out.print(
        f"images of level reference: {same}; verdicts of level fast that differ: "
        f"{figures['fast_verdicts_differ']}; "
        f"screen overrates by {100 * figures['screen_accuracy_gap']:.2f} points; "
        f"{100 * figures['survivors_share']:.1f} % survive"
    )
    if driver:
        from dra_ray import cluster
        from dra_ray.bench import driver as queue

        with tempfile.TemporaryDirectory() as folder, cluster.connect(num_cpus=4):
            figures["driver"] = queue.efficiency(Store(folder) / "time")
            figures["driver_memory"] = queue.memory(Store(folder) / "memory")
        terminal.table(figures["driver"], "an evaluation whose batches only wait", None)
        terminal.table([figures["driver_memory"]], "what its driver holds", None)
    if json:
        Store(json).write_json(figures)


@bench_app.command("pool")
def bench_pool(
    rounds: Annotated[int, typer.Option(min=1, help="Multiplies the number of requests.")] = 1,
    student: Annotated[str, typer.Option(help="Of the training step, as model.name.")] = "wrn-16-4",
    batch: Annotated[int, typer.Option(min=2, help="Of the training step.")] = 32,
    steps: Annotated[
        int, typer.Option(min=1, help="Timed pairs of steps, with and without alignment.")
    ] = 9,
    json: Json = None,
) -> None:
    """The same requests through a teacher in process, plain Ray actors and the pool; the overhead
    of a step; scale-up; sharing.
    """
    with terminal.Bars() as bars:
        from dra_ray import cluster
        from dra_ray.bench import pool as job

        with cluster.connect():
            figures = job.compare(rounds, student, batch, steps, bars.say)
    facts = figures.as_json()
    if json:
        Store(json).write_json(facts)
    terminal.table(facts.pop("rows"), "requests of 3x32x32 images", None)
    terminal.table([facts], "the pool", None)


@bench_app.command("data")
def bench_data(
    images: Annotated[
        str, typer.Option(help="Sizes of the sets, with commas between them.")
    ] = "1000000,50000000",
    batch: Annotated[int, typer.Option(min=2)] = 1024,
    fraction: Annotated[float, typer.Option(min=0.01, max=0.99, help="Of it synthetic.")] = 0.7,
    latency_ms: Annotated[
        float, typer.Option(min=0, help="Of every reply of the object store.")
    ] = 20.0,
    step_s: Annotated[
        float, typer.Option(min=0, help="Of the training step that batches are read beside.")
    ] = 0.25,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of every measured part.")] = 10.0,
    workdir: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where sets and caches lie meanwhile, some 10 GB."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            callback=to_write,
            help="Also write an .html page with the table and the worker's memory.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Batches from memory, a disk, a warm cache and an object store on this machine: images per
    second with augmentation, first batch, waiting, memory, and bytes fetched over bytes needed.
    """
    try:
        sizes = tuple(int(size) for size in images.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < batch:
        raise ConfigError(
            f"--images {images}: write numbers of images, at least a batch each, with commas "
            "between them, such as 1000000,50000000"
        )
    from dra_ray.bench import data as job

    settings = job.Settings(batch, fraction, sizes, latency_ms, seconds, step_s)
    rows, figures, memory = job.in_folder(settings, workdir)
    terminal.table([dataclasses.asdict(row) for row in rows], "batches of 32x32 images", None)
    if json:
        Store(json).write_json(figures | {"rows": [dataclasses.asdict(row) for row in rows]})
    if out:
        job.write(Store(out), rows, memory, max(sizes))
        terminal.out.print(out)


@bench_app.command("sweep")
def bench_sweep(
    repeats: Annotated[
        int, typer.Option(min=2, help="Draws of learning curves; every rule plays each.")
    ] = 200,
    trials: Annotated[int, typer.Option(min=4, help="Of a sweep.")] = 32,
    grace_epochs: Annotated[
        int, typer.Option(min=1, max=26, help="As asha.grace_epochs, of 27.")
    ] = 2,
    level: Annotated[
        float, typer.Option(min=0.0001, max=0.9999, help="As asha.level, of noise_aware.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = None,
) -> None:
    """Simulate early stopping on known learning curves: regret and images of each rule, at three
    noise levels, with 95 % intervals. Starts nothing.
    """
    from dra_ray.bench import sweep as job

    rows = job.compare(trials, repeats, grace_epochs, level, seed)
    terminal.table(rows, f"{trials} trials of 27 epochs, {repeats} repeats, level {level:g}", json)


@bench_app.command("trial")
def bench_trial(
    trials: Annotated[int, typer.Option(min=1, help="Trials of each way.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a trial.")] = 2,
    json: Json = None,
) -> None:
    """What a sweep's trial costs beyond its training: seconds, CPU seconds and processes, in a
    process of its own and on Ray Train.
    """
    import dataclasses

    from dra_ray.bench import trial as job

    with tempfile.TemporaryDirectory() as folder:
        rows = job.measure(Store(folder), trials, epochs)
    terminal.table([dataclasses.asdict(row) for row in rows], f"{trials} trials one by one", json)
