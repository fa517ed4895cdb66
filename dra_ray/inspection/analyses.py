"""What the paper looked at, for any set of models (arXiv 2602.19931, sections 3 and 5): rows of
plain values, curves, and a sentence each on what the paper saw and what is seen here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dra_ray.errors import ConfigError
from dra_ray.evaluation.subjects import Options, Subject
from dra_ray.inspection import dimension, frequency, geometry, models, sae, similarity
from dra_ray.inspection.frozen import EPS_255
from dra_ray.inspection.kept import Kept, identity
from dra_ray.inspection.models import Curve, Seen

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
        name, title: of the analysis.
        rows: one per model, fractions unrounded.
        curves: per model, lists by name, for plots and JSON.
        paper, here: a sentence on what the paper saw, and on what is seen in `rows`.
    """

    name: str
    title: str
    rows: list[Row]
    curves: dict[str, dict[str, list[float]]]
    paper: str
    here: str


# -- where features lie ----------------------------------------------------------------------------
def of_geometry(seen: Sequence[Seen], reference: Seen | None = None) -> Analysis:
    """Alignment and uniformity (figures 4 and 5): raw values, both better when lower. The paper's
    attack, images and signs are not in the text we have (UNVERIFIED).
    """
    seen = [*([reference] if reference else []), *seen]
    rows = []
    for each in seen:
        row: Row = {"model": each.name, "uniformity": geometry.uniformity(each.features)}
        if each.adversarial is not None:
            row["alignment"] = geometry.alignment(each.features, each.adversarial)
        row["dimension"] = geometry.effective_dimension(each.features, centred=True)
        rows.append(row | each.accuracies)
    return Analysis(
        "geometry",
        "Alignment and uniformity",
        rows,
        {},
        "Diffusion features are less moved by attacks than a standard model's and spread far more "
        "evenly; adversarial training moves less and spreads less, and DRA shifts that frontier "
        "(figures 4 and 5).",
        _extremes(rows, "uniformity", "spread most evenly (lowest uniformity)", min),
    )


# -- how alike they are ----------------------------------------------------------------------------
def of_similarity(
    seen: Sequence[Seen], reference: Seen | None, neighbours: int = similarity.NEIGHBOURS
) -> Analysis:
    """CKNNA and CKA of every model with `reference` (default: the first model), and their rank
    correlation with robust accuracy (figures 1 and 9).
    """
    first, others = (reference, seen) if reference else (seen[0], seen[1:])
    anchor = similarity.prepared(first.features)
    rows = []
    for each in others:
        other = similarity.prepared(each.features)
        row: Row = {
            "model": each.name,
            "cknna": similarity.cknna(anchor, other, neighbours),
            "cka": similarity.cka(anchor, other),
            "unbiased_cka": similarity.cka(anchor, other, unbiased=True),
        }
        rows.append(row | each.accuracies)
    return Analysis(
        "similarity",
        f"Similarity to {first.name}",
        rows,
        {},
        "Robust models that are more robust have representations more like the diffusion model's, "
        "and not more like a standard model's (figures 1 and 9).",
        _ranks(rows),
    )


def _ranks(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if "robust_accuracy" in row]
    found = similarity.rank_correlation(
        [row["cknna"] for row in judged], [row["robust_accuracy"] for row in judged]
    )
    if found is None:
        return "Too few models to say whether similarity goes with robustness; give three or more."
    told = (
        f"Over {found.models} models, CKNNA and robust accuracy have rank correlation "
        f"{found.rho:.2f}"
    )
    if found.interval:
        told += f" (95 % {found.interval[0]:.2f} to {found.interval[1]:.2f})"
    return f"{told}, p = {found.p_value:.2g}."


