"""An evaluation as an entry of RobustBench (Croce et al., arXiv 2010.09670): its JSON file, and the
text of its submission.

Accuracies are strings in percent with two decimals and the radius is a string such as "8/255", as
in the published entries of `model_info/<dataset>/<threat>/`. What the evaluation does not know of
the paper comes from `Facts`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from dra_ray import config
from dra_ray.config.catalogue import STANDARD
from dra_ray.config.text import parse, shown
from dra_ray.errors import ConfigError, DataError, nearest
from dra_ray.storage import Store

Text = Annotated[str, Field(min_length=1)]
Percent = Annotated[float, Field(ge=0, le=100)]

# (dataset, norm) of the boards -> radius in pixel steps of 1/255, and the images of an official
# evaluation
BOARDS = {
    ("cifar10", "linf"): (8.0, 10_000),
    ("cifar10", "l2"): (127.5, 10_000),
    ("cifar100", "linf"): (8.0, 10_000),
    ("imagenet", "linf"): (4.0, 5_000),
}
NORMS = {"linf": "Linf", "l2": "L2"}
# model.name -> architecture as the boards spell it, and its short form in names of files
SPELLED = (
    (r"(?:relu-)?wrn-(.+)", "WideResNet-", "WRN-"),
    (r"rawrn-(.+)", "RaWideResNet-", "RaWRN-"),
    (r"resnet-(.+)", "ResNet-", "R"),
)


class Facts(config.Frozen):
    """What a board shows of a model beside its accuracies."""

    title: Text
    authors: str = Field(
        pattern=r"^[^\s,]",
        description="'First Author, Second Author, ...'; the first one's last word names the entry",
    )
    year: Annotated[int, Field(ge=2000, le=2100)]
    venue: Text = Field(description="such as 'ICML 2023' or 'arXiv, Feb 2026'")
    link: Text = Field(description="URL of the paper")
    dataset: Text = Field(description="cifar10, cifar100 or imagenet")
    architecture: Text = Field(description="such as 'WideResNet-28-10'")
    tag: str = Field(
        "",
        pattern=r"^[\w.-]*$",
        description="of the file's name, where a paper has several models: 'WRN-28-10'",
    )
    additional_data: bool = Field(
        False,
        description="whether it learnt from further real images; synthetic ones are told in a "
        "footnote",
    )
    synthetic_images: config.NonNegativeInt = Field(0, description="that it learnt from")
    number_forward_passes: config.PositiveInt = Field(
        1, description="of the network, for one classification"
    )
    reported: Percent | None = Field(
        None, description="robust accuracy in the paper, in percent; default: the one evaluated"
    )
    footnote: str = Field("", description="anything else")
    checkpoint: str = Field("", description="URL of weights and code")
    identifier: str = Field(
        "",
        pattern=r"^[\w.-]*$",
        description="of the entry; default: surname, year, first word of the title, _tag",
    )


def facts(store: Store, experiment: config.Experiment) -> Facts:
    """The facts in a YAML or JSON file; its fields dataset, architecture, tag and synthetic_images
    default to what the experiment sets.

    Raises `ConfigError` naming the field, the value and the remedy.
    """
    tree = parse(store.read_text(), str(store)).value
    if not isinstance(tree, dict):
        raise ConfigError(
            f"'{store}' holds no fields; write title, authors, year, venue and link, one a line"
        )
    if unknown := [field for field in tree if field not in Facts.model_fields]:
        raise ConfigError(
            f"{store}: unknown field {shown(unknown[0])}; "
            f"{nearest(unknown[0][:100], Facts.model_fields)}"
        )
    own: dict[str, Any] = {"synthetic_images": experiment.synthetic.images}
    if "name" in experiment.data.model_fields_set:  # else it says nothing of what was evaluated
        own["dataset"] = experiment.data.name
    if "name" in experiment.model.model_fields_set:
        own["architecture"], own["tag"] = spelled(experiment.model.name)
    if missing := [
        field
        for field, about in Facts.model_fields.items()
        if about.is_required() and field not in own | tree
    ]:
        raise ConfigError(f"{store}: {missing[0]} is not set; write {', '.join(missing)}")
    return config.validate(Facts, own | tree, str(store))


def spelled(name: str) -> tuple[str, str]:
    """(architecture, tag) of a `model.name`: wrn-28-10 is WideResNet-28-10 and WRN-28-10."""
    for pattern, long, short in SPELLED:
        if match := re.fullmatch(pattern, name):
            return long + match[1], short + match[1]
    bare = name.removeprefix("timm/")
    return bare, re.sub(r"[^\w.-]", "-", bare)


def identifier(facts: Facts) -> str:
    """<Surname><Year><first word of the title>[_<tag>], in plain letters; a title's article does
    not count as a word.
    """
    if facts.identifier:
        return facts.identifier
    surname = facts.authors.split(",")[0].split()[-1]
    words = [
        word for word in re.findall(r"\w+", facts.title) if word.lower() not in ("a", "an", "the")
    ] or ["Model"]
    bare = (
        unicodedata.normalize("NFKD", f"{surname}{facts.year}{words[0]}")
        .encode("ascii", "ignore")
        .decode()
    )
    return re.sub(r"[^\w-]", "", bare) + (f"_{facts.tag}" if facts.tag else "")


def entry(result: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The JSON of one board entry from the result of an evaluation (`autoattack.json`).

    Raises `ConfigError` for an evaluation that is no standard AutoAttack, whose number would be
    another thing than a board's.
    """
    _require_standard(result)
    robust = _percent(result["autoattack_accuracy"])
    made = {
        "link": facts.link,
        "name": facts.title,
        "authors": facts.authors,
        "additional_data": facts.additional_data,
        "number_forward_passes": facts.number_forward_passes,
        "dataset": facts.dataset,
        "venue": facts.venue,
        "architecture": facts.architecture,
        "eps": _radius(result["threat"]),
        "clean_acc": _percent(result["clean_accuracy"]),
        "reported": robust if facts.reported is None else f"{facts.reported:.2f}",
        "autoattack_acc": robust,
    }
    footnote = _footnote(facts)
    return (
        made
        | ({"footnote": footnote} if footnote else {})
        | {"unreliable": bool(result.get("flags"))}
    )


