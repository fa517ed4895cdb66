"""What alignment can teach with given targets: before any training, from their features alone.

A pooled diffusion feature can point nearly the same way for all images. Then a constant vector has
a small alignment loss, and the term says little or only the class. What is measured here says so:
pure functions of features [N,D] and labels [N], in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.data.random import Stream, generator
from dra_ray.errors import DataError
from dra_ray.inspection.geometry import (
    class_constant_loss,
    constant_loss,
    effective_dimension,
    mean_cosines,
    uniformity,
    units,
)
from dra_ray.inspection.probe import (
    Row,
    check_fits,
    data_of,
    encode,
    first_images,
    probe,
    some_layers,
)
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint, targets
from dra_ray.teachers.diffusion import LN_SIGMA_MEAN
from dra_ray.teachers.source import LocalTeacher

# Where alignment can teach little. Of `package:fashion-edm`, with which it did not help: a constant
# has a loss of 0.12 and features have 1.0 to 3.4 dimensions, at every layer (1,500 images)
SMALL_LOSS, FEW_DIMENSIONS = 0.2, 4.0
LEAK_ABOVE_CHANCE = 0.25  # share of the way from chance to 1 at which a given label shows
PIXELS_A_SIDE = 32  # larger images are reduced for their own probe
MOST_ROWS = 4000  # of tokens, of which each image has many
PER_CLASS = 5  # images of each class that a probe needs to say anything


def pixels(images: Tensor) -> Tensor:
    """Images uint8 [N,C,H,W] as features [N,D], at most `PIXELS_A_SIDE` pixels a side."""
    size = min(PIXELS_A_SIDE, images.shape[-1])
    return F.interpolate(data.to_float(images), size=(size, size), mode="area").flatten(1)


# -- a teacher's -----------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a teacher's features at one layer and noise level can teach.

    Attributes:
        width: of a feature.
        accuracy: of a linear probe on held-out training images; None with too few a class.
        within_cosine, between_cosine: mean cosine of images of one class, and of two.
        dimension, centred_dimension: see `effective_dimension`.
        leak: share of images whose random label, given to the teacher, a probe finds in the
            feature; None where the teacher is given none.
    """

    layer: str
    sigma: float
    width: int
    accuracy: float | None
    within_cosine: float
    between_cosine: float
    uniformity: float
    dimension: float
    centred_dimension: float
    constant_loss: float
    class_constant_loss: float
    leak: float | None = None

    def row(self, pixels_accuracy: float | None) -> Row:
        """For a table or JSON, without what is unknown."""
        row = dataclasses.asdict(self) | {"pixels_accuracy": pixels_accuracy}
        return {key: value for key, value in row.items() if value is not None}

    def warnings(self, pixels_accuracy: float | None, num_classes: int) -> list[str]:
        """In words, why alignment with these features may teach little; nothing where it may."""
        said = []
        if self.leak is not None and _above_chance(self.leak, num_classes) > LEAK_ABOVE_CHANCE:
            said.append(
                "the feature tells the label that the teacher was given (a probe finds "
                f"{self.leak:.0%} of random ones), so alignment teaches labels, and the probe's "
                "accuracy says nothing; set teacher.label=null"
            )
        elif (
            self.accuracy is not None
            and pixels_accuracy is not None
            and self.accuracy <= pixels_accuracy
        ):
            said.append(
                f"a linear probe of the feature finds {self.accuracy:.1%} of the classes, one of "
                f"raw pixels {pixels_accuracy:.1%}: the teacher knows no more than the image says; "
                "take another layer, noise level or teacher (`dra teacher probe`)"
            )
        spread = self.centred_dimension > 0.9 * self.width  # as whitening to few leaves them
        if self.centred_dimension < FEW_DIMENSIONS and not spread:
            said.append(
                f"features vary along {self.centred_dimension:.1f} of {self.width} directions; "
                "spread them with align.transform=whiten, or take another layer"
            )
        if self.constant_loss < SMALL_LOSS:
            said.append(
                f"a constant vector already has an alignment loss of {self.constant_loss:.3f}, so "
                "the term has little left to teach; set align.transform=centre or whiten"
            )
        return said


