"""`dra bench teacher`: images per second of frozen encoders by how they compute, and what an answer
costs beside the network.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dra_ray import config, plan
from dra_ray.bench.step import has_bf16, matmul_flops, timed
from dra_ray.config import recipe_names
from dra_ray.data import outline
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint, dit
from dra_ray.teachers.network import Network
from dra_ray.teachers.source import LocalTeacher, noise_of

LIGHTNING_DIT = "lightning-dit-xl"
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "channels last": {"channels_last": True},
    "compiled": {"compile": True},
    "compiled, channels last": {"compile": True, "channels_last": True},
    "bf16": {"precision": "bf16", "channels_last": True},
    "bf16, compiled": {"precision": "bf16", "channels_last": True, "compile": True},
}


def network(name: str) -> Network:
    """A teacher's folder, or with random weights what a recipe of kind `teacher` trains, or
    `LIGHTNING_DIT`.
    """
    if name == LIGHTNING_DIT:
        return _lightning_dit()
    if name not in recipe_names():
        settings = config.validate(config.Teacher, {"uri": name}, "teacher")
        assert settings.uri
        return checkpoint.load(Store(settings.uri))
    recipe = config.load(name, config.TeacherTraining)
    shape = outline(recipe.data).shape
    torch.manual_seed(0)
    kind = checkpoint.TRAINED[recipe.objective]
    return kind(recipe.net, shape.resolution, shape.channels, shape.num_classes, style=recipe.style)


def _lightning_dit() -> Network:
    """LightningDiT-XL/1 over latents, without the blocks that its usual feature does not need. What
    training starts at zero is drawn here, or a block would have no effect.
    """
    usual = dit.XL_1.depth // 2
    torch.manual_seed(0)
    net = dit.LightningDiT(dataclasses.replace(dit.XL_1, depth=usual + 1))
    net.default_layer = f"blocks.{usual}"
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net


def compare(
    name: str, *, batch: int, rounds: int, threads: int, compiled: bool, device: str
) -> dict[str, Any]:
    """Encode one micro-batch in every way, in turn, `rounds` times: rows and figures.

    `difference` is the largest of a feature to fp32's, over the largest of these. `peak_share` is
    of the matmul peak that is measured in the same run. `beside` are the parts of an answer of
    fp32 that are not the network, as shares of its time.
    """
    torch.set_num_threads(threads)
    on, net = torch.device(device), network(name)
    flops = 2 * plan.feature_macs(copy.deepcopy(net).to("meta"), None)
    ways = {
        way: settings
        for way, settings in WAYS.items()
        if (compiled or not settings.get("compile")) and (has_bf16(on) or "bf16" not in way)
    }
    sources = {}
    for way, settings in ways.items():
        teacher = config.Teacher(micro_batch=batch, **settings)
        sources[way] = LocalTeacher(copy.deepcopy(net), teacher, threads, device)
    request = sources["fp32"].sample()
    seconds: dict[str, list[float]] = {way: [] for way in sources}
    features: dict[str, Tensor] = {}
    first: dict[str, float] = {}
    peaks: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for number in range(rounds + 1):
        for way, source in sources.items():
            took, features[way] = timed(functools.partial(source.encode, request), on)
            if number:
                seconds[way].append(took)
            else:
                first[way] = took
        for kind, found in peaks.items():
            found.append(matmul_flops(kind, on))
    rows = []
    largest = float(features["fp32"].abs().max())
    for way, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["fp32"], times, strict=True)]
        peak = max(peaks[torch.bfloat16 if "bf16" in way else torch.float32])
        middle = statistics.median(times)
        off = float((features[way].float() - features["fp32"].float()).abs().max())
        rows.append(
            {
                "teacher": name,
                "way": way,
                "images_per_s": batch / middle,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "difference": off / largest,
                "peak_share": batch * flops / middle / peak,
                "first_s": first[way] - middle,
            }
        )
    whole = statistics.median(seconds["fp32"])
    parts: dict[str, Callable[[], object]] = {
        "noise": lambda: noise_of(request.noise_seeds.tolist(), net.noise_shape),
        "digest": request.digest,
        "copies": lambda: [array.copy() for array in request.arrays],
    }
    beside = {
        part: statistics.median(timed(call, on)[0] for _ in range(rounds)) / whole
        for part, call in parts.items()
    }
    return {
        "teacher": name,
        "batch": batch,
        "rounds": rounds,
        "gflop_per_image": flops / 1e9,
        "beside": beside,
        "rows": rows,
    }