# -- directions that count -------------------------------------------------------------------------
def of_dimension(seen: Sequence[Seen], reference: Seen | None = None) -> Analysis:
    """Classification and robust dimension (figure 7, table 3); a teacher has none."""
    rows: list[Row] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for each in seen:
        assert each.adversarial is not None
        assert each.weight is not None
        labels = each.labels
        assert labels is not None
        given = (each.features, each.adversarial, labels, each.weight, each.bias)
        found = dimension.dimensions(*given)
        around = dimension.dimensions(*given, centred=True)
        rows.append(
            {
                "model": each.name,
                "width": each.features.shape[1],
                "cls_95": found.cls_95,
                "cls_99": found.cls_99,
                "robust_dimension": found.robust_dimension,
                "centred_cls_95": around.cls_95,
                "centred_cls_99": around.cls_99,
                "centred_robust_dimension": around.robust_dimension,
                "clean_accuracy": found.full_clean,
                "robust_accuracy": found.full_robust,
            }
        )
        curves[each.name] = {"clean": found.clean, "robust": found.robust}
    return Analysis(
        "dimension",
        "Directions that a classifier needs",
        rows,
        curves,
        "CLS-95, CLS-99 and robust dimension are 9, 14, 9 for AT and 15, 42, 22 with DRA; 10, 11, "
        "11 for DM-AT and 12, 15, 23 with DRA (table 3).",
        _extremes(rows, "robust_dimension", "needs most directions under attack", max),
    )


# -- frequencies -----------------------------------------------------------------------------------
def of_frequency(seen: Sequence[Seen], reference: Seen | None = None) -> Analysis:
    """Spectra of adversarial perturbations and of input gradients (figures 3a and 10), and the
    difference maps of each model to the first one (log2 of the power's ratio).
    """
    rows: list[Row] = []
    curves: dict[str, dict[str, list[float]]] = {}
    first: dict[str, frequency.Spectrum] = {}
    for each in seen:
        assert each.perturbation is not None
        assert each.gradient is not None
        row: Row = {"model": each.name}
        curves[each.name] = {}
        for what, maps in (("perturbation", each.perturbation), ("gradient", each.gradient)):
            found = frequency.spectrum(maps)
            row |= {f"{what}_{band}": getattr(found, band) for band in ("low", "mid", "high")}
            curves[each.name][what] = found.radial
            curves[each.name][f"{what}_2d"] = found.power.flatten().tolist()
            if what in first:
                ratio = frequency.log_ratio(first[what], found)
                curves[each.name][f"{what}_over_first"] = ratio.flatten().tolist()
            first.setdefault(what, found)
        rows.append(row | each.accuracies)
    return Analysis(
        "frequency",
        "Spatial frequencies that the model heeds",
        rows,
        curves,
        "Diffusion features heed high frequencies less than a standard model's, like robust "
        "models; DRA lowers the sensitivity to low ones, a noisy classifier's features as targets "
        "raise that to middle and high ones (figures 3a and 10).",
        _extremes(
            rows, "gradient_high", "has least of its gradients' power in high frequencies", min
        ),
    )


# -- sparse autoencoders ---------------------------------------------------------------------------
SAE_SEEDS = 3
HELD_OUT = 5  # one image in so many is not learnt from
WIDER = 8  # latents per feature
LATENTS = (4, 8, 16, 32, 64, 128)  # that an autoencoder may use at a time


def of_sae(
    seen: Sequence[Seen],
    reference: Seen | None = None,
    steps: int = 1000,
    kept: Kept = models.NOTHING_KEPT,
) -> Analysis:
    """Error of TopK autoencoders on features that they have not seen, by k (figure 6): the mean and
    the spread over training seeds. Features of all models are scaled to a mean square of 1.
    """
    rows: list[Row] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for each in seen:
        width = each.features.shape[1]
        curves[each.name] = {"k": [], "error": [], "deviation": []}
        for settings in autoencoders(width, steps):
            found = autoencoded(each.features, settings, kept)
            errors = np.array([quality.error for quality in found])
            dead = np.mean([quality.dead for quality in found])
            row = {"model": each.name, "k": settings.k, "error": float(errors.mean())}
            rows.append(row | {"deviation": float(errors.std(ddof=1)), "dead": float(dead)})
            for column in ("k", "error", "deviation"):
                curves[each.name][column].append(rows[-1][column])
    most = [row for row in rows if row["k"] == max(row["k"] for row in rows)]
    return Analysis(
        "sae",
        "Error of sparse autoencoders",
        rows,
        curves,
        "Synthetic images and DRA both lower the error: features become easier to take apart into "
        "sparse ones (figure 6).",
        _easiest(most),
    )


