"""Weights from elsewhere: read without unpickling code, and fitted to a student's names.

Files of other projects wrap their state dict, prefix its keys, keep an average of the weights
beside the raw ones and normalisation among them; all of that is recognised. What then still differs
is an error that names the keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dra_ray.errors import CheckpointError
from dra_ray.storage import Store
from dra_ray.students.student import Student

# where a training checkpoint keeps the weights to use, most specific first
WRAPPERS = (
    "model_state_dict",
    "state_dict",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "backbone",
    "student",
    "teacher",
    "model_state",
)
# names of averaged weights: timm, DiT, lucidrains, Lightning's callbacks, SWA, BasicSR, mmengine,
# DM-AT, our own
AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "model_ema",
    "ema_model",
    "ema",
    "ema_weights",
    "ema_params",
    "params_ema",
    "net_ema",
    "ema_net",
    "module_ema",
    "averaged_model_state_dict",
    "averaged_model",
    "average_model_state",
    "average_model",
    "average",
    "avg_model",
    "swa_state_dict",
    "swa_model_state_dict",
    "swa_model",
    "shadow",
)
# words of other names for the same, such as ema_state, EMA, ema_0.999, g_ema, polyak_model
AVERAGE_WORDS = frozenset(
    {"ema", "emas", "swa", "swag", "avg", "average", "averaged", "averages", "polyak", "shadow"}
)
# a list of averaged parameters in the network's order, as torch_ema and diffusers keep them
AVERAGE_LIST = "shadow_params"
# under such words lie moments and gradients, which have the parameters' names and shapes too
NO_WEIGHTS = ("optim", "sched", "exp_avg", "moment", "grad", "perturb")
# the first name says that the second holds averaged weights: DM-AT, Lightning's WeightAveraging
RAW_BESIDE = {
    "unaveraged_model_state_dict": "model_state_dict",
    "current_model_state": "state_dict",
}
# of DataParallel, torch.compile and wrappers
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "network.",
    "student.",
    "encoder.",
)
# counts and rates beside weights: SWA's, ema-pytorch's, LitEma's, mmengine's
COUNTERS = frozenset({"n_averaged", "initted", "step", "steps", "decay", "num_updates", "updates"})
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
# data sets' means are quoted to 3 or 4 digits
SAME_NORMALISATION = 1e-3
DEEP = 8  # wrappers inside each other; modules of a network are deeper
MODULES_DEEP, MOST_MODULES = 50, 100_000


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors by name, and where in the file averaged ones lay, "" for raw ones."""

    tensors: dict[str, Tensor]
    averaged: str = ""


def read_weights(store: Store) -> Weights:
    """The tensors of a `.safetensors` file, or of a `torch.save` file, out of whatever wraps them.

    Where averaged and raw weights lie in one file, the averaged ones. Raises `CheckpointError` when
    there are none, or a second network of the same names and shapes of which nothing says what it
    is, and `DataError` when the file is damaged or something else.
    """
    if store.name.endswith(".safetensors"):
        return _of_state_dict(store.read_tensors())
    if not store.name.endswith((".pt", ".pth", ".bin", ".ckpt", ".tar")):
        raise CheckpointError(
            f"'{store}' is not named as weights are; give a .safetensors, .pt or .pth file"
        )
    content = store.read_torch()
    weights = _unwrapped(content, DEEP, {})
    if weights.tensors and not weights.averaged:
        _require_only(content, weights, store)
    if not weights.tensors:
        raise CheckpointError(
            f"'{store}' holds no tensors by name; give a file with a state dict, under one of "
            f"{', '.join(WRAPPERS)} if wrapped"
        )
    return weights


Known = dict[int, Weights]  # by `id`: a hostile file may hold one mapping under many names


def _unwrapped(value: Any, deep: int, known: Known) -> Weights:
    if not isinstance(value, Mapping) or not deep:
        return Weights({})
    if id(value) not in known:
        known[id(value)] = Weights({})  # where it holds itself
        known[id(value)] = _chosen(value, deep, known)
    return known[id(value)]


def _chosen(value: Mapping[Any, Any], deep: int, known: Known) -> Weights:
    """Of what one mapping holds, the averaged weights or else the raw ones."""
    raw = _raw(value, deep, known)
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    for name, inner in _averages(value):
        average = _unwrapped(inner, deep - 1, known)
        if in_order := _in_order(inner, raw.tensors):
            average = Weights(in_order)
        if average.tensors and id(inner) not in seen:
            seen.add(id(inner))
            path = f"{name}.{average.averaged}" if average.averaged else name
            found[path] = average.tensors
    if not found:
        return raw
    path, said = _slowest(list(found))
    return Weights(_with_statistics(_dotted(found[path], raw.tensors), raw.tensors), said)