# columns that a screen has no room for
IN_FILES_ALONE = ("width", "within_cosine", "between_cosine", "dimension", "class_constant_loss")


def in_words(row: Row) -> str:
    """A row of `probe_teacher` on a line."""
    probed = f"{row['accuracy']:.2%}, " if "accuracy" in row else ""
    return f"{probed}{row['centred_dimension']:.1f} dimensions"


def _above_chance(accuracy: float, num_classes: int) -> float:
    chance = 1 / num_classes
    return (accuracy - chance) / (1 - chance)


def diagnose(
    source: LocalTeacher,
    train: data.Split,
    test: data.Split,
    sigma: float,
    noise_seed: int = 0,
    align: config.Align | None = None,
) -> Diagnosis:
    """Measure a teacher on `train`; its probe is judged on `test`. A pure function.

    With `align`, features are transformed as it says, by their statistics on `train`. Raises
    `ConfigError` for a noise level that the teacher does not know, `DataError` for images that it
    does not take.
    """
    if len(train) < 2:
        raise DataError(f"a diagnosis of {len(train)} images says nothing; give at least 2")

    answers = [encode(source, part, sigma, noise_seed) for part in (train, test)]
    return _of_targets(
        align or config.Align(),
        answers,
        (train.labels, test.labels),
        layer=source.layer,
        sigma=sigma,
        leak=_leak(source, train, test, sigma),
    )


def _of_targets(
    align: config.Align, answers: Sequence[Tensor], labels: tuple[Tensor, Tensor], **known: Any
) -> Diagnosis:
    """Of what a teacher answers to training images and to held-out ones; of tokens a probe sees the
    mean, and all else each position.
    """
    learnt, held_out = (targets.untransformed(part, align) for part in answers)
    transform = targets.transform(align, learnt.shape[-1])
    if isinstance(transform, targets.Transform):
        transform.fit(targets.Statistics.of(learnt))
    probed = [_pooled(part) for part in answers]
    if learnt.ndim == 2:
        probed = [transform(learnt), transform(held_out)]
    features, classes = _rows(transform(learnt), labels[0])
    within, between = mean_cosines(features, classes)
    return Diagnosis(
        **known,
        width=features.shape[1],
        accuracy=_probed(probed[0], labels[0], probed[1], labels[1]),
        within_cosine=within,
        between_cosine=between,
        uniformity=uniformity(features),
        dimension=effective_dimension(units(features)),  # the loss sees directions alone
        centred_dimension=effective_dimension(features, centred=True),
        constant_loss=constant_loss(features),
        class_constant_loss=class_constant_loss(features, classes),
    )


def _pooled(features: Tensor) -> Tensor:
    """[N,D], of maps [N,D,h,w] the mean over positions."""
    return features.flatten(2).mean(2) if features.ndim == 4 else features


def _rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N,D] and their labels; of tokens [N,P,D] some rows, evenly spaced."""
    if features.ndim == 2:
        return features, labels
    rows, classes = features.flatten(0, 1), labels.repeat_interleave(features.shape[1])
    some = torch.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).long()
    return rows[some], classes[some]


def _probed(features: Tensor, labels: Tensor, held_out: Tensor, truth: Tensor) -> float | None:
    if len(labels) < PER_CLASS * len(labels.unique()) or not len(truth):
        return None
    return probe(features, labels, held_out, truth)


def _leak(source: LocalTeacher, train: data.Split, test: data.Split, sigma: float) -> float | None:
    """Labels drawn at random say nothing of the image: what a probe finds of them was given."""
    classes = source.net.num_classes
    if not classes or source.config.label == "null":
        return None
    parts = [
        data.Split(
            part.images,
            torch.randint(classes, (len(part),), generator=generator(seed, Stream.LABEL_LEAK)),
        )
        for seed, part in enumerate((train, test))
    ]
    features = [_pooled(encode(source, part, sigma)) for part in parts]
    return _probed(features[0], parts[0].labels, features[1], parts[1].labels)


def pixels_accuracy(train: data.Split, test: data.Split) -> float | None:
    """Accuracy of a linear probe of the images themselves: what a teacher's must be above."""
    return _probed(pixels(train.images), train.labels, pixels(test.images), test.labels)


