"""What a sweep ends in: its best trial, how sure that is, and the recipe to train it again.

Only trials that were trained to their end compete, at the most `images_seen` that all of them
reached. The best of many is flattered by its noise, so every trial that cannot be told apart from
it is named too, and nothing is called better that chance explains. Where a stronger attack than
the validations' has judged all finalists, its verdicts take the place of theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from dra_ray import config
from dra_ray.evaluation import intervals
from dra_ray.runs import FidelityRow, LateAttack, RungRow
from dra_ray.storage import Store
from dra_ray.sweeps import equal, fidelity
from dra_ray.sweeps.equal import Fields, Refused
from dra_ray.sweeps.resample import Difference, accuracies, difference, robust, span

WINNER = "winner.yaml"  # in the sweep's folder: the best trial as a recipe
DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best of the trials that were trained to the end; accuracies are fractions on validation
    images.

    Attributes:
        trial: the winner; of repeats, the first.
        repeats: the winner under every training seed, itself included.
        fields: what it changes in the sweep's base, without the seed.
        images_seen: at which all competitors are compared.
        robust_accuracy: mean over the repeats; interval: Wilson's 95 %, of repeats the
            bootstrap's over seeds and images.
        competitors: trials that competed, repeats counted once; left_out: finished trials of
            another task.
        ties: competitors that chance in the images may have put behind it.
        baseline: the best competitor without alignment, None where there is none or it won itself.
        over_baseline: the winner minus that.
        confounded: fields besides alignment in which the two differ, with their values.
        attack: whose verdicts the accuracies, intervals and ties are of: "pgd" where it was the
            validations', else the stronger one that judged all finalists, and nobody else competes.
        finalists: of a stronger attack, best first by it.
        by_pgd: the finalists, best first by the validations' PGD, where that is another order.
    """

    trial: str
    repeats: tuple[str, ...]
    fields: Fields
    images_seen: int
    images: int
    robust_accuracy: float
    interval: tuple[float, float]
    clean_accuracy: float | None
    trials: int
    competitors: int
    left_out: tuple[str, ...]
    ties: tuple[str, ...]
    baseline: str | None
    over_baseline: Difference | None
    confounded: Mapping[str, tuple[object, object]]
    attack: Literal["pgd"] | LateAttack = "pgd"
    finalists: tuple[str, ...] = ()
    by_pgd: tuple[str, ...] = ()


def answer(
    trials: Mapping[str, Fields],
    rows: Sequence[RungRow],
    images: int,
    late: Iterable[FidelityRow] = (),
    best: int = fidelity.BEST,
) -> Answer | Refused:
    """The answer of a sweep, or why it has none.

    Args:
        trials: name -> the fields that it changes.
        rows: of rungs.jsonl, in any order.
        images: validation images of rows that do not say how many.
        late: verdicts of stronger attacks, of fidelity.jsonl: where all finalists have those of
            one, it names the winner among them.
        best: `fidelity.best` of the sweep, which says who is a finalist.
    """
    trained = fidelity.contest(trials, rows)
    if trained is None:
        return Refused(
            f"none of the {len(trials)} trials was trained to the end, so there is no winner yet; "
            "start the same command again to go on"
        )
    judged = fidelity.judged(trained, trials, late, best)
    contest = judged.contest if judged else trained
    standing, groups, order = contest.standing, contest.groups, contest.order()
    winner = order[0]
    means = contest.mean(winner)
    of = {first: [standing[name] for name in members] for first, members in groups.items()}
    gaps = {first: _gap(of[winner], of[first], images) for first in groups if first != winner}
    plain = [name for name in order if trials[name].get("align.weight") == 0]
    baseline = plain[0] if plain and plain[0] != winner else None
    points = [fidelity.point(trials[name]) for name in (winner, baseline) if name]
    return Answer(
        winner,
        groups[winner],
        points[0],
        contest.images_seen,
        standing[winner].images or images,
        means[0],
        _interval(of[winner], images),
        means[1] if standing[winner].clean_accuracy is not None else None,
        len(trials),
        len(trained.groups),
        trained.left_out,
        tuple(name for name, gap in gaps.items() if not gap.is_clear),
        baseline,
        gaps[baseline] if baseline else None,
        equal.differing(*points) if baseline else {},
        judged.attack if judged else "pgd",
        tuple(order) if judged else (),
        judged.before if judged and judged.disagrees else (),
    )


def _interval(rows: Sequence[RungRow], images: int) -> tuple[float, float]:
    if len(rows) == 1:
        count = rows[0].images or images
        return intervals.wilson(round(robust(rows[0]) * count), count)
    generator = np.random.default_rng(0)
    drawn = accuracies(rows, images, DRAWS, generator)
    picks = generator.integers(len(rows), size=drawn.shape)
    return span(np.take_along_axis(drawn, picks, axis=1).mean(axis=1))


def _gap(first: Sequence[RungRow], second: Sequence[RungRow], images: int) -> Difference:
    """Mean of `first` minus mean of `second`; of repeats by a bootstrap over their seeds and the
    images that all share.
    """
    if len(first) == len(second) == 1:
        return difference(first[0], second[0], images)
    generator = np.random.default_rng(0)
    drawn = accuracies([*first, *second], images, DRAWS, generator)
    sides = []
    for side in (drawn[:, : len(first)], drawn[:, len(first) :]):
        picks = generator.integers(side.shape[1], size=side.shape)
        sides.append(np.take_along_axis(side, picks, axis=1).mean(axis=1))
    means = [float(np.mean([robust(row) for row in side])) for side in (first, second)]
    paired = all(row.verdicts for row in (*first, *second))
    return Difference(means[0] - means[1], span(sides[0] - sides[1]), paired, None)


# -- as a recipe -----------------------------------------------------------------------------------
def recipe(sweep: config.Sweep, found: Answer, name: str) -> config.Experiment:
    """The winner as an experiment: the sweep's base with the winner's fields. `name` is the
    sweep's, for the description.
    """
    changes = dict(found.fields) | {
        "description": f"{found.trial}, the best of {found.competitors} finished trials of the "
        f"sweep {name}",
        "paper": None,  # the base's published numbers are not of these settings
    }
    return config.override(sweep.base, changes)


def write_recipe(folder: Store, sweep: config.Sweep, found: Answer) -> Store:
    """Write the winner to winner.yaml in the sweep's folder; `dra train` takes that file."""
    file = folder / WINNER
    file.write_text(config.to_yaml(recipe(sweep, found, folder.name)))
    return file
