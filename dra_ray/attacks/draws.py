"""Where AutoAttack's random numbers come from: one stream for a batch, as the attacks' authors draw
them, or one for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from dra_ray.data.random import generator

Kind = Literal["uniform", "normal"]


class Draws(Protocol):
    """Random numbers of one attack on one batch, float32 on the CPU, so that every device gets the
    same.
    """

    shared: bool  # one draw serves all images of the batch where the attack's authors share it

    def noise(self, kind: Kind, rows: Tensor, shape: Sequence[int], *path: int) -> Tensor:
        """[len(rows), *shape] for the batch's rows int64 [m]; `path` says what for, such as
        (target, restart).
        """

    def table(self, columns: Sequence[int], length: int, rows: int) -> Tensor:
        """Uniform numbers [1 or rows, length, sum(columns)], drawn in groups of `columns`; one row
        where shared.
        """


class PerBatch:
    """pyautoattack's order: a generator seeded anew for every batch, read in turn. `path` does not
    matter.
    """

    shared = True

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, kind: Kind, rows: Tensor, shape: Sequence[int], *path: int) -> Tensor:
        return _draw(kind, (len(rows), *shape), self._generator)

    def table(self, columns: Sequence[int], length: int, rows: int) -> Tensor:
        return torch.cat(
            [torch.rand(size, generator=self._generator) for _ in range(length) for size in columns]
        ).view(1, length, -1)


class PerImage:
    """Every number is a function of (seed, the attack's stream, the image's number in the data set,
    path) alone: no batch, no order.
    """

    shared = False
    TABLE = 1 << 20  # a path that no noise has

    def __init__(self, seed: int, stream: int, numbers: Tensor) -> None:
        self._start = (seed, stream)
        self._numbers = numbers.tolist()

    def noise(self, kind: Kind, rows: Tensor, shape: Sequence[int], *path: int) -> Tensor:
        return torch.stack(
            [
                _draw(kind, shape, generator(*self._start, self._numbers[row], *path))
                for row in rows.tolist()
            ]
        )

    def table(self, columns: Sequence[int], length: int, rows: int) -> Tensor:
        return torch.stack(
            [
                torch.rand(
                    length,
                    sum(columns),
                    generator=generator(*self._start, self._numbers[row], self.TABLE),
                )
                for row in range(rows)
            ]
        )


def _draw(kind: Kind, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    draw = torch.rand if kind == "uniform" else torch.randn
    return draw(*shape, generator=generator)