def _easiest(rows: Sequence[Row]) -> str:
    """Of rows of one k; models that are no further apart than training seeds are not told apart."""
    words = f"is easiest to rebuild from {rows[0]['k']} latents"
    best, *others = sorted(rows, key=lambda row: row["error"])
    alike = [
        row
        for row in others
        if row["error"] - best["error"] <= max(best["deviation"], row["deviation"])
    ]
    if not alike:
        return _extremes(rows, "error", words, min)
    names = ", ".join(row["model"] for row in alike)
    return (
        f"{best['model']} {words} ({best['error']:.3g}), but no more than training seeds "
        f"deviate before {names}."
    )


def autoencoders(width: int, steps: int) -> list[sae.Settings]:
    """Of features of that width: fewer and more latents at a time."""
    most = max(width // 2, LATENTS[0])
    return [sae.Settings(k, WIDER * width, steps) for k in LATENTS if k <= most]


def autoencoded(features: Tensor, settings: sae.Settings, kept: Kept) -> list[sae.Quality]:
    """One autoencoder for each seed, judged on the images that none has learnt from."""
    name = f"sae-{identity(features, dataclasses.asdict(settings), HELD_OUT, SAE_SEEDS)}"
    found = kept.value(
        name, lambda: [dataclasses.asdict(each) for each in _trained(features, settings)]
    )
    return [sae.Quality(**each) for each in found]


def _trained(features: Tensor, settings: sae.Settings) -> list[sae.Quality]:
    apart = torch.arange(len(features)) % HELD_OUT == 0
    learnt = features[~apart].float()
    scale = learnt.square().mean().sqrt().clamp_min(1e-30)
    return [
        sae.quality(sae.train(learnt / scale, settings, seed), features[apart].float() / scale)
        for seed in range(SAE_SEEDS)
    ]


# -- a head on a frozen teacher --------------------------------------------------------------------
def of_probe(curves: Sequence[Curve]) -> Analysis:
    """Accuracy within growing radii (figure 3b): of a head on a teacher, of classifiers beside it,
    and of the head with fresh noise as plain PGD and as EOT find it (appendix C).
    """
    rows = [
        {"model": curve.name}
        | {f"eps_{eps:g}": found for eps, found in zip(EPS_255, curve.accuracies, strict=True)}
        for curve in curves
    ]
    last = [curve.accuracies[-1] for curve in curves if ", fresh noise" in curve.name]
    return Analysis(
        "probe",
        "A head on the frozen teacher, under attack",
        rows,
        {curve.name: {"accuracy": curve.accuracies} for curve in curves},
        "A head on a frozen diffusion encoder withstands small radii better than a standard model "
        "and far fewer than a robust one; what randomness seemed to add, 46.0 % under plain "
        "AutoAttack, falls to 17.3 % under EOT (figure 3b, appendix C).",
        f"With fresh noise it has {last[0]:.1%} within {EPS_255[-1]:g}/255 by PGD whose gradients "
        f"see one draw, {last[-1]:.1%} where they average over draws.",
    )


def of_heads(found: Sequence[models.Verdict]) -> Analysis:
    """AutoAttack on heads on a teacher (appendix C): what randomness seems to add under the plain
    version, and what is left of it where gradients are averaged over passes.
    """
    fresh = [each.robust_accuracy for each in found if "fresh" in each.head]
    return Analysis(
        "heads",
        "A head on the frozen teacher, under AutoAttack",
        [
            {"model": each.head, "version": each.version, "images": each.images}
            | {"clean_accuracy": each.clean_accuracy, "robust_accuracy": each.robust_accuracy}
            for each in found
        ],
        {},
        "A randomised head has 46.0 % under plain AutoAttack and 17.3 % where it is attacked by "
        "expectation over transformation (appendix C).",
        f"With fresh noise {fresh[0]:.1%} under the plain version, {fresh[-1]:.1%} under the one "
        "for randomised networks.",
    )


def _extremes(rows: Sequence[Row], column: str, words: str, best: Callable[..., Row]) -> str:
    if len(rows) < 2:
        return f"One model alone: {column.replace('_', ' ')} {rows[0][column]:.3g}."
    chosen = best(rows, key=lambda row: row[column])
    others = sorted((row[column] for row in rows if row is not chosen), reverse=best is max)
    if others[0] == chosen[column]:
        return f"Several models have the same {column.replace('_', ' ')}, {others[0]:.3g}: no best."
    return f"{chosen['model']} {words}: {chosen[column]:.3g}, the next {others[0]:.3g}."


# -- all of it -------------------------------------------------------------------------------------
OF_MODELS: Mapping[str, Callable[..., Analysis]] = {
    "geometry": of_geometry,
    "similarity": of_similarity,
    "dimension": of_dimension,
    "sae": of_sae,
    "frequency": of_frequency,
}
LONG = {"sae": "training sparse autoencoders"}  # what a user waits for, where it takes minutes


def analyse(
    what: str,
    given: Sequence[str],
    options: Options,
    how: models.How,
    *,
    neighbours: int = similarity.NEIGHBOURS,
    progress: Callable[[float, str], None] = lambda share, text: None,
    kept: Kept = models.NOTHING_KEPT,
) -> tuple[list[Analysis], dict[str, Any]]:
    """The analysis `what` of `config.catalogue.ANALYSES`, or all of them, of classifiers and at
    most one teacher, which stand in `given` in any order; and facts on how they were looked at.
    What is in `kept` is not computed again.

    Raises `ConfigError` for two teachers, none where `probe` needs one, no classifier, and models
    that are not seen on the same images within the same ball; beside that what `subjects.read`
    raises.
    """
    teacher, chosen = sort(what, given, options, how)
    names = [name for name in OF_MODELS if what in (name, "all")]
    if not teacher and len(chosen) < 2:
        names = [name for name in names if name != "similarity"]  # to nothing
    reference = None
    if teacher and names:
        progress(0.0, "looking at the teacher")
        reference = models.look_at_teacher(teacher, chosen[0].images, how)
    total = sum(len(each.images) for each in chosen)
    seen: list[Seen] = []
    for number, each in enumerate(chosen if names else []):
        before, text = number * len(each.images), f"attacking '{each.name}'"
        tell = functools.partial(_tell, progress, before, total, text)
        seen.append(models.look(each, how, tell, kept))
    more: dict[str, dict[str, Any]] = {
        "similarity": {"neighbours": neighbours},
        "sae": {"steps": how.sae_steps, "kept": kept},
    }
    found = []
    for name in names:
        progress(1.0, LONG.get(name, f"measuring {name}"))
        found.append(OF_MODELS[name](seen, reference, **more.get(name, {})))
    if teacher and what in ("probe", "all"):
        progress(1.0, "attacking a head on the teacher")
        numbers = range(models.curve_count(chosen))
        curves = [models.curve(teacher, chosen, how, number, kept) for number in numbers]
        found.append(of_probe(curves))
        if how.autoattack_images:
            progress(1.0, "AutoAttack on a head on the teacher")
            found.append(of_heads(models.heads_under_autoattack(teacher, chosen[0], how, kept)))
    threat = chosen[0].experiment.threat
    facts: dict[str, Any] = {
        "images": len(chosen[0].images),
        "PGD steps": how.steps,
        "eps": f"{threat.eps_255:g}/255 {threat.norm}",
        "seed": how.seed,
    }
    if teacher:
        facts |= {"teacher": teacher, "sigma": how.sigma, "layer": how.layer}
    return found, facts


def _tell(
    progress: Callable[[float, str], None], before: int, total: int, text: str, done: int
) -> None:
    progress((before + done) / total, text)


def sort(
    what: str, given: Sequence[str], options: Options, how: models.How
) -> tuple[str | None, list[Subject]]:
    """The teacher among `given`, if there is one, and the classifiers; raises as `analyse` does."""
    teachers = [each for each in given if models.is_teacher(each)]
    if len(teachers) > 1:
        raise ConfigError(
            f"'{teachers[1]}' is a second teacher beside '{teachers[0]}'; give one at a time"
        )
    chosen = [models.subject(each, options, how) for each in given if each not in teachers]
    if not chosen:
        raise ConfigError(f"'{teachers[0]}' is a teacher; give a classifier beside it")
    if what == "probe" and not teachers:
        raise ConfigError("probe looks at a head on a teacher; give a teacher among the models")
    if what == "similarity" and len(given) < 2:
        raise ConfigError(f"similarity of '{given[0]}' to what? give a teacher or a second model")
    models.require_alike(chosen)
    return next(iter(teachers), None), chosen
