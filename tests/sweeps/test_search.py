"""Suggestions: the same for the same question, inside the space, and better than chance where a
search learns.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dra_ray import config, runs
from dra_ray.config import Sweep
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.sweeps.search import PACKAGES, Search, Told, require
from dra_ray.sweeps.spaces import Point, Space

SPACE = {
    "align.weight": {"log_uniform": [0.1, 10]},
    "align.sigma": {"uniform": [0.05, 0.5], "when": "align.weight > 0"},
    "loss.beta": {"integer": [1, 10], "step": 2},
    "optim.batch": [64, 128],
}
RULES = ["align.sigma * optim.batch <= 20"]


def sweep(**fields: Any) -> Sweep:
    tree = {"space": SPACE, "trials": 30, "search": {"method": "tpe"}, **fields}
    return config.validate(Sweep, tree, "test")


def score(point: Point) -> float:
    """A made-up robust accuracy with its best at weight 1, sigma 0.1, beta 5."""
    distance = math.log10(point["align.weight"] or 1e-3) ** 2
    distance += 10 * (point.get("align.sigma", 0.5) - 0.1) ** 2
    return 0.5 - 0.1 * distance - 0.005 * abs(point["loss.beta"] - 5)


def searched(sweep: Sweep, at_once: int = 1, limit: int = 100) -> list[Told]:
    """A search to its end: `at_once` trials run, every fifth that ends has failed, every third was
    stopped.
    """
    search, told, running = Search(sweep), dict[int, Told](), list[int]()
    for number in range(limit):
        if len(running) == at_once:
            ended = running.pop(0)
            point = told[ended].point
            state = "failed" if ended % 5 == 4 else "stopped" if ended % 3 == 2 else "done"
            robust = None if state == "failed" else score(point)
            told[ended] = Told(ended, point, robust, robust, 1000, state)  # type: ignore[arg-type]
        point_or_none = search.suggest(number, list(told.values()))
        if point_or_none is None:
            break
        told[number] = Told(number, point_or_none, None, None, 0, "running")
        running.append(number)
    return [told[number] for number in sorted(told)]


@pytest.mark.seconds
@pytest.mark.parametrize("method", ["random", "tpe", "gp"])
def test_suggestions_are_inside_the_space_and_never_twice(method: str) -> None:
    count = 9 if method == "gp" else 20  # a Gaussian process takes a second each time
    settings = sweep(
        search={"method": method, "startup_trials": 4}, constraints=RULES, trials=count
    )
    space = Space(settings)
    points = [trial.point for trial in searched(settings, at_once=3)]
    assert len(points) == count
    assert len({space.key(point) for point in points}) == count
    assert points[0]["align.weight"] == 0
    for point in points[1:]:
        assert all(value in space.axes[field] for field, value in point.items())
        assert space.problem(point) is None
        assert set(point) == set(SPACE)
        space.experiment(point)


@pytest.mark.seconds
@pytest.mark.parametrize("method", ["random", "tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_driver_that_starts_again_is_suggested_the_same(method: str) -> None:
    """Asked in another process, with what is known in another order."""
    settings = sweep(search={"method": method, "startup_trials": 3}, constraints=RULES)
    told = searched(config.override(settings, {"search.method": "tpe"}), at_once=2, limit=12)
    expected = Search(settings).suggest(12, told)
    shuffled = list(told)
    random.Random(0).shuffle(shuffled)
    search = Search(settings)
    search.suggest(20, told[:2])  # what was asked before leaves no trace
    assert search.suggest(12, shuffled) == expected
    code = (
        "from dra_ray import config; from dra_ray.sweeps.search import Search, Told\n"
        f"print(Search(config.validate(config.Sweep, {settings.model_dump()!r}, 't'))"
        f".suggest(12, {told!r}) == {expected!r})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "True\n", ended.stderr
    assert ended.stderr == ""


def test_another_seed_or_other_scores_lead_elsewhere() -> None:
    settings = sweep(search={"method": "tpe", "startup_trials": 3})
    told = searched(settings, limit=12)
    first = Search(settings).suggest(12, told)
    assert Search(config.override(settings, {"seed": 1})).suggest(12, told) != first
    assert Search(settings).suggest(13, told) != first


@pytest.mark.parametrize("method", ["tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_learning_beats_drawing(method: str) -> None:
    """The best of 25 over 5 seeds, and how many of the last ten come close: chance does worse."""
    good = {}
    for way in (method, "random"):
        late = []
        for seed in range(5):
            settings = sweep(
                search={"method": way, "startup_trials": 8}, trials=25, seed=seed, base={}
            )
            late += [score(trial.point) for trial in searched(settings)[-10:]]
        good[way] = sum(late) / len(late)
    assert good[method] > good["random"] + 0.02, good


def test_running_trials_are_kept_away_from() -> None:
    """Asked eight times before anything ends, the sampler does not say eight times the same."""
    settings = sweep(search={"method": "tpe", "startup_trials": 5}, trials=60)
    told = searched(settings, limit=20)
    search, points = Search(settings), []
    for number in range(20, 28):
        point = search.suggest(number, told)
        assert point is not None
        points.append(point)
        told = [*told, Told(number, point, None, None, 0, "running")]
    assert len({Space(settings).key(point) for point in points}) == 8


def test_a_pareto_front_is_searched_with_both_scores() -> None:
    settings = sweep(search={"method": "tpe", "startup_trials": 4}, scheduler="pareto", trials=16)
    assert len(searched(settings, at_once=2)) == 16


def test_lists_that_are_exhausted_end_the_search() -> None:
    lists = {"align.weight": [0, 1], "align.sigma": [0.1, 0.2], "optim.batch": [64, 128]}
    for method in ("tpe", "random"):
        settings = sweep(space=lists, trials=100, search={"method": method, "startup_trials": 2})
        space = Space(settings)
        points = [trial.point for trial in searched_lists(settings)]
        assert sorted(map(space.key, points)) == sorted(map(space.key, space.grid()))


def searched_lists(settings: Sweep) -> list[Told]:
    search, told = Search(settings), list[Told]()
    while (point := search.suggest(len(told), told)) is not None:
        told.append(Told(len(told), point, len(told) / 10, 0.5, 1000, "done"))
    return told


def test_a_grid_is_suggested_in_its_order_and_a_budget_ends_it() -> None:
    lists = {"align.weight": [0, 1, 2]}
    settings = sweep(space=lists, trials=None, search={})
    trials = list(Space(settings).trials().values())
    assert [trial.point for trial in searched_lists(settings)] == trials
    assert len(searched_lists(config.override(settings, {"budget.trials": 2}))) == 2
    learnt = sweep(budget={"trials": 3})
    assert Search(learnt).suggest(3, []) is None
    assert Search(config.override(learnt, {"budget.trials": 4})).suggest(3, []) is not None


def test_a_point_outside_the_axes_does_not_disturb_the_sampler() -> None:
    settings = sweep(search={"method": "tpe", "startup_trials": 2})
    told = [Told(0, {"align.weight": 0, "loss.beta": 5.0, "optim.batch": 128}, 0.3, 0.5, 9, "done")]
    drawn = Space(settings).random(8, 0)
    told += [Told(n, point, score(point), 0.5, 9, "done") for n, point in enumerate(drawn, 1)]
    assert Search(settings).suggest(9, told) is not None


def test_a_sampler_that_is_not_installed_is_refused_with_the_remedy() -> None:
    for method, packages in PACKAGES.items():
        require(method, packages)
    with pytest.raises(ConfigError, match=r"search.method=gp needs no_such_package, not installed"):
        require("gp", ("optuna", "no_such_package"))


def test_configs_and_trials_do_not_load_the_library() -> None:
    code = (
        "import sys; from dra_ray.sweeps import search, spaces; from dra_ray import config\n"
        "s = config.load('digits-sweep'); search.Search(s).suggest(0, [])\n"
        "print('optuna' in sys.modules, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "False False\n", ended.stderr


# -- warm start ------------------------------------------------------------------------------------
def write_former(folder: Path, settings: Sweep, told: list[Told]) -> None:
    store = Store(str(folder))
    names = {trial.number: f"trial-{trial.number:03d}" for trial in told}
    runs.begin_run(
        store,
        "sweep",
        settings.model_dump(mode="json"),
        settings.digest(),
        runs.Facts(trials={names[trial.number]: trial.point for trial in told}),
    )
    decisions: dict[str, runs.Decision] = {"stopped": "stop", "running": "continue"}
    runs.write_rows(
        store / runs.RUNGS,
        [
            runs.RungRow(
                trial=names[trial.number],
                epoch=1,
                images_seen=trial.images_seen,
                clean_accuracy=trial.clean_accuracy,
                robust_accuracy=trial.robust_accuracy,
                decision=decisions.get(trial.state, trial.state),  # type: ignore[arg-type]
            )
            for trial in told
        ],
    )


def test_a_former_sweep_is_learnt_from(tmp_path: Path) -> None:
    settings = sweep(search={"method": "tpe", "startup_trials": 8}, trials=20)
    former = searched(settings)
    write_former(tmp_path, settings, former)
    warm = config.override(settings, {"search.warm_start": str(tmp_path), "seed": 9})
    told = [trial for trial in Search(warm).former if trial.state != "running"]
    ended = [trial for trial in former if trial.state != "running"]
    assert [(t.point, t.robust_accuracy, t.state) for t in told] == [
        (t.point, t.robust_accuracy, t.state) for t in ended
    ]


def test_what_a_former_sweep_found_is_where_the_next_begins() -> None:
    """The first suggestions after three former sweeps, against draws from the same space."""
    settings = sweep(search={"method": "tpe", "startup_trials": 8})
    early: list[float] = []
    for seed in range(3):
        former = searched(config.override(settings, {"seed": seed}))
        search = Search(settings, [trial for trial in former if trial.state != "running"])
        points = [search.suggest(number, []) for number in range(1, 15)]
        early += [score(point) for point in points if point is not None]
    drawn = [score(point) for point in Space(settings).random(200, 9)]
    assert sum(early) / len(early) > sum(drawn) / len(drawn) + 0.02


def test_a_former_sweep_over_other_axes_says_which(tmp_path: Path) -> None:
    other = {"align.weight": [0, 1], "optim.lr": [0.1, 0.2]}
    write_former(tmp_path, sweep(space=other, search={}, trials=None), [])
    warm = sweep(search={"method": "tpe", "warm_start": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        Search(warm)
    message = str(caught.value)
    assert "lacks align.sigma, loss.beta, optim.batch and has optim.lr besides" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match="is no sweep's folder"):
        Search(config.override(warm, {"search.warm_start": str(tmp_path / "nothing")}))