SIGMAS = (0.02, 0.06, 0.14, 0.3)  # around DDAE's best for EDM on CIFAR-10 (arXiv 2303.09769)


def probe_teacher(
    teacher: Store,
    settings: Sequence[str] = (),
    sigmas: Sequence[float] = SIGMAS,
    layers: Sequence[str] = (),
    images: int = 2000,
    *,
    label: str = "null",
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """A row per layer and noise level, as it is measured: a `Diagnosis`, and as "pixels_accuracy"
    that of a probe of the images themselves.

    A linear probe on features of `images` training images, tested on as many of the held-out
    training images (the test images are for evaluation alone). `layers` are by default a few
    (`some_layers`); "all" alone stands for each. With `label` "true" the teacher is given the
    class, which leaks the answer: a bound on what its label says, no measure of the feature.
    """
    net = checkpoint.load(teacher)
    loaded = data.load(data_of(checkpoint.read_card(teacher), settings))
    check_fits(net, loaded)
    chosen = (
        list(net.layers())
        if list(layers) == ["all"]
        else [net.check_layer(layer) for layer in layers] or some_layers(net)
    )
    total = len(chosen) * len(sigmas)
    if progress:
        progress(0, total)
    for sigma in sigmas:
        net.check_sigma(torch.tensor([sigma]))
    train, test = first_images(loaded.train, images), first_images(loaded.validation, images)
    floor = pixels_accuracy(train, test)
    for done, (layer, sigma) in enumerate(itertools.product(chosen, sigmas), start=1):
        settled = config.validate(config.Teacher, {"label": label, "layer": layer}, "probe")
        source = LocalTeacher(net, settled, threads, device)
        row = diagnose(source, train, test, sigma, seed).row(floor)
        if progress:
            progress(done, total)
        yield row


def teacher_statistics(
    teacher: Store,
    settings: Sequence[str],
    options: config.Teacher,
    align: config.Align,
    *,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
) -> tuple[list[Row], list[Row]]:
    """(variance along the first directions, what each transform gives) of a teacher's targets, by
    the statistics that a run with `options` and `align` measures.

    The first table's rows have "directions", and the share of the "variance" along so many; the
    second's are diagnoses of the images measured, with "transform".
    """
    net = checkpoint.load(teacher)
    loaded = data.load(data_of(checkpoint.read_card(teacher), settings))
    check_fits(net, loaded)
    source = LocalTeacher(net, options, threads, device)
    request = targets.request(loaded.train, align.sigma, align.statistics_images, seed)
    held_out = first_images(loaded.validation, len(request))
    answers = [
        torch.cat(list(targets.answers(source, request))),
        encode(source, held_out, align.sigma, seed),
    ]
    labels = request.labels, held_out.labels
    rows = []
    for name in typing.get_args(config.Align.model_fields["transform"].annotation):
        chosen = config.override(align, {"transform": name})
        diagnosis = _of_targets(chosen, answers, labels, layer=source.layer, sigma=align.sigma)
        rows.append({"transform": name} | diagnosis.row(None))
    measured = targets.Statistics.of(targets.untransformed(answers[0], align))
    return _variance(measured), rows


def _variance(statistics: targets.Statistics) -> list[Row]:
    """Share of the variance along 1, 2, 4, ... directions, and along all."""
    variances = statistics.spectrum()[0]
    shares = variances.cumsum(0) / variances.sum().clamp_min(1e-300)
    counts = [2**power for power in range(len(shares).bit_length()) if 2**power < len(shares)]
    return [
        {"directions": count, "variance": float(shares[count - 1])}
        for count in (*counts, len(shares))
    ]


# -- before a run ----------------------------------------------------------------------------------
CHECKED_IMAGES = 400  # of training, and as many held-out: a probe's standard error is 2 points
CHECKED_TARGETS = 4  # of a sweep, which may have many
CHECK_S = (
    30.0  # a teacher that takes longer for them on this machine is left to `dra teacher probe`
)


@dataclasses.dataclass(frozen=True)
class Check:
    """What there is to say before aligned runs: a row per target, and warnings in words."""

    rows: list[Row]
    warnings: list[str]


def check(experiments: Sequence[config.Experiment], threads: int = 1, device: str = "cpu") -> Check:
    """Diagnose the targets of runs of one data set, on a few hundred of its images.

    At most `CHECKED_TARGETS` different ones, and none whose teacher would take longer than
    `CHECK_S` seconds on this machine, which a warning says. Raises what `diagnose` raises.
    """
    chosen = {_key(target): target for e in experiments if e.teacher.uri for target in _targets(e)}
    result = Check([], [])
    if not chosen:
        return result
    images = data.load(next(iter(chosen.values())).data)
    train, test = (first_images(part, CHECKED_IMAGES) for part in (images.train, images.validation))
    floor = pixels_accuracy(train, test)
    for target in list(chosen.values())[:CHECKED_TARGETS]:
        diagnosis = _checked(target, train, test, threads, device)
        if isinstance(diagnosis, str):
            result.warnings.append(diagnosis)
            continue
        result.rows.append(diagnosis.row(floor))
        where = f"{diagnosis.layer} at sigma {diagnosis.sigma:g}"
        result.warnings.extend(
            f"{where}: {line}" for line in diagnosis.warnings(floor, images.num_classes)
        )
    return result


def told(experiments: Sequence[config.Experiment]) -> list[str]:
    """What `check` finds in lines for a log, one for each target and each warning; none where no
    run aligns.
    """
    found = check(experiments, threads=os.cpu_count() or 1)
    lines = []
    for row in found.rows:
        floor = f" (raw pixels {row['pixels_accuracy']:.2%})" if "pixels_accuracy" in row else ""
        where = f"{row['layer']} at sigma {row['sigma']:g}"
        lines.append(f"targets: {where}: probe {in_words(row)}{floor}")
    return lines + [f"warning: targets: {line}" for line in found.warnings]


@dataclasses.dataclass(frozen=True)
class _Target:
    teacher: config.Teacher
    sigma: float
    align: config.Align
    data: config.Data
    seed: int


def _targets(experiment: config.Experiment) -> Iterator[_Target]:
    """One for each term; a drawn noise level stands for its median."""
    align, median = experiment.align, math.exp(LN_SIGMA_MEAN)
    for term, teacher in zip(align.targets, experiment.teachers, strict=False):
        sigma = median if term.sigma is None else term.sigma
        yield _Target(teacher, sigma, align, experiment.data, experiment.shared_seed)


def _key(target: _Target) -> tuple[object, ...]:
    """Equal for the same features with the same transform."""
    align = target.align
    return target.teacher, target.sigma, align.transform, align.whiten_dim, align.spatial_norm


def _checked(
    target: _Target, train: data.Split, test: data.Split, threads: int, device: str
) -> Diagnosis | str:
    """The diagnosis, or why there is none."""
    assert target.teacher.uri
    net = checkpoint.load(Store(target.teacher.uri))
    source = LocalTeacher(net, target.teacher, threads, device)
    needed_s = _seconds(source, len(train) + len(test))
    if needed_s > CHECK_S:
        return (
            f"the teacher's features were not looked at, which would take {needed_s:.0f} s on this "
            f"machine; see `dra teacher probe {target.teacher.uri} --sigmas {target.sigma:g}`"
        )
    return diagnose(source, train, test, target.sigma, target.seed, target.align)


def _seconds(source: LocalTeacher, images: int) -> float:
    """How long the teacher will take for so many images, by its first micro-batch."""
    begun_s = time.monotonic()
    source.encode(source.sample())
    passes = 2 if source.net.num_classes and source.config.label == "true" else 1
    return passes * images / source.micro_batch * (time.monotonic() - begun_s)
