"""What somebody asks of a sweep while another process drives it: small files in its folder, which
the driver obeys and removes. Orders to a sweep without a driver wait for the next start.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any, Literal

from dra_ray import config, runs
from dra_ray.config.sweep import COMBINATIONS
from dra_ray.config.text import refusal, shown
from dra_ray.errors import DataError
from dra_ray.storage import Store
from dra_ray.sweeps.spaces import Point, Space

ORDERS = "orders"  # a folder of the sweep's


@dataclasses.dataclass(frozen=True)
class Order:
    """Attributes:
    trial: whom to stop, or to start again where it failed or was stopped.
    point: what to add, by the fields of the sweep's axes.
    trials: instead of a point: how many trials the search is to have in all, not counting those
        that were added by hand.
    """

    what: Literal["stop", "rerun", "add"]
    trial: str = ""
    point: Point = dataclasses.field(default_factory=dict)
    trials: int = 0


def give(sweep: Store, order: Order) -> None:
    """Leave an order for the driver. Raises `ConfigError` for a folder without a sweep, a trial
    that it does not have, a point with fields that are no axes, and a number of trials that is no
    more than the search has, or more than its space has.
    """
    manifest = runs.read_manifest(sweep)
    if manifest is None or manifest.kind != "sweep":
        raise refusal(f"'{sweep}' is no sweep; name the folder of one")
    if order.what != "add" and order.trial not in manifest.trials:
        names = sorted(manifest.trials)
        there = f"{names[0]} to {names[-1]}" if names else "none yet"
        raise refusal(f"'{sweep}' has no trial {shown(order.trial)}; it has {there}")
    space = manifest.config.get("space")
    axes = set(space) if isinstance(space, dict) else set()
    if unknown := sorted(order.point.keys() - axes):
        raise refusal(
            f"{shown(unknown[0])} is no axis of '{sweep}'; its axes are {', '.join(sorted(axes))}"
        )
    if order.trials:
        _check_trials(sweep, manifest, order.trials)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    (sweep / ORDERS / name).write_json(dataclasses.asdict(order))


def _check_trials(folder: Store, manifest: runs.Manifest, trials: int) -> None:
    sweep = config.validate(config.Sweep, manifest.config, f"'{folder / runs.MANIFEST}'")
    space, now = Space(sweep), raised(folder, manifest)
    most = space.most()
    there = len(space.trials(now)) if most is not None else max(sweep.trials or 0, now or 0)
    if most is not None and there == most:
        raise refusal(
            f"--trials {trials}: '{folder}' has all {most} points of its space; add a point instead"
        )
    if trials <= there:
        raise refusal(f"--trials {trials}: the search of '{folder}' has {there}; name more")
    if trials > (most or COMBINATIONS):
        raise refusal(
            f"--trials {trials}: '{folder}' can have {most or COMBINATIONS:,}; name fewer"
        )


def raised(sweep: Store, manifest: runs.Manifest | None) -> int | None:
    """How many trials a sweep's search was raised to, with what is not obeyed yet; None where it
    was not.
    """
    done = manifest.raised_trials if manifest is not None else None
    return max(done or 0, *(order.trials for _, order in pending(sweep)), 0) or None


def pending(sweep: Store) -> list[tuple[Store, Order]]:
    """Orders that are not obeyed yet, oldest first; a file that is none is passed over."""
    found = []
    for name in (sweep / ORDERS).names():
        file = sweep / ORDERS / name
        try:
            fields: dict[str, Any] = file.read_json()
            found.append((file, Order(**fields)))
        except (DataError, TypeError):
            continue
    return found
