"""What analyses see of a model, with the same images for all: features, attacks, gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray import config, data
from dra_ray.attacks.autoattack import single_process
from dra_ray.attacks.pgd import frozen, noise_like, strongest
from dra_ray.attacks.plan import Settings
from dra_ray.config import networks
from dra_ray.config.catalogue import STANDARD, Effort
from dra_ray.data.random import Stream, generator
from dra_ray.errors import ConfigError, DataError
from dra_ray.evaluation import subjects
from dra_ray.evaluation.subjects import Options, Subject
from dra_ray.inspection import frozen as frozen_probe
from dra_ray.inspection.kept import Kept, identity
from dra_ray.inspection.probe import encode
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.cards import CARD
from dra_ray.teachers.network import Network
from dra_ray.teachers.source import LocalTeacher

BATCH = 250
NOTHING_KEPT = Kept()


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of one model on N images.

    Attributes:
        name: as it was given.
        features: [N,D] that the last linear layer sees, or a teacher's.
        adversarial: the same of the model's own adversarial images; None of a teacher.
        perturbation: [N,C,H,W], adversarial less clean images; gradient: of the cross-entropy on
            clean images; both None of a teacher.
        correct, withstood: bool [N], on clean and on adversarial images; None of a teacher.
        labels: int64 [N]; weight, bias: of the last linear layer.
    """

    name: str
    features: Tensor
    adversarial: Tensor | None = None
    perturbation: Tensor | None = None
    gradient: Tensor | None = None
    correct: Tensor | None = None
    withstood: Tensor | None = None
    labels: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def accuracies(self) -> dict[str, float]:
        """`clean_accuracy` and `robust_accuracy`; nothing of a teacher."""
        if self.correct is None or self.withstood is None:
            return {}
        return {
            "clean_accuracy": float(self.correct.double().mean()),
            "robust_accuracy": float(self.withstood.double().mean()),
        }


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracies (fractions) within the radii `frozen.EPS_255`, of the model `name`."""

    name: str
    accuracies: list[float]


def is_teacher(what: str) -> bool:
    """Whether `what` is a teacher's folder, or package:NAME."""
    if what.startswith("package:"):
        return True
    return networks.is_place(what) and (Store(what) / CARD).is_file()


@dataclasses.dataclass(frozen=True)
class How:
    """How models are looked at.

    Attributes:
        images: of the test set, the first so many.
        steps: of PGD on the cross-entropy, from one random start, with steps of a quarter of eps.
        sigma, layer: of teachers; label null.
        seed: of the attack's start and of a teacher's noise.
        threads: of a teacher.
        head_images: training images that a head on a teacher is fitted to.
        sae_steps: training steps of a sparse autoencoder.
        autoattack_images: the first so many, on which heads on a teacher are judged by AutoAttack.
        effort: of AutoAttack.
    """

    images: int = 1000
    steps: int = 20
    sigma: float = 0.06
    layer: str | None = None
    seed: int = 0
    threads: int = 1
    head_images: int = 2000
    sae_steps: int = 1000
    autoattack_images: int = 0
    effort: Effort = STANDARD


def asked(settings: config.Analysis, threads: int = 1) -> tuple[Options, How]:
    """What `settings` ask for: of the models, and of the looks at them."""
    options = Options(
        settings.settings,
        settings.eps_255,
        settings.norm,
        weights=settings.weights,
        architecture=settings.architecture,
    )
    how = How(
        settings.images,
        settings.steps,
        settings.sigma,
        settings.layer,
        settings.seed,
        threads,
        sae_steps=settings.sae_steps,
        autoattack_images=settings.autoattack,
    )
    return options, how


def subject(what: str, options: Options, how: How) -> Subject:
    """A classifier with the images that it is looked at on; raises as `subjects.read` does."""
    found = subjects.read(what, dataclasses.replace(options, to=options.to or Store(".")))
    return dataclasses.replace(
        found, images=found.images[: how.images], labels=found.labels[: how.images]
    )


def require_alike(models: Sequence[Subject]) -> None:
    """`ConfigError` where models are not looked at on the same images within the same ball."""
    first = models[0]
    for other in models[1:]:
        if first.images.shape != other.images.shape or not torch.equal(first.images, other.images):
            raise ConfigError(
                f"'{first.name}' and '{other.name}' have other test images; give models of one "
                "data set, or --set name=... --set resolution=..."
            )
        ours, theirs = (
            (one.experiment.threat.norm, one.experiment.threat.eps_255) for one in (first, other)
        )
        if ours != theirs:
            raise ConfigError(
                f"'{first.name}' is attacked within {ours[1]:g}/255 ({ours[0]}) and "
                f"'{other.name}' within {theirs[1]:g}/255 ({theirs[0]}); give --eps-255 and --norm"
            )


