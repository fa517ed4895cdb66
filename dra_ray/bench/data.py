"""`dra bench data`: how fast a training step gets its batches, from memory, a disk, a warm cache
and an object store, of a small set and of a large one.

Every case is a process of its own, whose memory is watched. The object store is a small server on
this machine that speaks as much of S3 as reading takes and answers after a fixed time. All shards
of a set are the same file under many names: 50 million images need no 154 GB of disk for it.
"""

from __future__ import annotations

import dataclasses
import functools
import http.server
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import ray  # noqa: F401  # brings psutil along
import torch

import psutil  # isort: skip

from dra_ray import config, data
from dra_ray.config.conversion import SHARD_BYTES
from dra_ray.data import Split, augment, conversion, rows
from dra_ray.data.batches import BatchPlan
from dra_ray.data.loader import Batches
from dra_ray.data.random import Stream, generator
from dra_ray.data.windows import Windows, suited
from dra_ray.report import html
from dra_ray.report.plots import Figure, frame, line
from dra_ray.storage import Store
from dra_ray.workloads import convert

IMAGE = (32, 32, 3)
REAL = 50_000
ROUNDS, SKIPPED = 5, 3  # of memory and source in turn; batches that were read ahead meanwhile
PASS_SHARDS, PASS_WINDOW = 12, 3  # of the case that goes through a whole set
CONVERTED, COPIED = 200_000, 2**22  # images; bytes at a time
BUCKET = "bench"
LOOK_S = 0.25


@dataclasses.dataclass(frozen=True)
class Settings:
    batch: int
    fraction: float
    images: tuple[int, ...]
    latency_ms: float
    seconds: float  # of each measured part of a case
    step_s: float  # of the training step that batches are read beside

    @property
    def per_batch(self) -> int:
        return int(self.batch * self.fraction)


@dataclasses.dataclass(frozen=True)
class Row:
    """One case. `wait_share`: of the time of training steps, each `step_s` long, that they wait for
    their batch. `fetched_over_needed`: bytes of the store's replies over the pixels of all draws.
    """

    source: str
    images: int
    images_per_s: float | None = None
    ram_images_per_s: float | None = None
    of_ram: float | None = None
    first_batch_s: float | None = None
    wait_share: float | None = None
    worker_rss_gb: float | None = None
    fetched_over_needed: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    source: str  # disk, cache, store or pass
    images: int
    uri: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


Memory = list[tuple[float, float]]  # (seconds, bytes)


def compare(settings: Settings, folder: str) -> tuple[list[Row], dict[str, float], Memory]:
    """(rows, the figures of `--json`, memory of the worker on the largest set over time)."""
    store = Store(folder)
    shard_images = SHARD_BYTES // math.prod(IMAGE)
    drawn = np.random.default_rng(0)
    image = drawn.integers(0, 256, (shard_images, *IMAGE), dtype=np.uint8)
    label = drawn.integers(0, 10, shard_images)
    digest = (store / "shard.npy").write_npy(rows.records(image, label))
    sizes = {images: _set(store, images, shard_images, digest) for images in settings.images}
    whole = _set(store, PASS_SHARDS * shard_images, shard_images, digest)
    found: list[Row] = []
    memory: Memory = []
    with _serving(folder, settings.latency_ms / 1000) as (endpoint, sent):
        remote = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for images, name in sizes.items():
            own = remote | {"DRA_CACHE": (store / f"cache-{images}").uri}
            cold, watched = _case(settings, Case("store", images, f"s3://{BUCKET}/{name}", own))
            warm, _ = _case(settings, Case("cache", images, f"s3://{BUCKET}/{name}", own))
            disk, _ = _case(settings, Case("disk", images, (store / name).uri))
            found += [disk, warm, cold]
            memory = watched
        before = sent.bytes
        room = str((2 * PASS_WINDOW + 2) * (store / "shard.npy").size())
        own = remote | {"DRA_CACHE": (store / "cache-pass").uri, "DRA_CACHE_BYTES": room}
        case = Case("pass", PASS_SHARDS * shard_images, f"s3://{BUCKET}/{whole}", own)
        passed, _ = _case(settings, case)
        needed = PASS_SHARDS * shard_images * math.prod(IMAGE)
        ratio = round((sent.bytes - before) / needed, 3)
        found.append(dataclasses.replace(passed, fetched_over_needed=ratio))
    figures = _figures(found, ratio) | {
        "plan_300m_vs_1m": _planning(settings, 300_000_000) / _planning(settings, 1_000_000),
        "convert_vs_copy": _converting(store),
    }
    return found, {name: round(value, 4) for name, value in figures.items()}, memory


