"""What the terminal says while images are made."""

from __future__ import annotations

from typing import Any

import pytest

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.runs import RungRow, SyntheticProgress


class Said:
    """Bars that keep what they were to show."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, name: str, share: float, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    ("price", "ending"), [(None, "50 a second, 1 minutes left"), (9.0, "left for 0.20")]
)
def test_the_rate_the_hours_left_and_their_price_are_said(price: float | None, ending: str) -> None:
    said: Any = Said()
    show = terminal.synthetic_rows(said, price)
    # a set that goes on: what was there comes at once, and is no rate
    for images, elapsed_s in ((4000, 0.1), (5000, 20.1), (6000, 40.1)):
        show(SyntheticProgress(images=images, images_total=10_000, elapsed_s=elapsed_s))
    assert said.texts[0] == "synthetic images: 4,000 of 10,000"
    assert said.texts[-1].endswith(ending)


@pytest.mark.parametrize(
    ("of", "weights", "ended"),
    [("all", [0, 1, 2], "3/9"), ("finalists", [0, 1, 2], "3/7"), ("finalists", [1, 2], "2/4")],
)
def test_repeats_that_are_to_come_are_not_done(of: str, weights: list[float], ended: str) -> None:
    sweep = config.Sweep(
        base=config.Experiment(optim=config.Optim(epochs=4)),
        space={"align.weight": weights},
        repeats={"seeds": 3, "of": of},
    )
    said: Any = Said()
    show = terminal.sweep_rows(said, sweep)
    for number in range(len(weights)):
        show(
            RungRow(
                trial=f"trial-{number:03d}",
                epoch=4,
                images_seen=100,
                clean_accuracy=0.5,
                robust_accuracy=0.4,
                decision="done",
                reason="",
                at=0.0,
            )
        )
    assert said.texts[-1] == f"sweep: best 40.0%, {ended} trials"
