"""A teacher on disk: `teacher.safetensors` (weights, float32 or float16) and `card.json`
(architecture, digest, how it was trained).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from pydantic import ValidationError

from dra_ray.config import UNet
from dra_ray.config.base import first_error, one_line
from dra_ray.errors import CheckpointError, ConfigError, nearest
from dra_ray.storage import Store
from dra_ray.storage.failures import first_line
from dra_ray.teachers.cards import CARD as CARD
from dra_ray.teachers.cards import read_card as read_card
from dra_ray.teachers.dit import LatentDiT, LightningDiT
from dra_ray.teachers.edm import EDM, UNetEncoder
from dra_ray.teachers.network import Network, check_fit
from dra_ray.teachers.noisy import NoisyClassifier

WEIGHTS = "teacher.safetensors"
KINDS: dict[str, type[Network]] = {
    net.kind: net for net in (EDM, NoisyClassifier, LightningDiT, LatentDiT)
}
# what `dra teacher train` makes, by the config's objective
TRAINED: dict[str, type[UNetEncoder]] = {"denoise": EDM, "classify": NoisyClassifier}
Net = TypeVar("Net", bound=Network)


def save(store: Store, net: Network, extras: Mapping[str, Any]) -> str:
    """Write the weights, then the card with `extras` (plain data) beside the architecture; returns
    the digest.
    """
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in net.state_dict().items()
    }
    digest = _digest(weights, net.architecture)
    (store / WEIGHTS).write_tensors(weights)
    (store / CARD).write_json({**extras, "architecture": net.architecture, "digest": digest})
    return digest


def digest(store: Store) -> str:
    """SHA-256 of weights and architecture, as the card states it; `load` checks it against the
    weights.
    """
    return str(read_card(store)["digest"])


def build(card: Mapping[str, Any], path: str) -> Network:
    """The network that a card describes, with fresh weights; none are made under
    `torch.device("meta")`. `path` is for errors.
    """
    architecture = card["architecture"]
    try:
        kind = architecture.get("kind", EDM.kind)
        if kind not in KINDS:
            raise ConfigError(f"kind '{kind}' is unknown; {nearest(str(kind), KINDS)}")
        return KINDS[kind].from_architecture(architecture)
    except ValidationError as error:
        why = one_line(UNet, first_error(error))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        why = first_line(error)
    raise CheckpointError(f"'{path}' does not describe a network ({why}); train the teacher again")


@overload
def load(store: Store) -> Network: ...
@overload
def load(store: Store, wanted: type[Net]) -> Net: ...
def load(store: Store, wanted: type[Any] = Network) -> Any:
    """The network in eval mode without gradients. `CheckpointError` names the keys that are
    missing, unknown or misshapen.

    `wanted` asks for one kind, such as `EDM` where images are to be sampled, and refuses the
    others.
    """
    card = read_card(store)
    with torch.device("meta"):  # a stranger's card may describe more than fits in memory
        net = build(card, str(store / CARD))
    if not isinstance(net, wanted):
        raise CheckpointError(
            f"'{store}' holds a network of kind '{net.kind}', but this needs kind '{wanted.kind}'; "
            "choose another teacher"
        )
    if not (store / WEIGHTS).exists():
        raise CheckpointError(
            f"'{store / WEIGHTS}' is missing beside its {CARD}; copy it there or train the teacher "
            "again"
        )
    # float16 files are as good as what they round to: the digest is of the float32 values that the
    # network gets
    weights = {
        name: tensor.to(torch.float32) for name, tensor in (store / WEIGHTS).read_tensors().items()
    }
    check_fit(weights, net, f"'{store / WEIGHTS}' does not fit the architecture of its {CARD}")
    if _digest(weights, net.architecture) != card["digest"]:
        raise CheckpointError(
            f"'{store / WEIGHTS}' is not what {CARD} describes (digests differ); copy both again "
            "or train the teacher again"
        )
    net = build(card, str(store / CARD))
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def _digest(weights: Mapping[str, torch.Tensor], architecture: Mapping[str, Any]) -> str:
    state = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name in sorted(weights):
        state.update(f"{name} {list(weights[name].shape)} {weights[name].dtype}".encode())
        state.update(weights[name].contiguous().numpy().tobytes())
    return state.hexdigest()
