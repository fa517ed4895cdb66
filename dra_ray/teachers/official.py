"""Import of the EDM networks that NVlabs publishes as pickles (Karras et al. 2022, arXiv
2206.00364), executing nothing of theirs.

Such a file holds Python source beside the weights, and its own reader runs it. Here the few names
that a network needs are replaced by records of what they were called with, every other name is
refused, and the source is never looked at. From the records come the arguments that the network was
made with, which give the architecture, and the weights, which must fit it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dra_ray import storage
from dra_ray.config import UNet
from dra_ray.errors import CheckpointError, ConfigError, DataError, nearest
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import (
    EDM,
    EMBEDDING_MULT,
    STYLES,
    VE_SIGMA_MAX,
    VE_SIGMA_MIN,
    VP_BETA_D,
    VP_BETA_MIN,
    VP_FIRST_T,
    VP_STEPS,
    low_pass,
)
from dra_ray.teachers.network import check_fit

LARGEST_BYTES = 2**31  # the largest published file, for ImageNet, has 1.2 GB
# no published network comes near these; they keep a small hostile file from becoming a large one
MODULES_DEEP, NAMES, LIST, TEXT, NUMBER = 8, 1000, 64, 1000, 2**53
PERSISTENCE_VERSION = 6
DATA = ("cifar100", "cifar10", "ffhq", "afhqv2", "imagenet")
LICENCE = (
    "The files that NVlabs/edm publishes are under CC BY-NC-SA 4.0 (attribution, non-commercial, "
    "share alike), and so are these weights "
    "and what is derived from them"
)


# -- stand-ins for the names in the file: they keep what they are called with ----------------------
@dataclasses.dataclass
class _Persistent:
    """An object that carries its class's source; `meta` has the class's name and the object's
    state.
    """

    meta: Any


class _Container:
    """A plain torch module; its attributes are the file's."""


class _Nothing:
    """Something of the file whose value is not used, such as numpy's numbers."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclasses.dataclass
class _Storage:
    """Numbers of a tensor: themselves a file of `torch.save` inside the file."""

    data: Any


@dataclasses.dataclass
class _View:
    """A tensor as its numbers and where they lie in them."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    requires_grad: Any = False
    hooks: Any = None
    metadata: Any = None


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


STAND_INS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _Persistent,
    "torch.nn.modules.container.ModuleDict": _Container,
    "torch.storage._load_from_bytes": _Storage,
    "torch._utils._rebuild_tensor_v2": _View,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.core.multiarray.scalar": _Nothing,
    "numpy._core.multiarray.scalar": _Nothing,
    "numpy.dtype": _Nothing,
    "collections.OrderedDict": dict,
    "dnnlib.util.EasyDict": dict,
    "builtins.set": set,
}


# -- what the published classes are called with, and its usual values (NVlabs/edm, training/networks
@dataclasses.dataclass(frozen=True)
class _Wrapper:
    precondition: str
    usual: Mapping[str, Any]
    fixed: tuple[str, ...] = ()  # arguments that only have their usual value here