def _figures(found: list[Row], fetched: float) -> dict[str, float]:
    largest = max(row.images for row in found)
    of = {row.source: row for row in found if row.images == largest}
    figures = {
        "warm_vs_ram": of["cache"].of_ram,
        "first_batch_s": of["store"].first_batch_s,
        "worker_rss_gb": max(row.worker_rss_gb or 0 for row in of.values()),
        "wait_share": of["cache"].wait_share,
        "fetched_over_needed": fetched,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _set(store: Store, images: int, shard_images: int, digest: str) -> str:
    """The name of a set whose shards are links to one file."""
    name, count = f"set-{images}", -(-images // shard_images)
    os.makedirs((store / name).uri, exist_ok=True)
    for number in range(count):
        os.link((store / "shard.npy").uri, (store / name / rows.shard_name(number)).uri)
    shards = [
        rows.Shard(name=rows.shard_name(number), images=shard_images, sha256=digest)
        for number in range(count)
    ]
    labels = (store / "shard.npy").read_npy()["label"]
    rows.write_index(
        store / name, shards, IMAGE, np.bincount(labels) * count, {"made_by": "dra bench data"}
    )
    return name


def _planning(settings: Settings, images: int) -> float:
    """Median seconds to plan a batch from a set of so many images, past the first small windows."""
    shard_images = SHARD_BYTES // math.prod(IMAGE)
    offsets = np.append(np.arange(0, images, shard_images), images)
    size = suited(math.prod(IMAGE), settings.per_batch, replace=True)
    windows = Windows(0, offsets, size, replace=True)
    plan = BatchPlan(0, REAL, images, settings.batch, settings.fraction, None, windows)
    taken = []
    for step in range(1000, 1300):
        began = time.perf_counter()
        plan.indices(step)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _converting(store: Store) -> float:
    """Seconds in which a worker on every core converts an `.npz` file, over those of a plain copy
    of it: medians of three, in turn.
    """
    source, target = store / "source.npz", store / "converted"
    image = np.random.default_rng(0).integers(0, 256, (CONVERTED, *IMAGE), dtype=np.uint8)
    source.write_npz(image=image, label=np.arange(CONVERTED) * 10 // CONVERTED)
    del image
    settings, workers = config.Conversion(source=source.uri), os.cpu_count() or 1
    opened = conversion.open_source(settings, target)
    order = convert.order_of(settings, opened)
    make = functools.partial(convert._make, target.uri, opened, order, again=False)
    copying, converting = [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(time.sleep, [0.1] * workers))  # they have started
        for _ in range(4):
            began = time.perf_counter()
            size = source.size()
            parts = (source.read_bytes(at, COPIED) for at in range(0, size, COPIED))
            (store / "copied").write_stream(parts)
            copying.append(time.perf_counter() - began)
            began = time.perf_counter()
            list(pool.map(make, range(order.shards)))
            converting.append(time.perf_counter() - began)
            target.remove()
    # the first round imports
    return statistics.median(converting[1:]) / statistics.median(copying[1:])


# -- a case in its own process ---------------------------------------------------------------------
def _case(settings: Settings, case: Case) -> tuple[Row, Memory]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(settings, case, theirs))
    process.start()
    theirs.close()
    memory: Memory = []
    began, row = time.monotonic(), None
    try:
        while row is None:
            if mine.poll(LOOK_S):
                row = mine.recv()
            memory.append((time.monotonic() - began, _resident_bytes(process.pid)))
    except EOFError:
        raise RuntimeError(f"the process that reads from {case.source} ended") from None
    finally:
        process.join(10)
    peak = round(max(size for _, size in memory) / 1e9, 3)
    return dataclasses.replace(row, worker_rss_gb=peak), memory


def _resident_bytes(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _measured(settings: Settings, case: Case, result: Connection) -> None:
    os.environ.update(case.environment)
    torch.set_num_threads(1)
    experiment = config.Experiment(
        synthetic=config.Synthetic(
            uri=case.uri,
            images=case.images,
            fraction=settings.fraction,
            window_images=(
                PASS_WINDOW * (SHARD_BYTES // math.prod(IMAGE)) if case.source == "pass" else None
            ),
        ),
        optim=config.Optim(batch=settings.batch),
        align=config.Align(weight=0.0),
    )
    real = _random(REAL)
    began = time.perf_counter()
    shape = data.Shape(10, IMAGE[2], IMAGE[0], (0.5,) * 3, (0.25,) * 3)

    def opened() -> Batches:
        synthetic = rows.read(Store(case.uri), case.images, shape, "cifar10")
        windows = data.windowed(experiment, synthetic)
        plan = data.batch_plan(experiment, REAL, case.images, windows)
        mine, device = slice(0, settings.batch), torch.device("cpu")
        return Batches(real, synthetic, plan, device, mine, resident_bytes=0)

    loader, row = opened(), Row(case.source, case.images)
    if case.source == "pass":
        _pass(loader, case.images // settings.per_batch)
    else:
        _taken(loader, experiment, 0)
        first = time.perf_counter() - began
        if case.source == "cache":  # all shards come that the measured batches need, and more
            _for(loader, experiment, 1, 3 * settings.seconds)
            loader.close()
            loader = opened()
        step, rates, ram_rates = _in_turn(loader, real, experiment, settings)
        ratios = [rate / ram for rate, ram in zip(rates, ram_rates, strict=True)]
        row = dataclasses.replace(
            row,
            images_per_s=round(statistics.median(rates)),
            ram_images_per_s=round(statistics.median(ram_rates)),
            of_ram=round(statistics.median(ratios), 3),
            first_batch_s=round(first, 3),
            wait_share=round(_waits(loader, experiment, step, settings), 4),
        )
    loader.close()
    result.send(row)
    result.close()


def _random(count: int) -> Split:
    drawn = torch.Generator().manual_seed(1)
    height, width, channels = IMAGE
    shape = (count, channels, height, width)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=drawn)
    return Split(images, torch.randint(10, (count,), generator=drawn))


def _taken(loader: Batches, experiment: config.Experiment, step: int) -> None:
    """Batch `step`, augmented as a training step does."""
    images, _ = loader.get(step)
    draws = augment.parameters(len(images), experiment.data, generator(0, Stream.AUGMENT, step))
    augment.apply(images, experiment.data, draws)


def _in_turn(
    loader: Batches, real: Split, experiment: config.Experiment, settings: Settings
) -> tuple[int, list[float], list[float]]:
    """The next step, and images per second from the source and from memory, in ROUNDS turns."""
    mine = slice(0, settings.batch)
    plan = BatchPlan(0, REAL, 0, settings.batch, 0.0)
    memory = Batches(real, None, plan, torch.device("cpu"), mine)
    step, other = 1, 0
    rates, ram_rates = [], []
    for _ in range(ROUNDS):
        other, seconds = _for(memory, experiment, other, settings.seconds / ROUNDS)
        ram_rates.append(settings.batch / statistics.fmean(seconds))
        step, seconds = _for(loader, experiment, step, settings.seconds / ROUNDS)
        rates.append(settings.batch / statistics.fmean(seconds[SKIPPED:] or seconds))
    memory.close()
    return step, rates, ram_rates


def _for(
    loader: Batches, experiment: config.Experiment, step: int, seconds: float
) -> tuple[int, list[float]]:
    """Batches for so long, as fast as they come: the next step, and the seconds of each."""
    taken: list[float] = []
    while sum(taken) < seconds:
        began = time.perf_counter()
        _taken(loader, experiment, step)
        taken.append(time.perf_counter() - began)
        step += 1
    return step, taken


def _waits(loader: Batches, experiment: config.Experiment, step: int, settings: Settings) -> float:
    """Part of the time that steps wait for batches, which are read while the ones before train."""
    waited = trained = 0.0
    while waited + trained < settings.seconds:
        began = time.perf_counter()
        loader.get(step)
        got = time.perf_counter()
        weights = torch.ones(256, 256)
        while time.perf_counter() < got + settings.step_s:
            weights @ weights  # a step computes; it does not sleep
        waited, trained = waited + got - began, trained + time.perf_counter() - got
        step += 1
    return waited / (waited + trained)


def _pass(loader: Batches, steps: int) -> None:
    for step in range(steps):
        loader.get(step)


# -- the object store ------------------------------------------------------------------------------
@dataclasses.dataclass
class Sent:
    bytes: int = 0


@contextmanager
def _serving(folder: str, latency_s: float) -> Iterator[tuple[str, Sent]]:
    """(endpoint, what was sent) of a store with `folder` as its one bucket, to read from alone."""
    sent, lock = Sent(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            time.sleep(latency_s)
            name = self.path.partition("?")[0].removeprefix(f"/{BUCKET}/")
            path = os.path.join(folder, name)
            if ".." in name or not os.path.isfile(path):
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = os.path.getsize(path)
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", f'"{size}-1"')
            self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
            self.end_headers()
            if body:
                self.wfile.write(Store(path).read_bytes())
                with lock:
                    sent.bytes += size

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()


# -- the page --------------------------------------------------------------------------------------
def write(page: Store, found: list[Row], memory: Memory, images: int) -> None:
    """One HTML file: the table, and the memory of the worker that reads the largest set."""
    columns = [field.name for field in dataclasses.fields(Row)]
    table = html.Table(
        [column.replace("_", " ") for column in columns],
        [list(dataclasses.astuple(row)) for row in found],
        sortable=True,
    )
    seconds = [round(at, 2) for at, _ in memory]
    sizes = [round(size / 1e9, 3) for _, size in memory]
    figure: Figure = {
        "data": [line(0, "resident memory", seconds, sizes, "lines")],
        "layout": frame({"title": "seconds"}, {"title": "GB", "rangemode": "tozero"}),
    }
    sections = [
        html.section("cases", "Where batches come from", "", table),
        html.section(
            "memory",
            "Memory of the worker",
            f"It reads {images:,} images from an object store, from its start on.",
            html.plot(figure, "resident memory"),
        ),
    ]
    page.write_text(html.page("How fast batches come", "Benchmark", "", sections))


def in_folder(
    settings: Settings, workdir: str | None
) -> tuple[list[Row], dict[str, float], Memory]:
    """`compare` in a folder of its own, which goes at the end."""
    with tempfile.TemporaryDirectory(dir=workdir, prefix="dra-bench-data-") as folder:
        return compare(settings, folder)