def _slowest(names: Sequence[str]) -> tuple[str, str]:
    """Of several averages the one of the largest decay, if their names say decays, or else the
    first; its name, and what is said of it.
    """
    if len(names) == 1:
        return names[0], names[0]
    by_decay = {decay: name for name in names if (decay := _decay(name)) is not None}
    if len(by_decay) < len(names):  # one says none, or two say the same
        return names[0], f"{names[0]}, the first of {', '.join(names)}"
    slowest = by_decay[max(by_decay)]
    return slowest, f"{slowest}, the slowest of {', '.join(names)}"


def _decay(name: str) -> float | None:
    """The last number of a name, such as 0.9999 of ema_0.9999 and of ema_9999."""
    digits = re.findall(r"\d+(?:\.\d+)?", name)
    if not digits:
        return None
    return float(digits[-1]) if "." in digits[-1] else float(f"0.{digits[-1]}")


def _averages(value: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Name and content of what may be averaged weights at this level, in the callbacks of Lightning
    and in the optimisers of NeMo.
    """
    yield from ((name, value.get(name)) for raw, name in RAW_BESIDE.items() if raw in value)
    yield from ((name, value[name]) for name in AVERAGED if name in value)
    yield from ((name, inner) for name, inner in value.items() if _says_average(name))
    for place in ("callbacks", "optimizer_states"):
        states = value.get(place)
        states = dict(enumerate(states)) if isinstance(states, list) else states
        for key, state in states.items() if isinstance(states, Mapping) else ():
            for name, inner in state.items() if isinstance(state, Mapping) else ():
                if name in AVERAGED or name in RAW_BESIDE.values() or _says_average(name):
                    yield f"{place}.{key}.{name}", inner


def _says_average(name: Any) -> bool:
    words = re.split(r"[^a-z]+", name.lower()) if isinstance(name, str) else ()
    return name not in AVERAGED and not AVERAGE_WORDS.isdisjoint(words)


def _in_order(value: Any, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A list of tensors, plain or in a mapping, under the names of the raw parameters that they are
    averages of; empty where they are not, one by one, of their shapes.
    """
    tensors = value.get(AVERAGE_LIST) if isinstance(value, Mapping) else value
    names = [name for name in raw if not name.endswith(STATISTICS)]
    if not isinstance(tensors, list | tuple) or len(tensors) != len(names) or not names:
        return {}
    if any(getattr(t, "shape", None) != raw[n].shape for n, t in zip(names, tensors, strict=True)):
        return {}
    return dict(zip(names, tensors, strict=True))


def _require_only(content: Any, weights: Weights, store: Store) -> None:
    """`CheckpointError` where the file holds another network of the same names and shapes: it may
    be an average, another epoch's or a teacher's, and which is meant nobody can know.
    """
    kind = _shapes(weights.tensors)
    networks = _networks(content, "", DEEP, set())
    alike = [path for path, tensors in networks if _shapes(tensors) == kind]
    if len(alike) > 1:
        raise CheckpointError(
            f"'{store}' holds {len(alike)} networks of the same shape "
            f"({', '.join(alike[:3])}{', ...' if len(alike) > 3 else ''}), and no name says which "
            "is the average; write the one to use to a file of its own"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset(
        (bare, tuple(tensors[key].shape))
        for bare, key in _bare(tensors).items()
        if not bare.endswith(STATISTICS) and bare not in COUNTERS
    )


def _networks(
    value: Any, path: str, deep: int, seen: set[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of tensors in a file, with its path; `seen` holds the `id` of those that were
    passed.
    """
    if not deep or id(value) in seen or any(word in path.lower() for word in NO_WEIGHTS):
        return
    seen.add(id(value))
    if isinstance(value, list | tuple):
        yield from _networks_in(dict(enumerate(value)), path, deep, seen)
    if not isinstance(value, Mapping):
        return
    tensors = {str(key): item for key, item in value.items() if isinstance(item, Tensor)}
    if tensors:
        yield path or "the top", tensors
    yield from _networks_in(value, path, deep, seen)


def _networks_in(
    value: Mapping[Any, Any], path: str, deep: int, seen: set[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, inner in value.items():
        yield from _networks(inner, f"{path}.{name}" if path else str(name), deep - 1, seen)


def _raw(value: Mapping[Any, Any], deep: int, known: Known) -> Weights:
    for name in WRAPPERS:
        inner = _unwrapped(value.get(name), deep - 1, known)
        if inner.tensors:
            return dataclasses.replace(
                inner, averaged=f"{name}.{inner.averaged}" if inner.averaged else ""
            )
    if isinstance(
        value.get("_modules"), Mapping
    ):  # a whole network was saved, of which only its tensors are read
        return _of_state_dict(dict(_of_modules(value, "", MODULES_DEEP, itertools.count(1))))
    return _of_state_dict(
        {str(key): item for key, item in value.items() if isinstance(item, Tensor)}
    )


def _of_modules(
    module: Mapping[Any, Any], prefix: str, deep: int, count: Iterator[int]
) -> Iterator[tuple[str, Tensor]]:
    if next(count) > MOST_MODULES:
        raise CheckpointError(f"a network of more than {MOST_MODULES:,} modules is not read")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (module.get(kind) or {}).items():
            if isinstance(tensor, Tensor):
                yield f"{prefix}{name}", tensor
    for name, inner in (module.get("_modules") or {}).items():
        if isinstance(inner, Mapping) and deep:
            yield from _of_modules(inner, f"{prefix}{name}.", deep - 1, count)


# -- averages inside one state dict ----------------------------------------------------------------
_IN_KEY = re.compile(
    rf"((?:{'|'.join(re.escape(p) for p in PREFIXES)})*)({'|'.join(AVERAGED)})\.(.+)"
)


def _of_state_dict(tensors: Mapping[str, Tensor]) -> Weights:
    """Apart where names say so: `ema_model.*` beside `online_model.*` (ema-pytorch), `model_ema.*`
    beside `model.*` (Lightning; LitEma drops the dots of the names), `module.*` beside `n_averaged`
    (SWA).
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (match := _IN_KEY.fullmatch(key)) and match[3] not in COUNTERS:
            groups.setdefault(f"{match[1]}{match[2]}", {})[match[3]] = tensor
    raw = {key: tensor for key, tensor in tensors.items() if not _IN_KEY.fullmatch(key)}
    if groups:
        most = max(map(len, groups.values()))
        name, said = _slowest([name for name, group in groups.items() if len(group) == most])
        return Weights(_with_statistics(_dotted(groups[name], raw), raw), said)
    if any(key.rpartition(".")[2] == "n_averaged" for key in tensors):
        return Weights(dict(tensors), "n_averaged")
    return Weights(dict(tensors))


def _dotted(average: dict[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages under the raw weights' names, where theirs are those without dots, or with "_"
    in their place.
    """
    if any("." in key for key in average):
        return average
    plain: dict[str, str] = {}
    for bare in _bare(raw):
        for sign in ("", "_"):
            plain.setdefault(bare.replace(".", sign), bare)
    known = {plain[key]: tensor for key, tensor in average.items() if key in plain}
    return known if len(known) == len(average.keys() - COUNTERS) else average


def _with_statistics(average: dict[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With BatchNorm's statistics of the raw weights where the averages are of parameters only."""
    statistics = {bare: raw[key] for bare, key in _bare(raw).items() if key.endswith(STATISTICS)}
    if not statistics or any(key.endswith(STATISTICS) for key in average):
        return average
    return {bare: average[key] for bare, key in _bare(average).items()} | statistics


# -- fitting them to a student ---------------------------------------------------------------------
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

    @property
    def differences(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def fit_keys(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], unused: tuple[str, ...] = ()
) -> Fit:
    """Match keys up to the prefix under which most of them are the student's; `unused` are prefixes
    of keys to leave out.

    Normalisation (a last name of mean, std, mu or sigma) is set apart. What lies outside of the
    prefix (a loss, metrics, another network) is ignored where the network is whole without it, and
    so are counters. A missing count of BatchNorm's batches is no difference: files of old PyTorch
    versions lack it, and nothing here reads it.

    Raises `CheckpointError` where two networks in the file fit alike.
    """
    constants = {
        NORMALISATION[last]: key
        for key in weights
        if (last := key.rsplit(".", 1)[-1]) in NORMALISATION
    }
    ours = _bare(wanted)
    if len(ours) < len(wanted):  # a wrapper's prefix that not all keys have is a part's name
        ours = {key: key for key in wanted}
    keys = [key for key in weights if key not in constants.values()]
    prefix = _prefix(keys, ours)
    given = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    outside = [key for key in keys if not key.startswith(prefix)]
    ignored = [
        key
        for bare, key in given.items()
        if bare not in ours and (bare.startswith(unused) or bare in COUNTERS)
    ]
    common = [bare for bare in ours if bare in given]
    reshaped = {
        ours[b]: (list(weights[given[b]].shape), list(wanted[ours[b]].shape))
        for b in common
        if weights[given[b]].shape != wanted[ours[b]].shape
    }
    missing = [ours[b] for b in ours if b not in given and not b.endswith("num_batches_tracked")]
    counters = [key for key in outside if key.rpartition(".")[2] in COUNTERS]
    ignored += counters if missing else outside
    used = {given[bare] for bare in common}
    return Fit(
        weights={ours[bare]: weights[given[bare]] for bare in common if ours[bare] not in reshaped},
        missing=missing,
        unexpected=[key for key in keys if key not in ignored and key not in used],
        reshaped=reshaped,
        ignored=ignored,
        normalisation={name: weights[key] for name, key in constants.items()},
    )


def _prefix(keys: Iterable[str], ours: Mapping[str, str]) -> str:
    """The prefix under which most keys are ours."""
    votes: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        votes.update(
            ".".join([*parts[:cut], ""])
            for cut in range(len(parts))
            if ".".join(parts[cut:]) in ours
        )
    best = votes.most_common(2)
    if not best:
        return _common_prefix(keys)
    if len(best) == 2 and best[0][1] == best[1][1] >= len(
        [b for b in ours if not b.endswith(STATISTICS)]
    ):
        names = " and ".join(repr(name) for name, _ in best)
        raise CheckpointError(
            f"two networks fit, under the prefixes {names}; write one of them to a file of its own"
        )
    return best[0][0]


def _common_prefix(keys: Iterable[str]) -> str:
    """The wrappers' prefixes that most keys share, so that one foreign key does not hide them."""
    bare, whole = list(keys), ""
    while prefix := next(
        (p for p in PREFIXES if sum(key.startswith(p) for key in bare) > 0.8 * len(bare) > 0), None
    ):
        bare = [key.removeprefix(prefix) for key in bare if key.startswith(prefix)]
        whole += prefix
    return whole


def _bare(keys: Iterable[str]) -> dict[str, str]:
    """Key without the prefixes that its fellows share -> key; what does not share them is
    left out.
    """
    keys = list(keys)
    prefix = _common_prefix(keys)
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def load_into(
    student: Student,
    weights: Weights | Mapping[str, Tensor],
    name: str,
    where: str,
    new_classifier: bool = False,
) -> str:
    """Load `weights`, read from `where`, into the student that is called `name`; returns a sentence
    on what was loaded.

    Raises what `fitted` raises.
    """
    fit, origin = fitted(student, weights, name, where, new_classifier)
    student.load_state_dict(fit.weights, strict=False)
    return origin


def fitted(
    student: Student,
    weights: Weights | Mapping[str, Tensor],
    name: str,
    where: str,
    new_classifier: bool = False,
) -> tuple[Fit, str]:
    """What `load_into` would load, and its sentence; the student may be on the meta device.

    With `new_classifier` a last layer that is missing or of another size stays as it was
    initialised, and the sentence says so. Raises `CheckpointError` naming what else differs, also a
    normalisation that the weights come with.
    """
    source = weights if isinstance(weights, Weights) else Weights(dict(weights))
    try:
        fit, adapted = _best_fit(student, source.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"'{where}': {error}") from None
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
    origin = (
        f"averaged weights ({source.averaged}) of '{where}'"
        if source.averaged
        else f"weights of '{where}'"
    )
    if adapted:
        origin += ", with names and position embeddings converted as timm does"
    if fresh:
        origin += f", but a newly initialised classifier ({', '.join(sorted(fresh))})"
    if fit.ignored:
        origin += (
            f", without {len(fit.ignored)} keys that the network never uses ({fit.ignored[0]}, ...)"
        )
    return fit, origin


def _best_fit(student: Student, tensors: Mapping[str, Tensor]) -> tuple[Fit, bool]:
    """The weights as they are or, where those do not fit, as the network's own library converts
    them.
    """
    wanted = student.state_dict()
    tensors = _dotted(dict(tensors), wanted)
    fit = fit_keys(tensors, wanted, student.unused)
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = getattr(
        student, "converted", None
    )
    if not fit.differences or convert is None:
        return fit, False
    prefix = _common_prefix(tensors)
    bare = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    other = fit_keys(convert(bare), wanted, student.unused)
    return (other, True) if other.differences < fit.differences else (fit, False)


def _some(kind: str, keys: list[str]) -> str:
    return f"{kind}: {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _check_normalisation(student: Student, theirs: Mapping[str, Tensor], where: str) -> None:
    """The same weights behind another normalisation are a worse classifier, and nothing else would
    give it away.
    """
    there = {name: value.flatten().tolist() for name, value in theirs.items()}
    ours = {name: student.normalise.constants[name] for name in theirs}
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