def look(
    found: Subject,
    how: How,
    progress: Callable[[int], None] | None = None,
    kept: Kept = NOTHING_KEPT,
) -> Seen:
    """At a classifier: its features of clean images and of its own adversarial ones, with gradients
    on the way, batch by batch as far as they are not kept. `progress` is told how many images are
    done.

    Raises `ConfigError` for a classifier without a linear layer.
    """
    last, key = _last(found.student), seen_key(found, how)
    batches = []
    for number in range(batch_count(found)):
        batches.append(look_at_batch(found, how, number, kept, key))
        if progress:
            progress(min((number + 1) * BATCH, len(found.images)))
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return Seen(
        found.name,
        **columns,
        labels=found.labels,
        weight=last.weight.detach(),
        bias=None if last.bias is None else last.bias.detach(),
    )


def batch_count(found: Subject) -> int:
    return -(-len(found.images) // BATCH)


def width(found: Subject) -> int:
    """Of its features; `ConfigError` for a classifier without a linear layer."""
    return _last(found.student).in_features


def kept_features(key: str, batches: int, kept: Kept) -> Tensor:
    """The features [N,D] of clean images that `look_at_batch` has kept under `key`; `DataError`
    where one of them is not there.
    """

    def missing() -> Mapping[str, Tensor]:
        raise DataError(f"'{kept.store}' lacks a batch of {key}; repeat the command to make it")

    names = (batch_name(key, number) for number in range(batches))
    return torch.cat([kept.tensors(name, missing)["features"] for name in names])


def seen_key(found: Subject, how: How) -> str:
    """Names what `look` sees of a classifier: its weights, the images, and the attack."""
    threat = found.experiment.threat.model_dump(mode="json", include={"norm", "eps_255"})
    code = found.source.get("code")
    return identity(found.student, found.images, found.labels, threat, how.steps, how.seed, code)


def batch_name(key: str, number: int) -> str:
    return f"seen-{key}/batch-{number:05d}"


def look_at_batch(
    found: Subject, how: How, number: int, kept: Kept, key: str
) -> Mapping[str, Tensor]:
    """Of batch `number` the columns of `Seen`, from `kept` where they are there."""

    def attack() -> dict[str, Tensor]:
        threat, student, last = found.experiment.threat, found.student, _last(found.student)
        rows = slice(number * BATCH, (number + 1) * BATCH)
        noise = _starts(found.images.shape, threat, how.seed)[rows]
        x, y = found.images[rows], found.labels[rows]
        with frozen(student):
            with torch.no_grad():
                attacked = strongest(student, x, y, threat, noise, how.steps)
                logits, features = observed(student, last, x)
                under_attack, moved = observed(student, last, attacked)
            gradient = _gradient(student, x, y)
        return {
            "features": features,
            "adversarial": moved,
            "perturbation": attacked - x,
            "gradient": gradient,
            "correct": logits.argmax(1) == y,
            "withstood": under_attack.argmax(1) == y,
        }

    return kept.tensors(batch_name(key, number), attack)


@functools.lru_cache(maxsize=1)  # of all images, whose batches follow each other
def _starts(shape: torch.Size, threat: config.Threat, seed: int) -> Tensor:
    """Where the attack on each image starts, from one draw for all."""
    return noise_like(shape, threat, generator(seed, Stream.ANALYSIS))


def _gradient(student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        inputs = x.clone().requires_grad_(True)
        loss = F.cross_entropy(student(inputs), labels, reduction="sum")
        return torch.autograd.grad(loss, inputs)[0]


def _last(student: nn.Module) -> nn.Linear:
    layers = [module for module in student.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"{type(student).__name__} has no linear layer, so it is not known what its features "
            "are; give a classifier that ends in torch.nn.Linear"
        )
    return layers[-1]


def observed(student: nn.Module, last: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """A batch's (logits, input of the last linear layer [B,D]). `ConfigError` where that layer
    takes no part in the forward pass, or sees more than one vector an image.
    """
    seen: list[Tensor] = []
    # for this pass alone: what it kept of an attack's passes would keep their graphs
    handle = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits: Tensor = student(x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != len(x):
        raise ConfigError(
            f"the last linear layer of {type(student).__name__} does not see one feature per "
            "image, so it is no classifier's head; give a classifier that ends in it"
        )
    return logits, seen[0]


# curves of a head on a teacher, which come before those of the classifiers: noise that is fresh in
# every pass, and passes that a gradient is averaged over
HEADS: tuple[tuple[bool, int | None], ...] = (
    (False, None),
    *((True, eot) for eot in frozen_probe.EOT),
)


def curve_count(chosen: Sequence[object]) -> int:
    """Of the heads on a teacher and so many classifiers."""
    return len(HEADS) + len(chosen)


def curve(
    what: str,
    chosen: Sequence[Subject],
    how: How,
    number: int,
    kept: Kept = NOTHING_KEPT,
    radii_255: Sequence[float] = frozen_probe.EPS_255,
) -> Curve:
    """Accuracy by radius: curve `number` of those of a head on the teacher `what`, with one stored
    noise and with fresh noise, and of the classifiers `chosen`, all on the first one's images.

    Raises as `look_at_teacher` does, and `ConfigError` for a teacher that sees latents.
    """
    if number >= len(HEADS):
        beside = chosen[number - len(HEADS)]
        return Curve(beside.name, _within(beside.student, beside, how, kept, radii_255))
    fresh, eot = HEADS[number]
    name = f"head on {what}" + (f", fresh noise, EOT {eot}" if fresh else "")
    head = _head(what, chosen[0].experiment.data, how, fresh)
    return Curve(name, _within(head, chosen[0], how, kept, radii_255, eot))


def _within(
    student: nn.Module,
    beside: Subject,
    how: How,
    kept: Kept,
    radii_255: Sequence[float],
    eot: int | None = None,
) -> list[float]:
    """Accuracies of `student` within radii, on a classifier's images; each is kept on its own."""
    threat = beside.experiment.threat.model_dump(mode="json", include={"norm", "eps_255"})
    given = beside.images, beside.labels

    def attack(radius_255: float) -> list[float]:
        with torch.random.fork_rng():
            torch.manual_seed(how.seed)
            return frozen_probe.by_radius(
                student,
                *given,
                beside.experiment.threat,
                [radius_255],
                steps=how.steps,
                eot=eot,
                seed=how.seed,
            )

    name = identity(student, *given, threat, how.steps, how.seed, eot)
    found: list[float] = []
    for radius in radii_255:
        found += kept.value(f"radius-{name}-{radius:g}", functools.partial(attack, radius))
    return found


@functools.lru_cache(maxsize=2)  # one with stored and one with fresh noise
def _head(what: str, images: config.Data, how: How, fresh: bool) -> frozen_probe.FrozenProbe:
    """A head on the teacher `what`, fitted to training images."""
    net, train = _net_and_training_images(what, images, how)
    return frozen_probe.train(net, train, how.sigma, how.layer, fresh=fresh, seed=how.seed)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of AutoAttack on a head: fractions of `images` images."""

    head: str
    version: str
    images: int
    clean_accuracy: float
    robust_accuracy: float


def heads_under_autoattack(
    what: str, beside: Subject, how: How, kept: Kept = NOTHING_KEPT
) -> list[Verdict]:
    """AutoAttack within a classifier's ball on heads on a teacher: with one stored noise, and with
    fresh noise in every pass as the plain version finds it and as the one for randomised networks
    does, which averages gradients over passes. Raises as `curve` does.
    """
    count = how.autoattack_images
    images, labels = beside.images[:count], beside.labels[:count]
    threat, found = beside.experiment.threat, []
    for fresh, version in ((False, "standard"), (True, "standard"), (True, "rand")):
        head = _head(what, beside.experiment.data, how, fresh)
        settings = Settings(
            threat=threat, seed=how.seed, effort=how.effort, version=version, level="fast"
        )

        def judged(head: nn.Module = head, settings: Settings = settings) -> list[float]:
            with torch.random.fork_rng():
                torch.manual_seed(how.seed)
                plan = single_process(head, images, labels, settings, batch=BATCH)
            clean = sum(failure != "clean" for failure in plan.first_failure)
            return [clean / len(labels), float(plan.alive.double().mean())]

        ball = threat.model_dump(mode="json", include={"norm", "eps_255"})
        effort = dataclasses.asdict(how.effort)
        name = identity(head, images, labels, ball, effort, version, how.seed)
        clean, robust = kept.value(f"autoattack-{name}", judged)
        noise = "fresh noise" if fresh else "one stored noise"
        found.append(Verdict(f"head on {what}, {noise}", version, len(labels), clean, robust))
    return found


def _net_and_training_images(
    what: str, images: config.Data, how: How
) -> tuple[Network, data.Split]:
    """The teacher, and what a head on it is fitted to."""
    settings = config.validate(config.Teacher, {"uri": what, "layer": how.layer}, "teacher")
    assert settings.uri
    train = data.load(images).train[: how.head_images]
    return checkpoint.load(Store(settings.uri)), data.in_memory(train)


def look_at_teacher(what: str, images: Tensor, how: How) -> Seen:
    """At a teacher's pooled features of images float [N,C,H,W] in [0,1], with the same noise for
    image i in every call. Raises `DataError` for images that it does not take, `ConfigError` for a
    layer or noise level that it does not have.
    """
    settings = config.validate(
        config.Teacher, {"uri": what, "label": "null", "layer": how.layer}, "teacher"
    )
    assert settings.uri
    source = LocalTeacher(checkpoint.load(Store(settings.uri)), settings, how.threads)
    pixels = (images * 255).round().to(torch.uint8)
    unlabelled = data.Split(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    return Seen(what, encode(source, unlabelled, how.sigma, how.seed))
