"""The winner of a sweep against cases whose answer is plain, and intervals against published
ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dra_ray import config
from dra_ray.evaluation import intervals
from dra_ray.evaluation.compare import compare
from dra_ray.report.answers import paragraph
from dra_ray.storage import Store
from dra_ray.sweeps import answer as answers
from dra_ray.sweeps import spaces
from dra_ray.sweeps.answer import Answer, answer, recipe, write_recipe
from dra_ray.sweeps.equal import Refused
from tests.sweeps.logged import IMAGES, ended, first, row

WEIGHTS = {f"trial-{n}": {"align.weight": float(n)} for n in range(4)}


def the_answer(trials: dict[str, dict[str, object]], rows: list, images: int = IMAGES) -> Answer:
    found = answer(trials, rows, images)
    assert isinstance(found, Answer)
    return found


def test_the_best_finished_trial_wins_and_a_stopped_one_does_not() -> None:
    rows = ended({"trial-0": first(300), "trial-1": first(500), "trial-2": first(400)})
    rows += [row("trial-3", 2, first(900), decision="stop")]
    found = the_answer(WEIGHTS, rows)
    assert (found.trial, found.competitors, found.trials) == ("trial-1", 3, 4)
    assert found.baseline == "trial-0"
    assert found.interval == intervals.wilson(500, IMAGES)


def test_longer_trials_are_judged_where_the_shortest_ended() -> None:
    """Trained twice as long it would have won; at equal images it does not."""
    rows = [row("trial-1", 4, first(500), decision="done")]
    rows += [row("trial-2", 4, first(400)), row("trial-2", 8, first(600), decision="done")]
    found = the_answer({name: WEIGHTS[name] for name in ("trial-1", "trial-2")}, rows)
    assert (found.trial, found.images_seen) == ("trial-1", 400)


def test_a_paired_lead_is_clear_where_the_same_lead_unpaired_is_not() -> None:
    """20 of 1,000 images more, on images where the other is wrong too: no noise is left."""
    paired = the_answer(WEIGHTS, ended({"trial-0": first(400), "trial-1": first(420)}))
    unpaired = the_answer(WEIGHTS, ended({"trial-0": 0.40, "trial-1": 0.42}))
    assert paired.ties == ()
    assert unpaired.ties == ("trial-0",)
    assert paired.over_baseline is not None
    assert unpaired.over_baseline is not None
    assert paired.over_baseline.value == pytest.approx(unpaired.over_baseline.value)
    assert paired.over_baseline.interval == compare(first(400), first(420)).interval
    assert unpaired.over_baseline.interval == intervals.newcombe((420, IMAGES), (400, IMAGES))


def test_newcombe_as_published() -> None:
    """56/70 against 48/80 (Newcombe 1998, table II, example a, method 10)."""
    low, high = intervals.newcombe((56, 70), (48, 80))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


@pytest.mark.seconds
def test_newcombe_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for one, two in zip(
        generator.binomial(256, 0.45, 1000), generator.binomial(256, 0.38, 1000), strict=True
    ):
        low, high = intervals.newcombe((one, 256), (two, 256))
        held += low <= 0.07 <= high
    assert 930 <= held <= 970


def test_repeats_of_a_point_compete_as_their_mean() -> None:
    trials = {
        "a-0": {"align.weight": 1.0, "seed": 0},
        "a-1": {"align.weight": 1.0, "seed": 1},
        "b-0": {"align.weight": 2.0, "seed": 0},
        "b-1": {"align.weight": 2.0, "seed": 1},
    }
    lucky = ended({"a-0": first(600), "a-1": first(300), "b-0": first(500), "b-1": first(500)})
    found = the_answer(trials, lucky)
    assert (found.trial, found.repeats) == ("b-0", ("b-0", "b-1"))
    assert found.robust_accuracy == 0.5
    assert found.ties == ("a-0",)  # its seeds differ by more than the means do
    assert found.fields == {"align.weight": 2.0}


def test_repeats_of_a_sweep_are_one_point_with_the_trial_that_they_repeat() -> None:
    """As `repeats` names them: the first has the base's seeds, the others spell theirs out."""
    space = spaces.Space(
        config.Sweep.model_validate(
            {"space": {"align.weight": [0.0, 1.0]}, "repeats": {"seeds": 3, "of": "all"}}
        )
    )
    trials = {
        f"{name}-{number}": {"align.weight": weight} | space.seeds(number)
        for name, weight in (("plain", 0.0), ("aligned", 1.0))
        for number in range(3)
    }
    scores = {"plain-0": 400, "plain-1": 500, "plain-2": 600}
    scores |= {"aligned-0": 450, "aligned-1": 550, "aligned-2": 590}
    found = the_answer(trials, ended({name: first(count) for name, count in scores.items()}))
    assert (found.competitors, found.trials) == (2, 6)
    assert found.repeats == ("aligned-0", "aligned-1", "aligned-2")
    assert (found.baseline, found.confounded) == ("plain-0", {})
    assert found.fields == {"align.weight": 1.0}


