"""Weights from elsewhere: read without unpickling code, and fitted to a student's names.

Files of other projects wrap their state dict, prefix its keys and keep normalisation among the
weights; all of that is recognised. What then still differs is an error that names the keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dra_ray.errors import CheckpointError
from dra_ray.storage import Store
from dra_ray.students.student import Student

# where a training checkpoint keeps the weights to use, most specific first (DM-AT's are averaged
# ones)
WRAPPERS = (
    "model_state_dict",
    "state_dict",
    "model",
    "net",
    "module",
    "ema",
    "state_dict_ema",
    "model_ema",
)
# of DataParallel, torch.compile and wrappers; stripped where every key has it
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
# data sets' means are quoted to 3 or 4 digits
SAME_NORMALISATION = 1e-3


def read_weights(store: Store) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a weights-only `torch.save` file, out of whatever
    wraps them.

    Raises `CheckpointError` when there are none, `DataError` when the file is damaged or holds
    code.
    """
    if store.name.endswith(".safetensors"):
        return store.read_tensors()
    if not store.name.endswith((".pt", ".pth", ".bin", ".ckpt", ".tar")):
        raise CheckpointError(
            f"'{store}' is not named as weights are; give a .safetensors, .pt or .pth file"
        )
    weights = _unwrapped(store.read_torch())
    if not weights:
        raise CheckpointError(
            f"'{store}' holds no tensors by name; give a file with a state dict, under one of "
            f"{', '.join(WRAPPERS)} if wrapped"
        )
    return weights


def _unwrapped(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    inner = next(
        (value[name] for name in WRAPPERS if isinstance(value.get(name), Mapping) and value[name]),
        None,
    )
    return (
        {key: item for key, item in value.items() if isinstance(item, Tensor)}
        if inner is None
        else _unwrapped(inner)
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """How weights fit a student: what to load under its keys, and what does not fit; `reshaped`
    names its own keys.
    """

    weights: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[list[int], list[int]]]  # shape there, shape wanted
    ignored: list[str]
    normalisation: dict[str, Tensor]  # mean, std


def fit_keys(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], unused: tuple[str, ...] = ()
) -> Fit:
    """Match keys up to the prefixes that all of them share; `unused` are prefixes of keys to leave
    out.

    Normalisation (a last name of mean, std, mu or sigma) is set apart. A missing count of
    BatchNorm's batches is no difference: files of old PyTorch versions lack it, and nothing here
    reads it.
    """
    constants = {
        NORMALISATION[last]: key
        for key in weights
        if (last := key.rsplit(".", 1)[-1]) in NORMALISATION
    }
    given, ours = _bare(key for key in weights if key not in constants.values()), _bare(wanted)
    ignored = [bare for bare in given if bare not in ours and bare.startswith(unused)]
    common = [bare for bare in ours if bare in given]
    reshaped = {
        ours[b]: (list(weights[given[b]].shape), list(wanted[ours[b]].shape))
        for b in common
        if weights[given[b]].shape != wanted[ours[b]].shape
    }
    return Fit(
        weights={ours[bare]: weights[given[bare]] for bare in common if ours[bare] not in reshaped},
        missing=[
            ours[bare]
            for bare in ours
            if bare not in given and not bare.endswith("num_batches_tracked")
        ],
        unexpected=[given[bare] for bare in given if bare not in ours and bare not in ignored],
        reshaped=reshaped,
        ignored=[given[bare] for bare in ignored],
        normalisation={name: weights[key] for name, key in constants.items()},
    )


def _bare(keys: Iterable[str]) -> dict[str, str]:
    """Key without the prefixes that all keys share -> key."""
    bare = {key: key for key in keys}
    while prefix := next(
        (p for p in PREFIXES if bare and all(key.startswith(p) for key in bare)), None
    ):
        bare = {key.removeprefix(prefix): whole for key, whole in bare.items()}
    return bare


def load_into(
    student: Student,
    weights: Mapping[str, Tensor],
    name: str,
    where: str,
    new_classifier: bool = False,
) -> str:
    """Load `weights`, read from `where`, into the student that is called `name`; returns a sentence
    on what was loaded.

    With `new_classifier` a last layer that is missing or of another size stays as it was
    initialised, and the sentence says so. Raises `CheckpointError` naming what else differs, also a
    normalisation that the weights come with.
    """
    fit = fit_keys(weights, student.state_dict(), student.unused)
    fresh = {
        key
        for key in (*fit.missing, *fit.reshaped)
        if new_classifier and key.startswith(student.classifier)
    }
    missing = [key for key in fit.missing if key not in fresh]
    reshaped = [
        f"{key} {there} for {here}"
        for key, (there, here) in fit.reshaped.items()
        if key not in fresh
    ]
    parts = [
        _some(kind, keys)
        for kind, keys in (
            ("missing", missing),
            ("unexpected", fit.unexpected),
            ("of another shape", reshaped),
        )
        if keys
    ]
    if parts:
        raise CheckpointError(
            f"'{where}' does not fit model.name='{name}': keys {', '.join(parts)}; set model.name "
            "to what these weights are of"
        )
    _check_normalisation(student, fit.normalisation, where)
    student.load_state_dict(fit.weights, strict=False)
    told = f"weights of '{where}'"
    if fresh:
        told += f", but a newly initialised classifier ({', '.join(sorted(fresh))})"
    if fit.ignored:
        told += (
            f", without {len(fit.ignored)} keys that the network never uses ({fit.ignored[0]}, ...)"
        )
    return told


def _some(kind: str, keys: list[str]) -> str:
    return f"{kind}: {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _check_normalisation(student: Student, theirs: Mapping[str, Tensor], where: str) -> None:
    """The same weights behind another normalisation are a worse classifier, and nothing else would
    give it away.
    """
    there = {name: value.flatten().tolist() for name, value in theirs.items()}
    ours = {name: getattr(student.normalise, name).flatten().tolist() for name in theirs}
    if any(
        len(there[n]) != len(ours[n])
        or any(abs(a - b) > SAME_NORMALISATION for a, b in zip(there[n], ours[n], strict=True))
        for n in there
    ):
        told = " and ".join(
            f"model.{name}={[round(value, 4) for value in values]}"
            for name, values in there.items()
        )
        raise CheckpointError(
            f"'{where}' was trained with another normalisation than this model's; set "
            f"model.normalise=true, {told}"
        )
