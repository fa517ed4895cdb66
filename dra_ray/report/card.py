"""A model card (Mitchell et al. 2019, arXiv 1810.03993) of a run, in Markdown: what it is, what it
was trained on, how it does and what it is not for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dra_ray.config import flatten
from dra_ray.report import words
from dra_ray.report.summary import Summary

CARD = "MODEL_CARD.md"
SHOWN = (
    "model.name",
    "loss.name",
    "align.weight",
    "align.sigma",
    "synthetic.images",
    "threat.norm",
    "threat.eps_255",
    "optim.epochs",
    "optim.batch",
    "seed",
)


def model_card(summary: Summary) -> str:
    """Of a run as `collect` read it; sections without facts are left out."""
    config = dict(flatten(summary.config))
    base = {field.removeprefix("base."): value for field, value in config.items()} | config
    parts = [
        f"# {_text(summary.title)}",
        _text(summary.headline),
        _section("Model and training", _table(("field", "value"), _fields(base))),
        _section("Data", _table(("fact", "value"), _data(base, summary))),
        _section("Results on test images", _table(RESULTS, _results(summary))),
        _section("Limits", LIMITS),
        _section("Environment", _table(("package", "version"), list(summary.versions.items()))),
        _section(
            "To reproduce",
            "`dra bundle --check` compares every file with its SHA-256; "
            "`config.yaml` is the whole config and `environment.txt` every package.",
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


RESULTS = ("", "clean %", "PGD %", "AutoAttack %", "95 % interval", "images", "threat")
LIMITS = (
    "Accuracies hold for the named attack, radius and test images; other attacks, larger radii and "
    "other images can fool the model more often. It was trained with one seed unless said "
    "otherwise, and differences between seeds are not part of the intervals. It is a research "
    "model, not a safety component."
)


def _fields(base: Mapping[str, Any]) -> list[tuple[str, object]]:
    return [(field, words.value(base[field])) for field in SHOWN if base.get(field) is not None]


def _data(base: Mapping[str, Any], summary: Summary) -> list[tuple[str, object]]:
    named = [(f, base[f]) for f in ("data.name", "data.uri", "synthetic.uri") if base.get(f)]
    hashes = flatten(summary.data)
    return [*named, *hashes]


def _results(summary: Summary) -> list[tuple[object, ...]]:
    return [
        (
            role,
            words.in_percent(final.clean_accuracy),
            words.in_percent(final.pgd_accuracy),
            words.in_percent(final.autoattack_accuracy),
            words.span(final.interval),
            final.images,
            words.fields(final.threat.given()),
        )
        for role, final in summary.evaluated.items()
    ]


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(value: object) -> str:
    """One line that no table and no HTML reads as its own."""
    text = "–" if value is None else " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")
