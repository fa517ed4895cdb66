"""What a set of canonical samples is like."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from dra_ray import data, runs
from dra_ray.config import Canonical, validate
from dra_ray.errors import DataError
from dra_ray.inspection.clusters import agreement
from dra_ray.storage import Store

JUDGED = 5000  # images at most that k-means sees


@dataclasses.dataclass(frozen=True)
class Shown:
    """Of a set.

    Attributes:
        images: canonical samples.
        accepted: share that the set's judge takes for their class; None without a judge.
        directions: mean number that was taken out.
        change: largest of subspace iteration's last change.
        difference_255: root of the mean squared difference to the original, in pixel steps.
        nmi, nmi_deviation: of canonical features and classes.
        raw_nmi, raw_nmi_deviation: of features before the projection.
        sheet: where a few are beside their originals.
    """

    images: int
    accepted: float | None
    directions: float
    change: float
    difference_255: float
    nmi: float
    nmi_deviation: float
    raw_nmi: float
    raw_nmi_deviation: float
    sheet: str


def show(store: Store) -> Shown:
    """Of the finished set in `store`, whose data must still be there. `DataError` where there is
    none.
    """
    manifest = runs.read_manifest(store)
    if manifest is None or manifest.kind != "canonical":
        raise DataError(
            f"'{store}' is no set of canonical samples; make one with `dra canonical make`"
        )
    if not manifest.is_done:
        raise DataError(f"'{store}' is not finished; the command that made it goes on")
    config = validate(
        Canonical,
        {key: value for key, value in manifest.config.items() if key in Canonical.model_fields},
        str(store),
    )
    images = data.load(config.data)
    features, raw, labels, squares = [], [], [], []
    for name in manifest.shards:
        arrays = (store / name).read_npz()
        originals, _ = images.train.take(torch.from_numpy(arrays["index"]))
        made = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
        squares.append((made.double() - originals.double()).square().mean(dim=(1, 2, 3)))
        features.append(torch.from_numpy(arrays["feature"]))
        raw.append(torch.from_numpy(arrays["raw_feature"]))
        labels.append(torch.from_numpy(arrays["label"].astype(np.int64)))
    known = torch.cat(labels)[:JUDGED]
    canonical, before = (agreement(torch.cat(each)[:JUDGED], known) for each in (features, raw))
    outcome = manifest.canonical
    return Shown(
        images=int(manifest.images or 0),
        accepted=_number(outcome.get("accepted")),
        directions=_number(outcome.get("directions_mean")) or 0.0,
        change=_number(outcome.get("change_max")) or 0.0,
        difference_255=float(torch.cat(squares).mean().sqrt()),
        nmi=canonical.mean,
        nmi_deviation=canonical.deviation,
        raw_nmi=before.mean,
        raw_nmi_deviation=before.deviation,
        sheet=(store / runs.SAMPLES).uri,
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