def test_trials_of_another_task_do_not_compete() -> None:
    trials = {f"{eps}-{n}": {"threat.eps_255": eps, "x": n} for eps in (4, 8) for n in (1, 2)}
    trials["8-3"] = {"threat.eps_255": 8, "x": 3}
    rows = ended({"4-1": 0.9, "4-2": 0.9, "8-1": 0.3, "8-2": 0.4, "8-3": 0.2})
    found = the_answer(trials, rows)
    assert (found.trial, found.left_out) == ("8-2", ("4-1", "4-2"))


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = ended({"trial-0": first(300), "trial-1": first(500), "trial-2": first(500)})
    rows += [row("trial-1", 2, first(100)), row("trial-2", 2, first(200))]
    found = the_answer(WEIGHTS, rows)
    for seed in range(5):
        shuffled = [rows[k] for k in np.random.default_rng(seed).permutation(len(rows))]
        assert the_answer(WEIGHTS, shuffled) == found


def test_no_finished_trial_is_no_answer() -> None:
    refused = answer(WEIGHTS, [row("trial-1", 2, first(3), decision="stop")], IMAGES)
    assert isinstance(refused, Refused)
    assert "trained to the end" in paragraph(refused)


def test_the_paragraph_claims_no_more_than_the_interval() -> None:
    clear = paragraph(the_answer(WEIGHTS, ended({"trial-0": first(300), "trial-1": first(500)})))
    assert "more than the choice" in clear
    assert "clearly ahead of the other." in clear
    chance = paragraph(the_answer(WEIGHTS, ended({"trial-0": 0.40, "trial-1": 0.41})))
    assert "does not show that alignment helps" in chance
    assert "cannot be told apart from 1 of the 1 other (trial-0)" in chance
    alone = paragraph(the_answer(WEIGHTS, ended({"trial-1": 0.40})))
    assert "compared with nothing" in alone
    baseline = paragraph(the_answer(WEIGHTS, ended({"trial-0": 0.5, "trial-1": 0.3})))
    assert "without alignment: no trial with alignment did better" in baseline


def test_what_differs_besides_alignment_is_said() -> None:
    trials = {
        "a": {"align.weight": 0.0, "synthetic.images": 0},
        "b": {"align.weight": 1.0, "synthetic.images": 500},
    }
    found = the_answer(trials, ended({"a": first(300), "b": first(500)}))
    assert found.confounded == {"synthetic.images": (500, 0)}
    assert "also differ in synthetic.images (500 against 0)" in paragraph(found)


def test_the_winner_is_a_recipe_that_loads(tmp_path: Path) -> None:
    """The file gives the experiment that the trial ran, to the digest."""
    sweep = config.load("digits-sweep", config.Sweep)
    trials = {"trial-0": {"align.weight": 0.0}, "trial-1": {"align.weight": 2.5, "seed": 3}}
    found = the_answer(trials, ended({"trial-0": first(300), "trial-1": first(500)}))
    file = write_recipe(Store(str(tmp_path)) / "mine", sweep, found)
    loaded = config.load(str(file), config.Experiment)
    assert file.name == answers.WINNER
    assert loaded == recipe(sweep, found, "mine")
    assert loaded.digest() == config.override(sweep.base, {"align.weight": 2.5}).digest()
    assert "trial-1" in loaded.description
