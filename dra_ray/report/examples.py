"""What fooled a classifier, to be seen: a few test images of an evaluation, clean, attacked, and
their difference.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dra_ray import config, data, runs
from dra_ray.errors import DataError, DraError
from dra_ray.evaluation.result import Threat
from dra_ray.storage import Store
from dra_ray.students import checkpoint

SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Example:
    """Test image number `index` of class `label`, and the first attack that fooled the classifier
    on it.

    clean, adversarial: float [C,H,W] in [0,1]; predicted: the classes of both, None where the
    classifier cannot be loaded.
    """

    index: int
    label: str
    attack: str
    clean: Tensor
    adversarial: Tensor
    predicted: tuple[str, str] | None


def find(run: Store, evaluation: Store, threat: Threat) -> list[Example]:
    """Examples from the files of `evaluation`, with clean images and predictions by the config and
    weights of the training run.

    They are the first fooled image of each class, and then further ones, up to `SHOWN`; none when
    no attack fooled anyone. `threat` tells whether the clean images can be
    those that were attacked. Raises a `DraError` that says what is missing, or that does not fit.
    """
    verdicts = (evaluation / "per_sample.npz").read_npz()
    if not {"first_failure", "labels"} <= set(verdicts):
        raise DataError(
            f"'{evaluation / 'per_sample.npz'}' does not say which attack fooled which image; run "
            "the evaluation again"
        )
    chosen = choose(verdicts["first_failure"], verdicts["labels"])
    adversarial = _adversarial(evaluation / "adversarial.npz", chosen)
    settings = _settings(run).data
    clean = _clean(settings, chosen, verdicts["labels"])
    if clean.shape != adversarial.shape or not _within(adversarial - clean, threat):
        raise DataError(_OTHERS.format(settings.name))
    names = [_class(settings, int(verdicts["labels"][index])) for index in chosen]
    seen = [_class(settings, label) for label in _predict(run, torch.cat([clean, adversarial]))]
    pairs = (
        zip(seen[: len(chosen)], seen[len(chosen) :], strict=True) if seen else [None] * len(chosen)
    )
    attacks = [str(verdicts["first_failure"][index]) for index in chosen]
    return [
        Example(*facts)
        for facts in zip(chosen, names, attacks, clean, adversarial, pairs, strict=True)
    ]


_OTHERS = (
    "the test images of '{}' found now are not those that were attacked; check data.uri, or "
    "whether other images were given to the evaluation"
)


def choose(first_failure: np.ndarray, labels: np.ndarray) -> list[int]:
    """Positions of the first image of each class that an attack fooled, then of further ones, up to
    `SHOWN`; ascending.
    """
    fooled = [
        index
        for index, failure in enumerate(first_failure.tolist())
        if failure not in ("", "clean")
    ]
    first: dict[int, int] = {}
    for index in fooled:
        first.setdefault(int(labels[index]), index)
    return sorted(list(dict.fromkeys([*first.values(), *fooled]))[:SHOWN])


def amplification(examples: list[Example]) -> int:
    """The largest whole factor at which no shown difference leaves the range of brightness around
    grey; 1 where there is none.
    """
    largest = max(float((example.adversarial - example.clean).abs().max()) for example in examples)
    return max(1, int(0.5 / largest)) if largest else 1


def difference(example: Example, factor: int) -> Tensor:
    """`factor` times the change, around grey: float [C,H,W]."""
    return 0.5 + factor * (example.adversarial - example.clean)


def png(image: Tensor) -> bytes:
    """float [C,H,W] (C 1 or 3), cut to [0,1]."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _adversarial(file: Store, chosen: list[int]) -> Tensor:
    """Of a file that lies uncompressed on this machine only the chosen images are read: ImageNet's
    has 3 GB.
    """
    if not file.exists():
        raise DataError(f"'{file}' is not there; run the evaluation again")
    stored = file.npz_arrays() if file.is_local else None
    arrays = {name: array.map() for name, array in stored.items()} if stored else file.read_npz()
    if (
        "images" not in arrays
        or arrays["images"].ndim != 4
        or len(arrays["images"]) <= max(chosen, default=-1)
    ):
        raise DataError(f"'{file}' does not hold the attacked images; run the evaluation again")
    return torch.from_numpy(np.array(arrays["images"][chosen], dtype=np.float32))


def _clean(settings: config.Data, chosen: list[int], labels: np.ndarray) -> Tensor:
    """The test images at `chosen`, float [n,C,H,W], if the test set has the `labels` that were
    attacked.
    """
    test = data.load(settings).test
    if not torch.equal(test.labels, torch.from_numpy(labels.astype(np.int64))):
        raise DataError(_OTHERS.format(settings.name))
    return data.to_float(test.take(torch.tensor(chosen, dtype=torch.int64))[0])


def _within(change: Tensor, threat: Threat) -> bool:
    """Whether changes [n,C,H,W] lie in the ball, but for rounding; so if no ball is known."""
    if threat.eps_255 is None or not len(change):
        return True
    order = 2.0 if threat.norm == "l2" else float("inf")
    return bool(
        torch.linalg.vector_norm(change.flatten(1), order, 1).max()
        <= 1.001 * threat.eps_255 / 255 + 1e-5
    )


def _settings(run: Store) -> config.Experiment:
    manifest = runs.read_manifest(run)
    if manifest is None or manifest.kind != "train":
        raise DataError(
            f"'{run}' is not a training run, so nothing says which images were attacked"
        )
    return config.validate(config.Experiment, manifest.config, str(run / runs.MANIFEST))


def _predict(run: Store, images: Tensor) -> list[int]:
    """Classes of images float [n,C,H,W]; none without the classifier, so that a report can be made
    where its weights are not.
    """
    try:
        student, _ = checkpoint.load(run)
    except DraError:
        return []
    with torch.no_grad():
        return [int(label) for label in student(images).argmax(1)]


def _class(settings: config.Data, label: int) -> str:
    names = settings.known.class_names
    return names[label] if names else f"class {label}"
