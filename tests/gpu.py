"""What must be looked at where there is a GPU: `tests/gpu.sh [DEVICE]` prints a table to paste.

Each check compares the device with the CPU, or with itself, and says what it saw. With DEVICE=cpu
they all run, and the comparisons with the CPU are of it with itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from dra_ray import config, students
from dra_ray.attacks import pgd
from dra_ray.attacks.autoattack import single_process
from dra_ray.attacks.plan import Settings
from dra_ray.config.catalogue import Effort
from dra_ray.data import Shape
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.source import LocalTeacher
from dra_ray.training import arithmetic, step

SHAPE = Shape(10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
THREATS = {
    "linf": config.Threat(steps=5),
    "l2": config.Threat(norm="l2", start="normal", eps_255=128, step_255=32, steps=5),
}
Seen = tuple[bool, str]  # whether it is as it must be, and what was seen


def _student(name: str, device: str, **compute: object) -> torch.nn.Module:
    torch.manual_seed(0)
    built = students.build(config.Model(name=name), SHAPE).to(device)
    how = config.Compute.model_validate(compute)
    arranged: torch.nn.Module = arithmetic.arranged(built, how, SHAPE.resolution)
    return arranged


def _batch(device: str, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 32, 32, generator=drawn)
    return x.to(device), torch.randint(10, (count,), generator=drawn).to(device)


def students_compute_as_on_the_cpu(device: str) -> Seen:
    """float32, without TensorFloat-32."""
    arithmetic.prepare(config.Compute(), torch.get_num_threads())
    worst = 0.0
    for name in ("wrn-16-4", "relu-wrn-10-1", "resnet-18", "vit-t-4"):
        x, _ = _batch(device)
        with torch.no_grad():
            there = _student(name, device).eval()(x).cpu()
            here = _student(name, "cpu").eval()(x.cpu())
        worst = max(worst, float((there - here).abs().max() / here.abs().max()))
    return worst < 1e-4, f"logits differ by {worst:.1e} of the largest"


def bf16_is_near_fp32(device: str) -> Seen:
    x, _ = _batch(device)
    with torch.no_grad():
        half = _student("wrn-16-4", device, precision="bf16").eval()(x)
        whole = _student("wrn-16-4", device).eval()(x)
    off = float((half - whole).abs().max() / whole.abs().max())
    return half.dtype == torch.float32 and off < 0.1, f"logits differ by {off:.1e} of the largest"


def an_attack_as_one_graph_is_that_without(device: str) -> Seen:
    """To the bit with the tracer alone, up to rounding with the compiler."""
    x, labels = _batch(device)
    seen, sound = [], True
    for norm, threat in THREATS.items():
        student = _student("wrn-10-1", device).train()
        noise = pgd.noise_like(x.shape, threat, torch.Generator().manual_seed(2)).to(device)
        with torch.no_grad(), pgd.as_attacked(student, threat):
            target = F.softmax(student(x), 1)
        for attack, given in (("trades", target), ("adversarial", labels)):
            run: Callable[..., torch.Tensor] = getattr(pgd, attack)
            plain = run(student, x, given, threat, noise)
            traced = run(student, x, given, threat, noise, climb=pgd.graph("aot_eager"))
            compiled = run(student, x, given, threat, noise, climb=pgd.graph())
            sound &= torch.equal(traced, plain)
            away = (compiled - x).flatten(1)
            far = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
            sound &= bool((far <= threat.eps + 1e-5).all())
            same = float((compiled == plain).double().mean())
            seen.append(f"{norm} {attack}: {torch.equal(traced, plain)}, {same:.0%} of pixels")
    return sound, "; ".join(seen)


def cuda_graphs_take_the_steps_without(device: str) -> Seen:
    """Losses of three training steps, the first of which has another momentum of BatchNorm. On a
    CPU the compiler leaves such graphs out.
    """
    x, labels = _batch(device)
    pixels, found = (255 * x).round().to(torch.uint8), {}
    for cuda_graphs in (False, True):
        experiment = config.Experiment(
            model=config.Model(name="wrn-10-1"),
            data=config.Data(crop_pad=0, flip=False),
            threat=config.Threat(steps=5),
            align=config.Align(weight=0.0),
            optim=config.Optim(batch=len(x), lr=0.01),
            compute=config.Compute(compile="attack", cuda_graphs=cuda_graphs),
            resources=config.Resources(gpus_per_worker=1.0),
        )
        state, _ = step.initial_state(experiment, SHAPE, (), torch.device(device))
        rows, everything = [], slice(0, len(x))
        for number in range(3):
            batch = step.prepare(experiment, pixels, labels, number, everything, ())
            rows.append(step.step(state, experiment, batch, everything)[:3].cpu())
            state.step += 1
        found[cuda_graphs] = torch.stack(rows)
    off = float(((found[True] - found[False]) / found[False]).abs().max())
    return off < 1e-3, f"losses of three steps differ by {off:.1e}"


def a_teacher_encodes_as_on_the_cpu(device: str) -> Seen:
    settings = config.Teacher(uri="package:fashion-edm")
    assert settings.uri
    answers = []
    for where in (device, "cpu"):
        source = LocalTeacher(checkpoint.load(Store(settings.uri)), settings, 1, where)
        answers.append(source.encode(source.sample()))
    off = float((answers[0] - answers[1]).abs().max() / answers[1].abs().max())
    return off < 1e-3, f"features differ by {off:.1e} of the largest"


def autoattack_finds_the_same(device: str) -> Seen:
    """Verdicts of level fast and of level reference."""
    student = _student("wrn-10-1", device).eval()
    x, _ = _batch(device, 64)
    with torch.no_grad():
        labels = student(x).argmax(1)
    effort, found = Effort(apgd_steps=10, fab_steps=5, square_queries=50), {}
    for level in ("reference", "fast"):
        threat = config.Threat(eps_255=0.5, step_255=0.1)
        settings = Settings(threat=threat, seed=0, effort=effort, version="standard", level=level)
        found[level] = single_process(student, x, labels, settings, batch=32).alive.cpu()
    differ = int((found["reference"] != found["fast"]).sum())
    return differ == 0, f"{int(found['fast'].sum())} of 64 survive, {differ} verdicts differ"


def _dra(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dra_ray", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)


def _train(device: str, folder: str, *settings: str) -> subprocess.CompletedProcess[str]:
    gpus = [] if device == "cpu" else ["resources.gpus_per_worker=1"]
    words = [word for setting in (*gpus, *settings) for word in ("--set", setting)]
    return _dra("train", "digits-dm-at", "--storage", folder, "--name", "run", *words)


def a_run_trains_and_is_evaluated(device: str) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        trained = _train(device, folder, "optim.epochs=4")
        done = _dra("evaluate", f"{folder}/run", "--level", "screen")
    said = (trained.stderr if trained.returncode else done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1][:120] if said else "nothing said"


def a_device_that_is_too_small_is_one_line(device: str) -> Seen:
    if device == "cpu":
        return True, "not tried on a CPU"
    with tempfile.TemporaryDirectory() as folder:
        settings = ("optim.epochs=1", "optim.batch=1024", "model.name=wrn-70-64")
        done = _train(device, folder, *settings)
    last = done.stderr.strip().splitlines()[-1]
    return done.returncode == 1 and "memory" in last and "Traceback" not in last, last[:160]


CHECKS: tuple[Callable[[str], Seen], ...] = (
    students_compute_as_on_the_cpu,
    bf16_is_near_fp32,
    an_attack_as_one_graph_is_that_without,
    cuda_graphs_take_the_steps_without,
    a_teacher_encodes_as_on_the_cpu,
    autoattack_finds_the_same,
    a_run_trains_and_is_evaluated,
    a_device_that_is_too_small_is_one_line,
)


def main(device: str) -> int:
    name = torch.cuda.get_device_name() if device != "cpu" else os.uname().machine
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}\n", flush=True)
    print("| check | holds | seen | seconds |\n|---|---|---|---|", flush=True)
    failed = 0
    for check in CHECKS:
        began = time.monotonic()
        try:
            sound, seen = check(device)
        except Exception as error:  # the next checks are of other things
            sound, seen = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        failed += not sound
        words = check.__name__.replace("_", " ")
        took = time.monotonic() - began
        print(f"| {words} | {'yes' if sound else 'NO'} | {seen} | {took:.0f} |", flush=True)
    return failed


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
