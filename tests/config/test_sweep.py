"""What a sweep's file may say, and what is refused in one line with field, value and remedy."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dra_ray import config
from dra_ray.config import Sweep, expressions
from dra_ray.errors import ConfigError
from dra_ray.sweeps import spaces

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "condition without an axis": (
        {"space": {"align.weight": [0, 1],
                   "align.sigma": {"choice": [1], "when": "align.wieght > 0"}}},
        "space.align.sigma.when='align.wieght > 0' names 'align.wieght', which is no axis; did you "
        "mean 'align.weight'?",
    ),
    "condition in a circle": (
        {"space": {"seed": {"choice": [1], "when": "loss.beta > 1"},
                   "loss.beta": {"choice": [1], "when": "seed > 1"}}},
        "depends on itself (seed -> loss.beta -> seed)",
    ),
    "weight by its own sigma": (
        {"space": {"align.weight": {"choice": [1], "when": "align.sigma > 1"}, "align.sigma": [1]}},
        "depends on itself",
    ),
    "log range with 0": (
        {"space": {"align.weight": {"log_uniform": [0, 1]}}},
        "space.align.weight.log_uniform=[0, 1] begins at 0, which has no logarithm",
    ),
    "range the wrong way round": ({"space": {"seed": {"integer": [5, 1]}}}, "smaller value first"),
    "range under grid": (
        {"space": {"align.weight": {"uniform": [0, 1]}}, "trials": 3},
        "of which a grid has no end; set search.method to random or tpe",
    ),
    "two kinds": (
        {"space": {"seed": {"choice": [1], "integer": [1, 2]}}}, "has choice and integer"),
    "no kind": ({"space": {"seed": {"when": "seed > 1"}}}, "give one of choice, uniform"),
    "unknown kind": ({"space": {"seed": {"choise": [1]}}}, "did you mean 'choice'?"),
    "a number": ({"space": {"seed": 5}}, "space.seed.is 5; write a list of values"),
    "step of a choice": ({"space": {"seed": {"choice": [1], "step": 2}}}, "goes with integer"),
    "tpe without trials": (
        {"space": {"seed": [1, 2]}, "search": {"method": "tpe"}}, "trials is not set"),
    "money without prices": (
        {"space": {"seed": [1]}, "budget": {"money": 5}}, "budget.money=5, but prices is not set"),
    "more images than there are": (
        {"space": {"seed": [1]}, "fidelity": {"apgd_from": 0.5, "apgd_images": 5000}},
        "fidelity.apgd_images=5,000, but base.data.validation_images=",
    ),
    "a share above 1": (
        {"space": {"seed": [1]}, "fidelity": {"apgd_from": 1.5}}, "fidelity.apgd_from=1.5"),
    "warm start of a grid": (
        {"space": {"seed": [1]}, "search": {"warm_start": "x"}}, "learns nothing"),
    "point outside": (
        {"space": {"seed": [1]}, "search": {"points": [{"seed": 2}]}},
        "search.points.0.seed=2 is not in [1]",
    ),
    "point of no axis": (
        {"space": {"seed": [1]}, "search": {"points": [{"sed": 2}]}}, "did you mean 'seed'?"),
    "constraint of an unknown field": (
        {"space": {"seed": [1]}, "constraints": ["seed < optim.epoch"]},
        "names the unknown field 'optim.epoch'; did you mean 'epochs'?",
    ),
    "constraint of no axis": (
        {"space": {"seed": [1]}, "constraints": ["optim.epochs > 2"]}, "names no axis"),
    "constraint that calls": (
        {"space": {"seed": [1]}, "constraints": ["exit(seed) > 1"]},
        "constraints.0: 'exit(seed) > 1' holds 'exit(seed)'; allowed are field names",
    ),
    "repeats of a seed axis": (
        {"space": {"seed": [1]}, "repeats": {"seeds": 2}}, "take either out"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_sweep_that_makes_no_sense_is_refused_in_one_line(what: str) -> None:
    tree, words = REFUSED[what]
    with pytest.raises(ConfigError) as caught:
        config.validate(Sweep, tree, "mine.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("mine.yaml: ")
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 2


def test_a_secret_in_an_axis_is_refused_and_not_quoted() -> None:
    secret = "s3://bucket/x?AWSAccessKeyId=AKIAABCDEFGHIJKLMNOP&Signature=abcdefghijklmnop"
    for values in ([secret], {"choice": [secret]}):
        with pytest.raises(ConfigError) as caught:
            config.load("digits-sweep", Sweep, [f"space={{teacher.uri: {values!r}}}"])
        assert "abcdefghijklmnop" not in str(caught.value)


def test_a_sweep_with_everything_survives_printing() -> None:
    sweep = config.validate(
        Sweep,
        {
            "space": {
                "align.weight": {"log_uniform": [0.1, 10]},
                "align.sigma": {"uniform": [0.1, 1], "when": "align.weight > 0"},
                "optim.batch": {"integer": [64, 256], "step": 64},
                "seed": [1, 2],
            },
            "constraints": ["align.sigma * optim.batch < 100"],
            "search": {"method": "tpe", "points": [{"align.weight": 1.0}]},
            "trials": 9,
            "budget": {"money": 3},
            "prices": "prices.yaml",
        },
        "test",
    )
    assert config.validate(Sweep, sweep.model_dump(mode="json"), "test") == sweep
    assert "uniform: [0.1, 1.0]" in config.to_yaml(sweep)
    assert "null" not in config.to_yaml(sweep).partition("space:")[2].partition("constraints:")[0]


# -- expressions -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x') == 0", "a.b.__class__() > 1", "(lambda: 1)() > 0",
        "[a][0] > 1", "a ** 9 > 1", "a % 2 == 0", "a if b else c", "a", "1 < 2", "a + 1",
        "a := 1", "f'{a}' > 'x'", "a in (1, 2)", "a is None", "{} == a", "a < 1j", "a < b'x'",
        "a <", "", "a > 1; b", "-" * 400 + "a > 1",
        "(" * 240 + "a" + ")" * 240 + " > 1", "a > " + "9" * 600, "\x00",
        "not " * 100 + "a", "await a > 1", "*a > 1", "a.b[0] > 1", "'a'.b > 1",
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are field names|write it shorter"):
        expressions.of(text)


def test_expressions_mean_what_python_means() -> None:
    """Random ones against Python itself, with the names as plain variables."""
    draws = random.Random(0)

    def number(depth: int) -> str:
        if not depth or draws.random() < 0.4:
            return draws.choice(["a", "b", "c", "2", "0.5", "-3"])
        return f"({number(depth - 1)} {draws.choice('+-*')} {number(depth - 1)})"

    def condition(depth: int) -> str:
        if not depth or draws.random() < 0.4:
            sign = draws.choice(["<", "<=", ">", ">=", "==", "!="])
            return f"{number(2)} {sign} {number(2)}"
        if draws.random() < 0.2:
            return f"not ({condition(depth - 1)})"
        return f"({condition(depth - 1)}) {draws.choice(['and', 'or'])} ({condition(depth - 1)})"

    compared = 0
    for _ in range(500):
        text = condition(3)
        values = {name: draws.choice([-2, 0, 1, 2.5]) for name in "abc"}
        if not set("abc") & set(text.replace("and", "").replace("or", "")):
            continue
        expression = expressions.of(text)
        truth = bool(eval(text, {}, dict(values)))
        assert expression.holds(values) == truth, (text, values)
        assert (expression.violation(values) == 0) == truth
        compared += 1
    assert compared > 400


def test_an_expression_that_cannot_be_computed_says_so() -> None:
    for text in ("a.b > 'x'", "a.b / c > 1", "a.b < d", "a.b * 'x' > 1"):
        with pytest.raises(ConfigError, match=r"cannot be computed for a.b=1"):
            expressions.of(text).holds({"a.b": 1, "c": 0, "d": None})


def test_a_violation_is_a_distance() -> None:
    rule = expressions.of("synthetic.images <= 1000 * optim.epochs")
    assert rule.violation({"synthetic.images": 5000, "optim.epochs": 2}) == 3000
    assert rule.violation({"synthetic.images": 2000, "optim.epochs": 2}) == 0


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ("f(" + "-" * 480 + "1) > seed", "holds 'f(---"),  # deeper than Python's own stack
        ("optim.betas * 9000000000 == seed", "arithmetic on a list"),
        ("seed > 0 and optim > 1", "'optim' has no value of its own; name one of its fields"),
    ],
)
def test_what_a_constraint_cannot_compute_is_one_line(constraint: str, words: str) -> None:
    tree = {"space": {"seed": [1, 2]}, "constraints": [constraint]}
    with pytest.raises(ConfigError) as caught:
        spaces.experiments(config.validate(Sweep, tree, "test"))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_distance_that_no_float_holds_is_a_violation() -> None:
    assert expressions.of(f"seed > {'9' * 400}").violation({"seed": 1}) == 1
    assert expressions.of("seed > 1e999 - 1").violation({"seed": 1}) == 1
    assert expressions.of("seed > 3").violation({"seed": 1}) == 2