def notes(result: Mapping[str, Any], facts: Facts) -> list[str]:
    """What stands between this evaluation and a board, in sentences; empty when it can be handed in
    as it is.
    """
    threat, found = result["threat"], []
    radius, images = BOARDS.get((facts.dataset, threat["norm"]), (None, None))
    if radius is None or abs(radius - threat["eps_255"]) > 1e-9:
        fits = ", ".join(
            f"{dataset} {NORMS[norm]} {_radius({'norm': norm, 'eps_255': eps})}"
            for (dataset, norm), (eps, _) in BOARDS.items()
        )
        found.append(
            f"{facts.dataset} {NORMS[threat['norm']]} {_radius(threat)} fits no board; there are "
            f"{fits}"
        )
    if images and result["images"] != images:
        found.append(
            f"it was evaluated on {result['images']:,} images, but the board's test set has "
            f"{images:,}"
        )
    for field, wanted in (("level", "reference"), ("streams", "batch")):
        if _setting(result, field) != wanted:
            found.append(
                f"evaluation.{field}={_setting(result, field)} is not the reference; evaluate with "
                f"evaluation.{field}={wanted}"
            )
    if facts.dataset == "imagenet":
        found.append(
            "the board takes a fixed list of 5,000 validation images; check that the test images "
            "are these"
        )
    return found + [f"flagged: {flag}" for flag in result.get("flags", [])]


def write(result: Mapping[str, Any], facts: Facts, to: Store) -> tuple[Store, str]:
    """Write the entry's JSON file and its submission text below `to`; returns the JSON file and the
    text.

    Args:
        result: of `dra evaluate`, from autoattack.json.
    Raises `ConfigError` for an evaluation that is no standard AutoAttack, `DataError` for a result
    that lacks a number.
    """
    missing = [
        key
        for key in ("clean_accuracy", "autoattack_accuracy", "threat", "images")
        if key not in result
    ]
    if missing:
        raise DataError(f"the evaluation has no '{missing[0]}'; evaluate the run again")
    made, name = entry(result, facts), identifier(facts)
    told = submission(made, result, facts)
    file = to / f"{name}.json"
    file.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    (to / f"{name}.md").write_text(told)
    return file, told


