"""How much of its trials a sweep will train, before it starts: its own scheduler played on learning
curves that are made up (`sweeps.simulate`).

How far the real trials lie apart is not known, so the draws spread them by 1, 3 and 6 points in
turn. The interval is over draws: chance, and that spread; curves of another shape can lie outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dra_ray import config
from dra_ray.sweeps import schedulers, simulate
from dra_ray.sweeps.simulate import Curves, Outcome, World

SPREADS = (0.01, 0.03, 0.06)  # standard deviation of the trials' final robust accuracy
DRAWS = 16  # of each
# what a simulation is cut to, since its cost grows with both and shares hardly change
VALIDATIONS, TRIALS, IMAGES = 27, 48, 1024


@dataclass(frozen=True)
class Planned:
    """A trial before it starts: training images to its end, and whether it is aligned."""

    images: int
    aligned: bool


def shares(
    sweep: config.Sweep, trials: Sequence[Planned], images_per_epoch: int
) -> NDArray[np.float64]:
    """Images that each trial will see, as a share of its own length, finals and repeats with other
    training seeds included, which can make it more than 1: [draws, trials].

    Args:
        images_per_epoch: of the base trial.
    """
    if sweep.scheduler == "none":
        return to_the_end(sweep, trials)[None]
    world, rules = _world(sweep, trials, images_per_epoch)
    kinds = [trial.aligned for trial in trials[: world.trials]]
    drawn = []
    for number, spread in enumerate(SPREADS * DRAWS):
        curves = Curves(_spread(world, spread), number)
        drawn.append(_shares(sweep, world, kinds, simulate.play(curves, rules.build())))
    played = np.array(drawn)
    rest = np.repeat(played.mean(1, keepdims=True), len(trials) - world.trials, 1)
    return np.hstack([played, rest])


def to_the_end(sweep: config.Sweep, trials: Sequence[Planned]) -> NDArray[np.float64]:
    """`shares` where nothing is stopped, [trials]: the longest are repeated."""
    ends = np.ones(len(trials))
    if sweep.repeats.of == "all":
        return ends * sweep.repeats.seeds
    for kind in {trial.aligned for trial in trials}:
        named = [number for number, trial in enumerate(trials) if trial.aligned == kind]
        ends[max(named, key=lambda number: trials[number].images)] += sweep.repeats.seeds - 1
    return ends


def _world(
    sweep: config.Sweep, trials: Sequence[Planned], images_per_epoch: int
) -> tuple[World, schedulers.Rules]:
    """Validations of the sweep as epochs of a simulated one, several as one where they are many."""
    rules = schedulers.rules(sweep, images_per_epoch)
    kept = trials[:TRIALS]
    longest = max(trial.images for trial in trials)
    slot = rules.slot_images * math.ceil(longest / rules.slot_images / VALIDATIONS)
    lengths = tuple(max(1, math.ceil(trial.images / slot)) for trial in kept)
    usual, epochs = World(), max(lengths)
    scale = epochs / usual.epochs
    world = World(
        trials=len(kept),
        epochs=epochs,
        images_per_epoch=slot,
        concurrent=min(sweep.asha.max_concurrent, len(kept)),
        validation_images=min(max(1, sweep.base.data.validation_images), IMAGES),
        plateau_epochs=(usual.plateau_epochs[0] * scale, usual.plateau_epochs[1] * scale),
        rise_epochs=(usual.rise_epochs[0] * scale, usual.rise_epochs[1] * scale),
        lengths=lengths,
    )
    return world, replace(rules, slot_images=slot)


def _spread(world: World, spread: float) -> World:
    return replace(world, best=(world.best[0], spread))


def _shares(
    sweep: config.Sweep, world: World, aligned: Sequence[bool], outcome: Outcome
) -> NDArray[np.float64]:
    """[trials] of one draw: the race, then the best with and without alignment to their ends."""
    reached = outcome.reached
    lengths = np.array([world.length(trial) for trial in range(world.trials)])
    part: NDArray[np.float64] = (
        np.array([reached[trial][0] for trial in range(world.trials)]) / lengths
    )
    finalists = [
        max((t for t in reached if aligned[t] == kind), key=lambda t: (*reached[t], t))
        for kind in set(aligned)
    ]
    part[finalists] = 1.0
    repeated = np.flatnonzero(part == 1.0) if sweep.repeats.of == "all" else finalists
    part[repeated] *= sweep.repeats.seeds
    return part


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """What 95 % of the draws lie between."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
