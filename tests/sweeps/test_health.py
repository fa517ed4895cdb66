"""Early-stopping health against scipy, and on curves whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dra_ray.sweeps import health, simulate
from dra_ray.sweeps.schedulers import Report, Rules

WORLD = simulate.World(
    trials=24, epochs=16, validation_images=400, plateau_epochs=(5.0, 6.0), wobble=0.0
)
RULES = Rules("asha", 4 * WORLD.images_per_epoch, reduction=2.0, slot_images=WORLD.images_per_epoch)


def played(rules: Rules, world: simulate.World = WORLD, seed: int = 0) -> list[Report]:
    curves = simulate.Curves(world, seed)
    outcome = simulate.play(curves, rules.build(), keep_decisions=True)
    return [curves.report(int(name[6:]), epoch) for name, epoch, _ in outcome.decisions]


def test_a_rung_at_chance_is_named_with_the_remedy() -> None:
    found = health.examine(played(replace(RULES, scheduler="none")), RULES)
    assert [rung.epoch for rung in found.rungs] == [4, 8]
    assert not found.rungs[0].informative(0.05)
    assert found.sentences[0] == (
        "rung 1 (epoch 4) told nothing apart from chance; set asha.grace_epochs to 8"
    )
    assert found.saved == 0
    assert found.regret is None


def test_what_was_saved_and_lost() -> None:
    reports = played(RULES)
    found = health.examine(reports, RULES)
    assert found.images == len(reports) * WORLD.images_per_epoch
    assert found.saved == pytest.approx(1 - len(reports) / (24 * 16))
    assert found.regret is not None
    assert found.regret_interval is not None
    assert found.regret_interval[0] <= found.regret <= found.regret_interval[1]


def test_no_rung_is_no_sentence_on_rungs() -> None:
    found = health.examine([], RULES)
    assert found.rungs == found.sentences == ()


def test_rank_correlation_is_scipy_s() -> None:
    draws = np.random.default_rng(0)
    pairs = draws.integers(0, 9, (25, 2)) / 9
    pairs[:, 1] += pairs[:, 0]
    found = health.rank_correlation(pairs)
    assert found is not None
    assert found[0] == pytest.approx(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
    assert found[1][0] < found[0] < found[1][1]
    assert health.rank_correlation(np.ones((5, 2))) is None
