"""`dra bench step`: a textbook TRADES step against ours, as students times ways to compute."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config, data, memory, plan, students
from dra_ray.attacks import pgd
from dra_ray.data import random
from dra_ray.errors import RunError
from dra_ray.storage import large
from dra_ray.students import wrn
from dra_ray.training import arithmetic, averaging, step

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to take the same step."""

    name: str
    compute: config.Compute | None  # none: the textbook step


Found = TypeVar("Found")
PEAK_OF = {"bf16": "bfloat16"}  # of a variant; float32 of the others
OURS_FP32 = ("eager", "forward", "attack", "cuda graphs")


def compare(
    *,
    student: str,
    batch: int,
    resolution: int,
    attack_steps: int,
    rounds: int,
    threads: int,
    compiled: bool,
    device: str,
) -> dict[str, Any]:
    """Time a textbook TRADES step against ours, in turn, from equal weights on equal images: rows,
    one for each way to compute, and figures.

    The textbook step is DM-AT's as its authors run it: NCHW, eager, float32, gradients of the
    parameters enabled during the attack, a clean forward of its own for the target. Each variant
    has a process of its own, as a training has: ours sets what its C library does with freed memory
    (`arithmetic.prepare`), the textbook's does not. Every round starts all variants from the same
    weights, so their losses may differ by rounding only. `peak_share` is the share of the matmul
    peak, measured in the same run, that the step's necessary arithmetic (see `dra plan`) reaches.
    `first_s` is what the first step took longer than the others: compiling, mostly. `memory_gib`
    is the most that a step needed, on a CPU what its process grew by, compiling included. bf16 is
    left out on a CPU without instructions for it.
    """
    torch.set_num_threads(threads)
    memory.keep_freed()  # for the peak, which page faults would lower
    shape = data.Shape(CLASSES, 3, resolution, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    on = torch.device(device)
    experiment = config.Experiment(
        model=config.Model(name=student),
        data=config.Data(crop_pad=0, flip=False),
        threat=config.Threat(steps=attack_steps),
        align=config.Align(weight=0.0),
        optim=config.Optim(batch=batch, lr=0.01),
    )
    variants = _variants(on, compiled)
    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    found: dict[str, list[float]] = {v.name: [] for v in variants}
    peaks: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    first: dict[str, float] = {}
    needed: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        arms = {
            v.name: stack.enter_context(contextlib.closing(Arm(v, experiment, shape, threads, on)))
            for v in variants
        }
        for number in range(rounds + 1):  # the first round warms up and compiles
            for name, arm in arms.items():
                took, loss, needed[name] = arm.step()
                if number:
                    seconds[name].append(took)
                    found[name].append(loss)
                else:
                    first[name] = took
            for kind in peaks:
                peaks[kind].append(matmul_flops(getattr(torch, kind), on))
    most = {kind: max(values) for kind, values in peaks.items()}
    figures = _figures(experiment, shape, seconds, found, most)
    for row in figures["rows"]:
        row["first_s"] = first[row["step"]] - row["seconds"]
        row["memory_gib"] = needed[row["step"]]
    return figures


Taken = tuple[float, float, float]  # seconds, loss, GiB


class Arm:
    """One variant in a process of its own, which waits while others are timed."""

    def __init__(
        self,
        variant: Variant,
        experiment: config.Experiment,
        shape: data.Shape,
        threads: int,
        device: torch.device,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._name, (self._pipe, theirs) = variant.name, context.Pipe()
        given = (theirs, variant, experiment, shape, threads, device)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()

    def step(self) -> Taken:
        """From the weights that all variants start from; `RunError` where the process has ended."""
        try:
            self._pipe.send(True)
            taken: Taken = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RunError(
                f"the process of the step '{self._name}' ended; what it said is above"
            ) from error
        return taken

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10.0)
        self._process.kill()


def _serve(
    pipe: Connection,
    variant: Variant,
    experiment: config.Experiment,
    shape: data.Shape,
    threads: int,
    device: torch.device,
) -> None:
    """A step for every message, until the other end is closed."""
    torch.set_num_threads(threads)
    before = _most_gib(device)
    batch, drawn = experiment.optim.batch, torch.Generator().manual_seed(0)
    size = (batch, shape.channels, shape.resolution, shape.resolution)
    images = torch.randint(256, size, dtype=torch.uint8, generator=drawn).to(device)
    labels = torch.randint(shape.num_classes, (batch,), generator=drawn).to(device)
    reference, _ = step.initial_state(experiment, shape, (), device)
    start = {name: value.clone() for name, value in reference.student.state_dict().items()}
    load, run = _runner(variant, experiment, shape, images, labels, device)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while pipe.recv():
            load(start)
            took, loss = timed(run, device)
            pipe.send((took, float(loss), _most_gib(device) - before))


def _most_gib(device: torch.device) -> float:
    """The most memory that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return large.most_bytes() / 2**30


def timed(run: Callable[[], Found], device: torch.device) -> tuple[float, Found]:
    """(seconds, what `run` returned); on a GPU by its own clock."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        found = run()
        events[1].record()
        torch.cuda.synchronize(device)
        return events[0].elapsed_time(events[1]) / 1e3, found
    begun = time.perf_counter()
    found = run()
    return time.perf_counter() - begun, found


def has_bf16(device: torch.device) -> bool:
    """Without such instructions a CPU emulates bfloat16, which takes minutes a step and tells
    nothing.
    """
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _variants(on: torch.device, compiled: bool) -> list[Variant]:
    variants = [Variant("textbook", None), Variant("eager", config.Compute())]
    ways: tuple[Literal["forward", "attack"], ...] = ("forward", "attack") if compiled else ()
    variants += [Variant(way, config.Compute(compile=way)) for way in ways]
    if compiled and on.type == "cuda":
        compute = config.Compute(compile="attack", cuda_graphs=True)
        variants.append(Variant("cuda graphs", compute))
    if has_bf16(on):
        compute = config.Compute(precision="bf16", compile="attack" if compiled else "off")
        variants += [Variant("bf16", compute)]
    return variants


def _figures(
    experiment: config.Experiment,
    shape: data.Shape,
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    peaks: dict[str, float],
) -> dict[str, Any]:
    with torch.device("meta"):
        student = students.build(experiment.model, shape).eval()
    forward = plan.macs(
        lambda: student(
            torch.empty(1, shape.channels, shape.resolution, shape.resolution, device="meta")
        )
    )
    flops = (
        2 * plan.step_units(experiment.loss, experiment.threat) * forward * experiment.optim.batch
    )
    textbook = statistics.median(seconds["textbook"])
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        # rounds are paired: a ratio per round, so that a slow moment of the machine hits both sides
        ratios = [a / b for a, b in zip(seconds["textbook"], times, strict=True)]
        off = max(
            abs(a - b) / abs(b) for a, b in zip(losses[name], losses["textbook"], strict=True)
        )
        peak = peaks[PEAK_OF.get(name, "float32")]
        middle = statistics.median(times)
        rows.append(
            {
                "step": name,
                "seconds": middle,
                "seconds_min": min(times),
                "seconds_max": max(times),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "loss_rel_diff": off,
                "gflop_per_s": flops / middle / 1e9,
                "peak_gflop_per_s": peak / 1e9,
                "peak_share": flops / middle / peak,
            }
        )
    bf16 = next((row for row in rows if row["step"] == "bf16"), None)
    ours = [row for row in rows if row["step"] in OURS_FP32]
    best = max(ours, key=lambda row: row["ratio"])
    return {
        "student": experiment.model.name,
        "batch": experiment.optim.batch,
        "rounds": len(seconds["textbook"]),
        "textbook_s": textbook,
        "ratio_fp32": best["ratio"],
        "ratio_bf16": bf16["ratio"] if bf16 else None,
        "loss_rel_diff": max(row["loss_rel_diff"] for row in ours),
        "loss_rel_diff_bf16": bf16["loss_rel_diff"] if bf16 else None,
        "peak_share": best["peak_share"],
        "rows": rows,
    }


Runner = tuple[Callable[[dict[str, Tensor]], None], Callable[[], Tensor]]


def _runner(
    variant: Variant,
    experiment: config.Experiment,
    shape: data.Shape,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
) -> Runner:
    """(set weights, take a step and return its loss) of one variant."""
    everything = slice(0, experiment.optim.batch)
    if variant.compute is None:
        torch.manual_seed(experiment.seed)
        student = students.build(experiment.model, shape).to(device)
        book = Textbook(student, experiment)
        return book.load, lambda: book.step(images, labels)
    ours = experiment.model_copy(update={"compute": variant.compute})
    arithmetic.prepare(variant.compute, torch.get_num_threads())
    state, _ = step.initial_state(ours, shape, (), device)

    def load(weights: dict[str, Tensor]) -> None:
        state.student.load_state_dict(weights)
        state.optimizer.state.clear()
        state.step = 0

    def run() -> Tensor:
        loss = step.step(
            state,
            ours,
            step.prepare(ours, images, labels, state.step, everything, ()),
            everything,
        )[0]
        averaging.update(state.average, state.student, 0.995)
        return loss

    return load, run


def _as_published(student: nn.Module) -> nn.Module:
    """DM-AT's network pads before every first convolution of a block; ours lets those of stride 1
    do it.
    """

    def padded(conv: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (F.pad(given[0], (1, 1, 1, 1)),)

    for block in student.modules():
        if isinstance(block, wrn.Block) and block.stride == 1:
            block.conv_0.padding = (0, 0)
            block.conv_0.register_forward_pre_hook(padded)
    return student


class Textbook:
    """TRADES-k as DM-AT's code takes it: the plain reading of the formulas, without any of our
    short cuts.
    """

    def __init__(self, student: nn.Module, experiment: config.Experiment) -> None:
        self.student, self.experiment = _as_published(student), experiment
        self.average = copy.deepcopy(student)
        optim = experiment.optim
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            lr=optim.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=optim.weight_decay,
        )

    def load(self, weights: dict[str, Tensor]) -> None:
        self.student.load_state_dict(weights)
        self.optimizer.state.clear()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        threat, loss = self.experiment.threat, self.experiment.loss
        student = self.student.train()
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        x = images.float() / 255
        noise = torch.rand(
            x.shape, generator=random.generator(self.experiment.seed, random.Stream.ATTACK, 0)
        ).to(x.device)
        with pgd.untracked(student):
            target = F.softmax(student(x), 1).detach()
            adversarial = (x + threat.eps * (2 * noise - 1)).clamp(0, 1)
            for _ in range(threat.steps):
                adversarial.requires_grad_()
                divergence = F.kl_div(
                    F.log_softmax(student(adversarial), 1), target, reduction="batchmean"
                )
                (gradient,) = torch.autograd.grad(divergence, adversarial)
                adversarial = adversarial.detach() + threat.step * gradient.sign()
                adversarial = torch.min(
                    torch.max(adversarial, x - threat.eps), x + threat.eps
                ).clamp(0, 1)
        self.optimizer.zero_grad()
        clean, attacked = student(x), student(adversarial)
        divergence = F.kl_div(
            F.log_softmax(attacked, 1), F.softmax(clean, 1), reduction="batchmean"
        )
        total = (
            F.cross_entropy(clean, labels, label_smoothing=loss.label_smoothing)
            + loss.beta * divergence
        )
        total.backward()
        self.optimizer.step()
        for kept, live in zip(self.average.parameters(), student.parameters(), strict=True):
            kept.data.mul_(0.995).add_(live.data, alpha=0.005)
        total.item()
        return total.detach()


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product, the best of a few: what the arithmetic units can do at
    most. Also as a 1x1 convolution, since matrix products and convolutions come from different
    libraries, and MKL's products are slow on AMD's processors.
    """
    size = 4096 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    pixels = a.T.reshape(1, size, size // 64, 64).contiguous(memory_format=torch.channels_last)
    weight = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    best = float("inf")
    products: list[Callable[[], Tensor]] = [lambda: a @ b, lambda: F.conv2d(pixels, weight)]
    for product in products:
        for _ in range(3):
            wait(device)
            begun = time.perf_counter()
            product()
            wait(device)
            best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
