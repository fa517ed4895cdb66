"""How a student computes: memory format, precision, compilation. The state dict stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dra_ray import config, memory
from dra_ray.attacks import pgd
from dra_ray.attacks.pgd import Climb

WithFeatures = Callable[[Tensor], tuple[Tensor, Tensor]]


def prepare(compute: config.Compute, threads: int) -> None:
    """Settings of this process: CPU threads, freed memory, and what cuDNN and cuBLAS may do with
    float32.
    """
    torch.set_num_threads(threads)
    memory.keep_freed()
    torch.backends.cudnn.benchmark = torch.cuda.is_available()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        compute.precision == "tf32"
    )


def arranged(student: Any, compute: config.Compute, width: int) -> Any:
    """`student` itself, which from now on computes on images of that width as `compute` says."""
    if compute.channels_last:
        student = student.to(memory_format=torch.channels_last)
        student.normalise.in_rows(width)
    student.with_features = _arranged(student.with_features, compute)  # `forward` goes through it
    student.with_map = _arranged(student.with_map, compute)
    return student


def _arranged(forward: WithFeatures, compute: config.Compute) -> WithFeatures:
    if compute.precision == "bf16":
        forward = _in_bf16(forward)
    return forward if compute.compile == "off" else _compiled(forward, compute.cuda_graphs)


def _compiled(forward: WithFeatures, cuda_graphs: bool) -> WithFeatures:
    """Every student of a process, such as those of a sweep's trials, has graphs of its own; past
    torch's usual limit of them a step would be half compiled, and fail in its backward pass.
    """
    compiled = torch.compile(forward, options=pgd.compiler_options(cuda_graphs))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # as a part of an attack's graph
            return forward(x)
        with torch._dynamo.config.patch(recompile_limit=pgd.STUDENTS):
            return compiled(x)

    return run


def climb(compute: config.Compute) -> Climb:
    """What takes the steps of training's attack; the same for all steps of a process, which so
    share their graph.
    """
    return _graph(compute.cuda_graphs) if compute.compile == "attack" else pgd.climbed


@functools.cache
def _graph(cuda_graphs: bool) -> Climb:
    return pgd.graph(cuda_graphs=cuda_graphs)


def begin_step(compute: config.Compute) -> None:
    """A training step begins: nothing that a CUDA graph returned in the one before is used any
    more.
    """
    if compute.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()


def _in_bf16(forward: WithFeatures) -> WithFeatures:
    """Convolutions and matrix products in bfloat16; what comes out is float32, so losses are
    computed in float32.
    """

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits, features = forward(x)
        return logits.float(), features.float()

    return run


def facts(device: torch.device) -> dict[str, Any]:
    """What rounding depends on, for a manifest."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
