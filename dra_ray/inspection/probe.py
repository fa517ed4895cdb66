"""Linear probes: how much of the class a frozen feature holds, by layer and noise level (Xiang et
al. 2023, arXiv 2303.09769).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from dra_ray import config, data
from dra_ray.data import Split
from dra_ray.errors import ConfigError, DataError
from dra_ray.teachers.network import Network
from dra_ray.teachers.source import LocalTeacher, Request

FLAT = 1e-8  # deviation below which a feature says nothing


def probe(
    features_train: Tensor,
    labels_train: Tensor,
    features_test: Tensor,
    labels_test: Tensor,
    c: float = 1.0,
) -> float:
    """Test accuracy of multinomial logistic regression on standardised features [N,D] with labels
    int64 [N].

    `c` is the inverse strength of its L2 penalty. A pure function: there is nothing random in it.
    Raises `DataError` for sizes that do not fit, values that are not finite, and training labels of
    one class only.
    """
    _check(features_train, labels_train, features_test, labels_test)
    model, mean, scale = _regression(features_train, labels_train, c)
    with threadpool_limits(1, "blas"):
        found = model.predict((features_test.double().numpy() - mean) / scale)
    return float((found == labels_test.numpy()).mean())


@dataclasses.dataclass(frozen=True)
class Head:
    """logits [B,K] = weight [K,D] (feature - mean [D]) / scale [D] + bias [K], float32."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor


def fitted(features: Tensor, labels: Tensor, c: float = 1.0) -> Head:
    """The head that `probe` judges, for classes 0 .. K-1; raises as `probe` does, and `DataError`
    where one of fewer than three classes has no image.
    """
    _check(features, labels, features, labels)
    model, mean, scale = _regression(features, labels, c)
    if len(model.classes_) < 3 or list(model.classes_) != list(range(len(model.classes_))):
        raise DataError(
            f"probe: the labels are of classes {list(model.classes_)}; pass images of each class "
            "from 0 on, at least three"
        )
    arrays = model.coef_, model.intercept_, mean, scale
    return Head(*(torch.from_numpy(np.asarray(array)).float() for array in arrays))


def _regression(
    features: Tensor, labels: Tensor, c: float
) -> tuple[LogisticRegression, np.ndarray, np.ndarray]:
    """The fit, and the mean and scale of the features that it was made on."""
    train = features.double().numpy()
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(deviation > FLAT, deviation, 1.0)
    # its products are small: on a busy machine of 2 cores a second thread made them 4 to 8 times
    # slower
    with threadpool_limits(1, "blas"):
        model = LogisticRegression(C=c, max_iter=5000)
        model.fit((train - mean) / scale, labels.numpy())
    return model, mean, scale


def _check(
    features_train: Tensor, labels_train: Tensor, features_test: Tensor, labels_test: Tensor
) -> None:
    for part, features, labels in (
        ("train", features_train, labels_train),
        ("test", features_test, labels_test),
    ):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise DataError(
                f"probe: {part} features are {list(features.shape)} and labels "
                f"{list(labels.shape)}; pass [N,D] and [N] with N at least 1"
            )
        if not bool(features.isfinite().all()):
            raise DataError(
                f"probe: {part} features are not all finite; check the teacher and its noise level"
            )
    if features_train.shape[1] != features_test.shape[1]:
        raise DataError(
            f"probe: features are {features_train.shape[1]} wide for training and "
            f"{features_test.shape[1]} for the test; use one layer"
        )
    if len(labels_train.unique()) < 2:
        raise DataError("probe: all training labels are equal; pass images of two classes or more")


def encode(source: LocalTeacher, images: Split, sigma: float, noise_seed: int = 0) -> Tensor:
    """Features [N,D] of `images` at one noise level, with the labels that `source.config` says.

    The noise of image i is always that of `noise_seed + i`. Raises `ConfigError` for a noise level
    that the network does not know.
    """
    levels = torch.full((len(images),), sigma)
    return source.encode(Request.seeded(images.images, images.labels, levels, noise_seed)).float()


FEW = 5  # layers that are probed where none is named
Row = dict[str, Any]


# -- what is probed --------------------------------------------------------------------------------
def data_of(card: Mapping[str, Any], settings: Sequence[str]) -> config.Data:
    """The data that a teacher's card names, with `settings` such as "uri=/data/cifar.tar.gz";
    `ConfigError` if neither names any.
    """
    named = card.get("data") or {}
    tree = {
        field: value
        for field, value in named.items()
        if field in config.Data.model_fields and value is not None
    }
    changes = config.parse_settings(list(settings))
    if "name" not in tree | changes:
        raise ConfigError(
            "the teacher's card does not say what it was trained on; pass --set name=cifar10 and "
            "the like"
        )
    if changes.get("name", tree.get("name")) != tree.get("name"):
        tree = {}
    return config.validate(config.Data, tree | changes, "data")


def some_layers(net: Network) -> list[str]:
    """The network's default layer and others at equal distances, in the order of computation: a
    large net has dozens.
    """
    names = list(net.layers())
    last = len(names) - 1
    places = {round(last * place / max(FEW - 2, 1)) for place in range(FEW - 1)}
    chosen = {names[place] for place in places} | {net.check_layer(None)}
    return [name for name in names if name in chosen]


def check_fits(net: Network, found: data.Images) -> None:
    net.check_classes(found.num_classes)
    if (net.channels, net.resolution) != (found.channels, found.resolution):
        raise ConfigError(
            f"the teacher sees {net.channels}x{net.resolution}x{net.resolution} images, but "
            f"'{found.name}' has "
            f"{found.channels}x{found.resolution}x{found.resolution}; pass --set name=... or --set "
            "resolution=..."
        )
    if not len(found.validation):
        raise ConfigError(
            "data.validation_images=0, but a probe is tested on held-out images; raise it"
        )


def first_images(pictures: data.Pictures, count: int) -> data.Split:
    return data.in_memory(pictures[: min(count, len(pictures))])
