"""Writes a network of ours in the layout of NVlabs/edm's pickles; of theirs it needs the names
only, which are found by `pickle` in modules of those names while a file is written.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

CLASSES = {
    "SongUNet": "SongUNet",
    "Block": "UNetBlock",
    "Conv": "Conv2d",
    "Linear": "Linear",
    "GroupNorm": "GroupNorm",
    "Fourier": "FourierEmbedding",
}
WRAPPERS = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


def reconstruct(meta: dict[str, Any]) -> None:
    raise AssertionError("the file's own reader ran")


class EasyDict(dict):
    """Stands for dnnlib's."""


class Persistent:
    """An object that is written with its class's source."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = "") -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return reconstruct, (self.meta,), None


def arguments(net: Any) -> dict[str, Any]:
    """What the official classes would be called with for a network of ours."""
    plain = {
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "resample_filter": [1, 1],
    }
    other = {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    }
    config = net.config.model_dump(
        mode="json",
        include={"model_channels", "channel_mult", "num_blocks", "attn_resolutions", "augment_dim"},
    )
    sizes = {
        "img_resolution": net.resolution,
        "img_channels": net.channels,
        "label_dim": net.num_classes,
    }
    rest = {
        "model_type": "SongUNet",
        "decoder_type": "standard",
        "dropout": 0.13,
        "use_fp16": False,
    }
    return config | sizes | rest | (other if net.style == "ncsnpp" else plain)


def converted(module: torch.nn.Module, source: str = "") -> Any:
    """The module as the official file has it: torch's containers as they are, everything else with
    its source.
    """
    children = OrderedDict(
        (name, None if child is None else converted(child, source))
        for name, child in module._modules.items()
    )
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict().eval()
        container._modules = children
        return container
    name = type(module).__name__
    if name == "SongUNet" and "map_noise" in children and children["map_noise"] is None:
        children["map_noise"] = Persistent(
            "PositionalEmbedding", state_of(torch.nn.Identity(), OrderedDict()), source
        )
    return Persistent(CLASSES.get(name, name), state_of(module, children), source)


def state_of(module: torch.nn.Module, children: OrderedDict[str, Any]) -> dict[str, Any]:
    fixed = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_modules": children,
    }
    return fixed | {
        "_non_persistent_buffers_set": set(),
        "_forward_hooks": OrderedDict(),
        "skip_scale": np.sqrt(0.5),
        "_init_args": (),
    }


def content(net: Any, source: str = "", **changes: Any) -> dict[str, Any]:
    """What the official training loop would pickle for `net`, an EDM of ours; `changes` are to the
    recorded arguments.
    """
    made = converted(net, source)
    made.meta["class_name"] = WRAPPERS[net.precondition]
    made.meta["state"] |= {
        "_init_kwargs": arguments(net) | changes,
        "sigma_min": 0,
        "sigma_max": float("inf"),
    }
    data = EasyDict(
        class_name="training.dataset.ImageFolderDataset",
        path="datasets/cifar10-32x32.zip",
        use_labels=True,
        max_size=50000,
    )
    return {
        "ema": made,
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}, source),
        "augment_pipe": None,
        "dataset_kwargs": data,
    }


@contextlib.contextmanager
def named_modules() -> Iterator[None]:
    """Modules of the official names, in which `pickle` finds what it is about to write."""
    found = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    for module, name, value in (
        ("torch_utils.persistence", "_reconstruct_persistent_obj", reconstruct),
        ("dnnlib.util", "EasyDict", EasyDict),
    ):
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        setattr(found[module], name, value)
    sys.modules.update(found)
    try:
        yield
    finally:
        for name in found:
            del sys.modules[name]


def pickled(value: Any) -> bytes:
    with named_modules():
        buffer = io.BytesIO()
        pickle.dump(value, buffer)
        return buffer.getvalue()
