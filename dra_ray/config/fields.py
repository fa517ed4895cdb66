"""The fields of a config as dotted names, and the nearest of them to one that does not exist."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAME_CHARACTERS = 64  # difflib is quadratic, and no field's name is longer
# likeness of two names: of those beside, of those elsewhere, and of a slip of the hand
_CLOSE, _CLOSE_ELSEWHERE, _SLIP = 0.6, 0.75, 0.8

# what others call a field, whose name is not like theirs
_USUAL = {
    "model.name": "arch architecture backbone net network model_name",
    "model.weights": "pretrained ckpt init_weights",
    "data.name": "dataset data_name",
    "data.uri": "data_dir data_path dataset_path data_root root",
    "data.resolution": "image_size img_size input_size imsize",
    "data.validation_images": "val_size validation_size val_images val_split",
    "data.test_images": "test_size test_split",
    "synthetic.images": "synthetic_scale num_synthetic",
    "synthetic.fraction": "synthetic_ratio",
    "optim.name": "optimizer optimiser",
    "optim.batch": "bs",
    "optim.weight_decay": "wd",
    "optim.schedule": "lr_schedule lr_scheduler",
    "optim.averaging_decay": "ema_decay",
    "align.weight": "lam lambda_ lmbda dra_weight repa_weight",
    "align.sigma": "t timestep timesteps noise_level",
    "teacher.uri": "encoder",
    "compute.precision": "amp fp16 dtype",
    "resources.gpus_per_worker": "device cuda gpu gpus num_gpus n_gpus",
    "tracking": "logging logger",
    # of sweeps, in Ray Tune's, Optuna's and Hyperband's words
    "trials": "num_samples n_trials",
    "search.method": "sampler algorithm search_alg",
    "scheduler": "pruner",
    "asha.grace_epochs": "grace_period min_resource",
    "asha.reduction_factor": "eta",
    "asha.max_concurrent": "concurrency max_concurrent_trials n_jobs",
    "base.optim.epochs": "max_t max_resource",
}
_BY_WORD = {word: field for field, words in _USUAL.items() for word in words.split()}
# and what they call one beside which they look
_BESIDE = {
    "uri": "path dir folder file root checkpoint model",
    "images": "num count number size scale",
    "name": "type kind",
}
_BESIDE_BY_WORD = {word: leaf for leaf, words in _BESIDE.items() for word in words.split()}
# what is no field, but an option of the command
_OPTIONS = {
    "--storage": "output_dir out_dir save_dir storage results_dir log_dir",
    "--name": "run_name exp_name experiment_name",
}
_OPTION_BY_WORD = {word: option for option, words in _OPTIONS.items() for word in words.split()}


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The config inside a field, also where it may be null; None for plain values."""
    for part in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def is_table(field: FieldInfo) -> bool:
    """Whether the field's keys are the user's own, such as `space` and `pool.labels`."""
    return typing.get_origin(field.annotation) is dict


def kind_at(kind: type[BaseModel], path: Sequence[str]) -> tuple[type[BaseModel], int]:
    """The deepest config that `path` reaches from `kind`, and how many parts lead there."""
    for depth, part in enumerate(path):
        inner = nested(kind.model_fields[part]) if part in kind.model_fields else None
        if inner is None:
            return kind, depth
        kind = inner
    return kind, len(path)


def walk(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted field of `kind`, parts before what lies in them."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}", field
        inner = nested(field)
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}.")


def suggest(kind: type[BaseModel], path: Sequence[str]) -> str:
    """A remedy for the unknown field `path` of `kind`: the nearest of all fields, or the names that
    are known where it was looked for.

    A field beside it is named alone, one elsewhere in full; one whose description has the word
    (`model.width`: "wrn-DEPTH-WIDTH") with that description.
    """
    home = kind_at(kind, path)[0]
    unknown = [part[:_NAME_CHARACTERS] for part in path]
    if usual := _usual(kind, unknown):
        return usual
    scores = {name: _likeness(unknown, name, field) for name, field in walk(kind)}
    best = max(scores.values())
    if best < _CLOSE:
        return f"known: {', '.join(sorted(home.model_fields))}"
    equals = [name for name, score in scores.items() if score > best - 1e-9][:3]
    if len(equals) == 1 and _similar(unknown[-1], equals[0].rpartition(".")[2]) < _CLOSE:
        description = dict(walk(kind))[equals[0]].description or ""
        if _mentions(description, unknown[-1]):
            return f"did you mean '{equals[0]}' ({_start(description)})?"
    beside = ".".join(path[:-1])
    words = [
        f"'{name.rpartition('.')[2] if name.rpartition('.')[0] == beside else name}'"
        for name in equals
    ]
    return f"did you mean {' or '.join(words)}?"


def _usual(kind: type[BaseModel], unknown: Sequence[str]) -> str | None:
    """A remedy by what others call a field; None where nobody does."""
    *asked, last = unknown
    last = last.lower().replace("-", "_")
    names = [name for name, _ in walk(kind)]
    beside = ".".join([*asked, _BESIDE_BY_WORD.get(last, "")])
    if asked and beside in names:
        return f"did you mean '{beside}'?"
    if last in {name.rpartition(".")[2] for name in names}:
        return None
    if option := _OPTION_BY_WORD.get(last):
        return f"give it with the option {option}"
    field = _BY_WORD.get(last, "")
    found = [name for name in names if name == field or name.endswith(f".{field}")]
    return f"did you mean '{min(found, key=len)}'?" if field and found else None


def _likeness(unknown: Sequence[str], name: str, field: FieldInfo) -> float:
    """0 to about 1.5: how well field `name` answers `unknown`; the last part counts most, being in
    the same place breaks ties.
    """
    *folders, leaf = name.split(".")
    *asked, last = unknown
    same_place = 0.3 * _similar(".".join(asked), ".".join(folders))
    if folders[-len(asked) :] == asked:
        same_place = 0.3  # a sweep's base.optim.lr answers optim.lr
    if leaf == last:
        return 1 + same_place
    similar = _similar(last, leaf)
    if asked == folders and similar >= _SLIP:
        return 0.5 + 0.9 * similar
    if leaf.startswith(f"{last}_") or leaf.endswith(f"_{last}"):  # eps for eps_255
        return 0.95 + same_place
    if last.startswith(f"{leaf}_") or last.endswith(f"_{leaf}"):  # batch_size for batch
        return 0.9 + same_place
    if similar >= (_CLOSE if asked == folders else _CLOSE_ELSEWHERE):
        return 0.9 * similar + same_place
    description = (field.description or "").lower()
    if not _mentions(description, last):
        return 0.0
    return (0.75 if description.startswith(last.replace("_", " ").lower()) else 0.6) + same_place


def _mentions(description: str, word: str) -> bool:
    """Whether a description has the word; `learning_rate` is two."""
    phrase = re.escape(word.replace("_", " "))
    return len(word) > 2 and bool(re.search(rf"(?<![a-z]){phrase}(?![a-z])", description, re.I))


def _similar(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _start(description: str) -> str:
    return description if len(description) <= 60 else f"{description[:60]}..."
