"""Which settings read a field, said in one place. `loss.alpha` is of IKL: given to TRADES it
changes nothing, and as an axis of a sweep of TRADES it makes equal trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dra_ray.config.base import shown_value
from dra_ray.config.data_sets import DATA_SETS

WEIGHT = "align.weight"


@dataclass(frozen=True)
class Reader:
    """A field is read where `field`, which decides, has such a value.

    Attributes:
        reads: takes any plain value, valid or not; what is not valid is said elsewhere.
        text: the values, for people, such as "ikl".
    """

    field: str
    reads: Callable[[Any], bool]
    text: str


def _one_of(field: str, *values: Any) -> tuple[Reader, ...]:
    text = " or ".join("true" if value is True else str(value) for value in values)
    return (Reader(field, lambda value: value in values, text),)


def _not(field: str, unread: Any) -> tuple[Reader, ...]:
    text = "set" if unread is None else f"not {unread}"
    return (Reader(field, lambda value: value != unread, text),)


def _above_zero(field: str) -> tuple[Reader, ...]:
    return (Reader(field, bool, "above 0"),)


_ALIGNED = _above_zero(WEIGHT)
_ASKED = _one_of("align.target", "teacher")
_DISTILLED = _above_zero("distill.weight")
_DIFFUSION = (
    Reader("model.name", lambda value: str(value).startswith("diffusion/"), "diffusion/TEACHER"),
)
_UNORDERED = [name for name, known in DATA_SETS.items() if known.split != "official"]
_ADAPTIVE = ("tpe", "gp")

READERS: dict[str, tuple[Reader, ...]] = {
    "data.split_seed": _one_of("data.name", *_UNORDERED),
    "synthetic.uri": _above_zero("synthetic.images"),
    "synthetic.fraction": _above_zero("synthetic.images"),
    "model.mean": _one_of("model.normalise", True),
    "model.std": _one_of("model.normalise", True),
    "model.pooling": (
        Reader("model.name", lambda value: str(value).startswith("vit-"), "one of vit-*"),
    ),
    "model.sigma": _DIFFUSION,
    "model.layer": _DIFFUSION,
    "loss.beta": _one_of("loss.name", "trades", "ikl"),
    "loss.first": _one_of("loss.name", "trades", "ikl"),
    "loss.alpha": _one_of("loss.name", "ikl"),
    "loss.temperature": _one_of("loss.name", "ikl"),
    "loss.adr_temperature": _one_of("loss.name", "adr"),
    "loss.adr_share": _one_of("loss.name", "adr"),
    "loss.awp_from_epoch": _above_zero("loss.awp"),
    "optim.nesterov": _one_of("optim.name", "sgd"),
    "optim.momentum": _one_of("optim.name", "sgd") + _not("optim.schedule", "one-cycle"),
    "optim.betas": _one_of("optim.name", "lion", "adamw"),
    "optim.pct_start": _one_of("optim.schedule", "one-cycle"),
    "optim.warmup_epochs": _one_of("optim.schedule", "warmup-cosine"),
    "optim.lr_start": _one_of("optim.schedule", "warmup-cosine"),
    "optim.lr_end": _one_of("optim.schedule", "warmup-cosine"),
    "optim.lr_drops": _one_of("optim.schedule", "drops"),
    "optim.averaging_decay": _not("optim.averaging", "none"),
    "optim.averaging_warmup": _not("optim.averaging", "none"),
    "optim.averaging_ramp": _not("optim.averaging", "none"),
    # beside alignment itself, which reads all of align, teacher and pool
    "align.sigma": (Reader("align.terms", lambda value: not value, "empty"),),
    "align.whiten_dim": _one_of("align.transform", "whiten"),
    "align.statistics_images": _not("align.transform", "none"),
    "align.temperature": _one_of("align.loss", "infonce"),
    # of a sweep
    "asha.level": _one_of("scheduler", "noise_aware", "halving"),
    "asha.grace_epochs": _not("scheduler", "none"),
    "asha.reduction_factor": _not("scheduler", "none"),
    "search.startup_trials": _one_of("search.method", *_ADAPTIVE),
    "search.warm_start": _one_of("search.method", *_ADAPTIVE),
    "fidelity.apgd_images": _not("fidelity.apgd_from", None),
    "fidelity.apgd_steps": _not("fidelity.apgd_from", None),
    "fidelity.best": _not("fidelity.finalists", "none"),
}


def _is_of_alignment(field: str) -> bool:
    """Whether only the alignment term reads the field: without alignment it has no effect."""
    return field != WEIGHT and field.startswith(("align.", "teacher.", "pool."))


def readers(field: str) -> tuple[Reader, ...]:
    """What must hold for the field to be read; () for one that every run reads."""
    return (
        (_ALIGNED if _is_of_alignment(field) else ())
        + (_ASKED if field.startswith(("teacher.", "pool.")) else ())
        + (_DISTILLED if field.startswith("distill.") and field != "distill.weight" else ())
        + READERS.get(field, ())
    )


def missing(field: str, possible: Callable[[str], Sequence[Any]]) -> Reader | None:
    """What keeps the field from being read, given the values that other fields may have; None
    where it may be read.
    """
    return next(
        (one for one in readers(field) if not any(map(one.reads, possible(one.field)))), None
    )


def unread(field: str, possible: Callable[[str], Sequence[Any]], prefix: str = "") -> str | None:
    """Why nothing reads the field, as the end of a sentence about it; None where it may be read.
    `prefix` is where the fields lie, such as "base.".
    """
    reader = missing(field, possible)
    if reader is None:
        return None
    values = ", ".join(shown_value(value) for value in possible(reader.field))
    return f"it is read where {prefix}{reader.field} is {reader.text}, and that is {values}"


def is_read(field: str, fields: Mapping[str, Any]) -> bool:
    """Whether the field has an effect beside these others; what is not among them does not decide
    it.
    """
    return all(one.field not in fields or one.reads(fields[one.field]) for one in readers(field))