WRAPPERS = {
    "EDMPrecond": _Wrapper(
        "edm",
        {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    ),
    "VPPrecond": _Wrapper(
        "vp",
        {
            "beta_d": VP_BETA_D,
            "beta_min": VP_BETA_MIN,
            "M": VP_STEPS,
            "epsilon_t": VP_FIRST_T,
            "model_type": "SongUNet",
        },
        ("beta_d", "beta_min", "M", "epsilon_t"),
    ),
    "VEPrecond": _Wrapper(
        "ve", {"sigma_min": VE_SIGMA_MIN, "sigma_max": VE_SIGMA_MAX, "model_type": "SongUNet"}
    ),
}
USUAL: dict[str, Any] = {
    "label_dim": 0,
    "use_fp16": False,
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": EMBEDDING_MULT,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
UNET = (
    "model_channels",
    "channel_mult",
    "num_blocks",
    "attn_resolutions",
    "dropout",
    "label_dropout",
    "augment_dim",
)
FIXED: dict[str, Any] = {
    "model_type": "SongUNet",
    "channel_mult_emb": EMBEDDING_MULT,
    "decoder_type": "standard",
}


def import_edm(source: Store, to: Store) -> dict[str, Any]:
    """Turn a published pickle at `source` into a teacher in the folder `to`; returns its card.

    The card says what the file was, its SHA-256, its licence and the data it was trained on. Raises
    `StorageError` for a file that cannot be read, `CheckpointError` for one that is no such network
    or names anything else, and `ConfigError` when `to` holds another teacher; nothing is written
    unless all of the file is sound.
    """
    size = source.size()
    if size > LARGEST_BYTES:
        raise CheckpointError(
            f"'{source}' has {size:,} bytes, more than any published EDM ({LARGEST_BYTES:,} at "
            "most); give the network's pickle"
        )
    data = source.read_bytes()
    sha256 = storage.sha256(data)
    _check_free(to, sha256)
    try:
        content = storage.unpickle(data, source.uri, STAND_INS)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    try:
        name, arguments, views = _read_network(content)
        net = _build(name, arguments, views)
        trained_on = _trained_on(content, source.name)
    except (CheckpointError, DataError) as error:
        raise CheckpointError(f"'{source}' cannot be imported: {error}") from None
    facts = {
        "source": {
            "file": source.name,
            "sha256": sha256,
            "bytes": size,
            "class": name,
            "arguments": arguments,
        },
        "licence": LICENCE,
        "trained_on": trained_on,
    }
    checkpoint.save(to, net, facts)
    return checkpoint.read_card(to)


def _check_free(to: Store, sha256: str) -> None:
    """A folder may hold nothing, or what an earlier import of the same file left."""
    source = (
        checkpoint.read_card(to).get("source")
        if (to / checkpoint.CARD).exists()
        else {"sha256": sha256}
    )
    if not isinstance(source, dict) or source.get("sha256") != sha256:
        raise ConfigError(f"'{to}' holds another teacher; choose a new folder for this one")


def _trained_on(content: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What the file says of its data, under the data set's name where that is known."""
    said = _plain(content.get("dataset_kwargs") or {})
    named = f"{said.get('path', '')} {file}".lower()
    return {"name": next((name for name in DATA if name in named), None)} | said


# -- records to weights ----------------------------------------------------------------------------
def _read_network(content: Any) -> tuple[str, dict[str, Any], dict[str, _View]]:
    """(class name, arguments, records of the weights by name) of the averaged network."""
    if not isinstance(content, dict) or "ema" not in content:
        raise CheckpointError(
            "it has no network under 'ema'; give a network snapshot of NVlabs/edm"
        )
    name, state = _persistent(content["ema"])
    if name not in WRAPPERS:
        raise CheckpointError(
            f"its network is of class {name}; known: {', '.join(sorted(WRAPPERS))}"
        )
    if not isinstance(state.get("_init_kwargs"), dict) or state.get("_init_args"):
        raise CheckpointError(
            f"its {name} does not say by name what it was made with; save it again with keyword "
            "arguments"
        )
    return name, _plain(state["_init_kwargs"]), dict(_views(content["ema"], "", set()))


def _persistent(module: Any) -> tuple[str, dict[str, Any]]:
    """(class name, state) of an object that carries its source."""
    meta = module.meta if isinstance(module, _Persistent) and isinstance(module.meta, dict) else {}
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(state, dict) or not isinstance(name, str) or not name.isidentifier():
        raise CheckpointError(
            "its network is not made of objects of NVlabs/edm; give a network snapshot"
        )
    if meta.get("type") != "class" or meta.get("version") != PERSISTENCE_VERSION:
        raise CheckpointError(
            f"it is not of version {PERSISTENCE_VERSION} of torch_utils.persistence; give a "
            "network snapshot of NVlabs/edm"
        )
    return name[:TEXT], state


def _views(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, _View]]:
    """Name and record of every tensor that a state dict would hold. `seen` keeps a file from naming
    one part many times.
    """
    state = vars(module) if isinstance(module, _Container) else _persistent(module)[1]
    _once(module, seen, prefix)
    passing = state.get("_non_persistent_buffers_set") or ()
    parameters, buffers, modules = (
        _named(state.get(group), prefix) for group in ("_parameters", "_buffers", "_modules")
    )
    for name, view in (parameters | buffers).items():
        if view is None or name in passing:
            continue
        if not isinstance(view, _View) or not isinstance(view.storage, _Storage):
            raise CheckpointError(f"{prefix}{name} is not a tensor")
        _once(view.storage, seen, prefix + name)
        yield prefix + name, view
    for name, child in modules.items():
        if child is not None:
            yield from _views(child, f"{prefix}{name}.", seen)


def _once(thing: object, seen: set[int], name: str) -> None:
    if id(thing) in seen or name.count(".") > MODULES_DEEP:
        raise CheckpointError(
            f"'{name}' shares what another part holds, or is too deep; give a network snapshot of "
            "NVlabs/edm"
        )
    seen.add(id(thing))


def _named(group: Any, prefix: str) -> dict[str, Any]:
    if (
        not isinstance(group, dict)
        or len(group) > NAMES
        or not all(isinstance(name, str) and _is_short(name) for name in group)
    ):
        raise CheckpointError(
            f"'{prefix}' is not a mapping of names; give a network snapshot of NVlabs/edm"
        )
    return group


def _is_short(name: str) -> bool:
    return (
        len(name) <= LIST and name.isprintable()
    )  # or it could not stand in a message of one line


def _tensor(view: _View, name: str) -> Tensor:
    """The tensor float32 that a record describes, after checking that it lies inside its own
    numbers.
    """
    data = view.storage.data
    if not isinstance(data, bytes) or data.startswith(
        b"PK"
    ):  # torch.save's zip format may be compressed; the files never use it
        raise CheckpointError(f"{name} is not stored as a plain tensor")
    numbers = storage.torch_from_bytes(data, name)
    if not isinstance(numbers, torch.storage.TypedStorage) or not numbers.dtype.is_floating_point:
        raise CheckpointError(f"{name} does not hold floating-point numbers")
    raw = (
        numbers._untyped_storage
    )  # what untyped() gives, without its warning that typed storages will go
    held = raw.nbytes() // numbers.dtype.itemsize
    sizes, strides = view.size, view.stride
    whole = (
        isinstance(sizes, tuple) and isinstance(strides, tuple) and len(sizes) == len(strides) <= 4
    )
    if not whole or not all(
        type(n) is int and 0 <= n < NUMBER for n in (view.offset, *sizes, *strides)
    ):
        raise CheckpointError(f"{name} has no sensible shape")
    last = view.offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 in sizes or last >= held or math.prod(sizes) > held:
        raise CheckpointError(
            f"{name} is {list(sizes)} at {view.offset}, but only {held} numbers are there"
        )
    tensor = (
        torch.empty(0, dtype=numbers.dtype)
        .set_(raw, view.offset, sizes, strides)
        .to(torch.float32)
        .contiguous()
    )
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name} holds numbers that are not finite")
    return tensor


def _plain(values: Any) -> dict[str, Any]:
    """Named arguments as JSON would give them back; `CheckpointError` for anything but numbers,
    text and lists of those.
    """
    plain = {}
    for name, value in _named(values, "arguments").items():
        items = value if isinstance(value, list | tuple) else [value]
        if len(items) > LIST or not all(_is_plain(item) for item in items):
            raise CheckpointError(
                f"argument {name} is not a number, a text or a short list of them"
            )
        plain[name] = value if items is not value else list(items)
    return plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= TEXT
    return (
        value is None
        or isinstance(value, float)
        or (isinstance(value, int) and abs(value) < NUMBER)
    )


# -- arguments to an architecture ------------------------------------------------------------------
def _build(name: str, arguments: Mapping[str, Any], views: Mapping[str, _View]) -> EDM:
    """The network of `arguments` with the weights of `views`, which must have just its names,
    shapes and constant filters.
    """
    wrapper = WRAPPERS[name]
    usual = USUAL | dict(wrapper.usual)
    for field in arguments:
        if field not in usual and field not in ("img_resolution", "img_channels"):
            raise CheckpointError(
                f"its {name} was made with {field}={arguments[field]!r}; {nearest(field, usual)}"
            )
    given = usual | dict(arguments)
    for field, wanted in (FIXED | {field: wrapper.usual[field] for field in wrapper.fixed}).items():
        if given[field] != wanted:
            raise CheckpointError(
                f"its {name} was made with {field}={given[field]!r}; only {wanted!r} is supported"
            )
    try:
        config = UNet(**{field: given[field] for field in UNET})
        if config.num_blocks * len(config.channel_mult) > len(views):
            raise ValueError(
                f"{config.num_blocks} blocks at {len(config.channel_mult)} resolutions, but only "
                f"{len(views)} tensors"
            )
        resolution, channels, classes = _sizes(given)
        sigma_data = float(given.get("sigma_data", 0.5))
        options = {"precondition": wrapper.precondition, "style": _style(given)}
        with torch.device("meta"):
            net = EDM(
                config,
                resolution,
                channels,
                classes,
                sigma_data,
                **options,
                sigma_range=_range(given),
            )
    except (
        ConfigError,
        ArithmeticError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # pydantic's ValidationError is a ValueError
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = (
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            if first
            else str(error).splitlines()[0]
        )
        raise CheckpointError(
            f"its {name} was made with arguments that give no network ({reason})"
        ) from None
    weights = {key: _tensor(view, key) for key, view in views.items()}
    check_fit(weights, net, f"its weights are not those of the {name} it describes")
    _check_filters(weights, net)
    net.load_state_dict(weights, assign=True)
    return net


def _sizes(given: Mapping[str, Any]) -> list[int]:
    sizes: list[Any] = [
        given.get(field) for field in ("img_resolution", "img_channels", "label_dim")
    ]
    if not all(type(size) is int and 0 <= size < 2**16 for size in sizes) or not all(sizes[:2]):
        raise ValueError(f"resolution, channels and classes are {sizes}")
    return sizes


def _style(given: Mapping[str, Any]) -> str:
    found = (
        given["channel_mult_noise"],
        given["embedding_type"],
        given["encoder_type"],
        tuple(given["resample_filter"]),
    )
    for name, style in STYLES.items():
        if found == (
            style.noise_mult,
            "fourier" if style.fourier else "positional",
            "residual" if style.residual else "standard",
            style.taps,
        ):
            return name
    raise ValueError(
        f"channel_mult_noise, embedding_type, encoder_type and resample_filter are {found}, "
        "neither DDPM++'s nor NCSN++'s"
    )


def _range(given: Mapping[str, Any]) -> tuple[float, float] | None:
    if "sigma_min" not in given:
        return None
    low, high = float(given["sigma_min"]), float(given["sigma_max"])
    if not 0 <= low < high:
        raise ValueError(f"sigma_min={low:g} is not below sigma_max={high:g}")
    return low, high


def _check_filters(weights: Mapping[str, Tensor], net: EDM) -> None:
    """Resampling filters are in the file, but only these are ever used."""
    wanted = low_pass(STYLES[net.style].taps)
    for name, tensor in weights.items():
        if name.endswith("resample_filter") and not torch.allclose(tensor, wanted):
            raise CheckpointError(f"{name} is not the filter that its arguments name")
