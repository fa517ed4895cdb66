"""Optimisers: which parameters decay, and a step's learning rate, momentum and clipping.

torch and timm choose the implementation: one kernel over many tensors ("foreach") on CUDA, tensor
by tensor on the CPU. Both round alike, so a run can move; "fused" kernels round differently and
would save a part of what is about 1 % of a ten-step attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dra_ray import config
from dra_ray.errors import ConfigError


def build(
    student: nn.Module,
    head: nn.Module | None,
    optim: config.Optim,
    align: config.Align | None = None,
    distiller: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """SGD, Lion (Chen et al., arXiv 2302.06675) or AdamW over the student and its projector, by
    parameter groups of `optim.decayed`; the projector has groups of its own where `align` has a
    learning rate or a decay for it. A distiller's head is trained as the student is.

    Raises:
        ConfigError: a value that the optimiser cannot work with.
    """
    taught = [student] if distiller is None else [student, distiller]
    groups = _groups(taught, head, optim, align or config.Align())
    if optim.name == "sgd":
        if optim.nesterov and not optim.momentum:
            raise ConfigError(
                "optim.nesterov=true needs momentum, but optim.momentum=0; set "
                "optim.nesterov=false or raise optim.momentum"
            )
        return torch.optim.SGD(
            groups,
            lr=optim.lr,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
        )
    if max(optim.betas) >= 1:
        raise ConfigError(
            f"optim.betas={list(optim.betas)} must both be below 1, or the average never changes; "
            "set them to [0.9, 0.99], say"
        )
    if optim.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
    # timm takes seconds to import, and does not list what it exports
    from timm.optim import Lion  # type: ignore[attr-defined]

    return Lion(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def _groups(
    taught: list[nn.Module], head: nn.Module | None, optim: config.Optim, align: config.Align
) -> list[dict[str, Any]]:
    """Decayed parameters, then the others; then the same of a head that is set apart."""
    if head is None:
        return _decayed_first(taught, optim)
    if align.projector_lr is None and align.projector_weight_decay is None:
        return _decayed_first([*taught, head], optim)
    scale = 1.0 if align.projector_lr is None else align.projector_lr / optim.lr
    decay = (
        optim.weight_decay if align.projector_weight_decay is None else align.projector_weight_decay
    )
    apart = [
        {"weight_decay": decay} | group | {"scale": scale}
        for group in _decayed_first([head], optim)
    ]
    return _decayed_first(taught, optim) + apart


def _decayed_first(modules: Sequence[nn.Module], optim: config.Optim) -> list[dict[str, Any]]:
    """Decayed parameters, then the others; a group without parameters is left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        weights = _weights(module)
        for name, parameter in module.named_parameters():
            kept = {
                "all": False,
                "weights": id(parameter) not in weights,
                "all-but-batchnorm": "batchnorm" in name,
            }[optim.decayed]
            (plain if kept else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _weights(module: nn.Module) -> set[int]:
    """What flax calls a kernel: ids of the weights of linear and convolution layers."""
    return {
        id(m.weight) for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    }


def set_rate(optimizer: torch.optim.Optimizer, rate: float, momentum: float) -> None:
    """The learning rate of every group, which may have a `scale`, and the momentum where the
    optimiser has one (Lion's and AdamW's betas stay).
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
        if "momentum" in group:
            group["momentum"] = momentum


def clip(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor | None:
    """Scale all gradients down to a common norm of at most `clip_norm`; None does nothing. Returns
    the norm before; waits for nothing.
    """
    if clip_norm is None:
        return None
    return nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], clip_norm
    )