def submission(made: Mapping[str, Any], result: Mapping[str, Any], facts: Facts) -> str:
    """What RobustBench's form for new models asks for, as Markdown, preceded by what is still to be
    done.
    """
    norm, name = NORMS[result["threat"]["norm"]], identifier(facts)
    effort = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(STANDARD).items())
    how = (
        f"AutoAttack, standard version ({effort}), seed {result.get('seed')}, batch "
        f"{result.get('batch')}, {result['images']:,} test images"
    )
    todo = notes(result, facts) + (
        [] if facts.checkpoint else ["a link to weights and code is missing; set checkpoint"]
    )
    lines = [f"[New Model] {name}", ""]
    lines += ["Before it is handed in:", *(f"- {note}" for note in todo), ""] if todo else []
    lines += [
        "## Paper",
        f"- Title: {facts.title}",
        f"- URL: {facts.link}",
        f"- Authors: {facts.authors}",
        f"- Venue: {facts.venue}",
        "",
    ]
    lines += [
        "## Claim",
        f"- Architecture: {facts.architecture}",
        f"- Threat model: {norm}",
        f"- eps: {made['eps']}",
    ]
    lines += [
        f"- Clean accuracy: {made['clean_acc']} %",
        f"- Robust accuracy: {made['autoattack_acc']} % (reported: {made['reported']} %)",
    ]
    lines += [
        f"- Additional data: {str(facts.additional_data).lower()}"
        + (f". {made['footnote']}" if "footnote" in made else "")
    ]
    lines += [
        f"- Evaluation: {how}; the adversarial images are kept",
        f"- Weights and code: {facts.checkpoint or 'to be added'}",
        "",
    ]
    lines += [
        "## Model zoo (yours to answer)",
        "- [ ] the model may join the zoo",
        f"- [ ] {facts.architecture} is among the zoo's networks or in timm",
    ]
    lines += [
        "- [ ] the weights may be published under the MIT licence, or under: ",
        "",
        f"File: model_info/{facts.dataset}/{norm}/{name}.json",
        "",
    ]
    return "\n".join(lines)


def _require_standard(result: Mapping[str, Any]) -> None:
    effort = dataclasses.asdict(STANDARD)
    if (version := _setting(result, "version")) != "standard":
        raise ConfigError(
            f"evaluation.version='{version}', but boards show the standard version; evaluate with "
            "evaluation.version=standard"
        )
    if _setting(result, "level") == "screen":
        raise ConfigError(
            "evaluation.level='screen' only bounds the accuracy from above; evaluate with "
            "evaluation.level=reference"
        )
    if result.get("effort", effort) != effort:
        raise ConfigError(
            f"effort={result['effort']} is less than standard AutoAttack's {effort}; evaluate with "
            "the standard effort"
        )


def _setting(result: Mapping[str, Any], field: str) -> Any:
    """Of the evaluation; older results have the default."""
    return result.get("settings", {}).get(
        field, result.get(field, getattr(config.Evaluation(), field))
    )


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def _radius(threat: Mapping[str, Any]) -> str:
    """Linf in pixel steps, L2 as a number, as boards write them."""
    return (
        f"{threat['eps_255']:g}/255" if threat["norm"] == "linf" else f"{threat['eps_255'] / 255:g}"
    )


def _footnote(facts: Facts) -> str:
    n = facts.synthetic_images
    count = next(
        (f"{n / unit:g}{letter}" for unit, letter in ((10**6, "M"), (10**3, "k")) if n >= unit),
        str(n),
    )
    return " ".join(
        part
        for part in (f"Learnt from {count} synthetic images too." if n else "", facts.footnote)
        if part
    )
