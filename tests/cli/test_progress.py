"""What the terminal says while images are made."""

from __future__ import annotations

from typing import Any

import pytest

from dra_ray.cli import terminal
from dra_ray.runs import SyntheticProgress


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
