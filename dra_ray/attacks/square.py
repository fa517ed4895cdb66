"""Square Attack (Andriushchenko et al., arXiv 1912.00049) as AutoAttack sets it: margin loss, p
from 0.8 by a fixed schedule.

A query proposes a change of one window of each image and keeps it where the margin falls. Two kinds
of proposals need no forward pass, because their outcome is known: those that leave the image as it
is (every pixel of the window already sits on that side of the ball), and those that were turned
down before while the image has not changed since. On 28x28 grey images that is a quarter of all
queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dra_ray.attacks.draws import Draws
from dra_ray.attacks.levels import Rows

P_INIT = 0.8
BREAKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # p halves after each of these queries
# remember what was turned down unless there are this many times more windows than queries
WORTH = 8
TILES = 5  # an l2 start is made of 5x5 tiles


def linf(rows: Rows, x: Tensor, labels: Tensor, eps: float, queries: int, draws: Draws) -> Tensor:
    """The best image [n,C,H,W] found for each x in [0,1], whether it fools or not.

    With `draws.shared`, one window and its signs serve the whole batch in a query, as in
    AutoAttack.
    """
    channels, height, width = x.shape[1:]
    lower, upper = x - eps, x + eps
    everyone = torch.arange(len(x), device=x.device)
    stripes = torch.sign(2 * draws.noise("uniform", everyone.cpu(), (channels, 1, width)) - 1).to(x)
    best = (x + eps * stripes).clamp(0, 1)
    margin = margins(rows(best, everyone), labels)
    table = draws.table((1, 1, channels), queries, len(x)).to(x.device)
    known = TurnedDown(len(x), height, width, channels, queries, x.device)
    for query in range(queries):
        alive = (margin > 0).nonzero().squeeze(1)
        if not len(alive):
            break
        side = _side(query, height, width)
        drawn = table[:, query] if draws.shared else table[alive, query]
        top, left, signs = (
            ((height - side) * drawn[:, 0]).long(),
            ((width - side) * drawn[:, 1]).long(),
            torch.sign(2 * drawn[:, 2:] - 1),
        )
        current = best[alive]
        change = (2 * eps * signs.to(x))[:, :, None, None] * _inside(top, left, side, height, width)
        proposed = (current + change).clamp(lower[alive], upper[alive]).clamp_(0, 1)
        key = known.key(side, query, top, left, signs)
        todo = (
            ((proposed != current).flatten(1).any(1) & ~known.at(alive, key)).nonzero().squeeze(1)
        )
        if not len(todo):
            continue
        queried = alive[todo]
        proposed_margin = margins(rows(proposed, todo), labels[queried])
        better = proposed_margin < margin[queried]
        margin[queried] = torch.where(better, proposed_margin, margin[queried])
        best[queried[better]] = proposed[todo[better]]
        known.note(queried, todo, key, better)
    return best


def l2(rows: Rows, x: Tensor, labels: Tensor, eps: float, queries: int, draws: Draws) -> Tensor:
    """As `linf`, in the l2 ball; every image has its own windows, so `draws` must not be shared."""
    channels, height, width = x.shape[1:]
    everyone = torch.arange(len(x), device=x.device)
    best = (x + eps * unit(_tiles(x, draws))).clamp(0, 1)
    margin = margins(rows(best, everyone), labels)
    table = draws.table((1, 1, 1, 1, 1, channels), queries, len(x)).to(x.device)
    for query in range(queries):
        alive = (margin > 0).nonzero().squeeze(1)
        if not len(alive):
            break
        side = min(_side(query, height, width, least=3) | 1, height, width)
        proposed = _moved(x[alive], best[alive], eps, side, table[alive, query])
        everyone = torch.arange(len(alive), device=x.device)
        proposed_margin = margins(rows(proposed, everyone), labels[alive])
        better = proposed_margin < margin[alive]
        margin[alive] = torch.where(better, proposed_margin, margin[alive])
        best[alive[better]] = proposed[better]
    return best


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label less the largest other one, [n]; not positive for an image that fools."""
    true = logits.gather(1, labels[:, None])
    return true.squeeze(1) - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def share(query: int) -> float:
    """The share p of the image that a window covers at a query, without rescaling to the number of
    queries.
    """
    return P_INIT / 2.0 ** sum(query > after for after in BREAKS)


def _side(query: int, height: int, width: int, least: int = 1) -> int:
    return min(max(round(math.sqrt(share(query) * height * width)), least), height, width)


def _inside(top: Tensor, left: Tensor, side: int, height: int, width: int) -> Tensor:
    """Windows as masks bool [m,1,H,W], from their corners int64 [m]."""
    down = torch.arange(height, device=top.device) - top[:, None]
    across = torch.arange(width, device=top.device) - left[:, None]
    return ((down >= 0) & (down < side))[:, None, :, None] & ((across >= 0) & (across < side))[
        :, None, None, :
    ]


class TurnedDown:
    """Which proposals an image turned down since it last changed, by (window, signs); only for
    windows of the present size.
    """

    def __init__(
        self,
        images: int,
        height: int,
        width: int,
        channels: int,
        queries: int,
        device: torch.device,
    ) -> None:
        self.height, self.width = height, width
        self.signs = 3**channels  # a sign may be 0, once in 2**24 draws
        self.queries, self.images = queries, images
        self._version = torch.zeros(images, dtype=torch.int32, device=device)
        self._seen: Tensor | None = None
        self._side = -1

    def key(self, side: int, query: int, top: Tensor, left: Tensor, signs: Tensor) -> Tensor | None:
        """Numbers int64 [m] of these proposals; None where there are too many different ones for
        any to come again.
        """
        if side != self._side:
            self._side = side
            count = max(self.height - side, 1) * max(self.width - side, 1) * self.signs
            self._seen = None
            if count <= WORTH * self._lasting(query):
                self._seen = torch.full(
                    (self.images, count), -1, dtype=torch.int32, device=top.device
                )
        if self._seen is None:
            return None
        code = sum((signs[:, k].long() + 1) * 3**k for k in range(signs.shape[1]))
        key: Tensor = (top * max(self.width - self._side, 1) + left) * self.signs + code
        return key

    def _lasting(self, query: int) -> int:
        """Queries with windows of the size that `query` begins."""
        last = next((after for after in BREAKS if query <= after), self.queries)
        return min(last + 1, self.queries) - query

    def at(self, alive: Tensor, key: Tensor | None) -> Tensor:
        """Turned down already: bool [m] for images `alive` int64 [m]."""
        if key is None or self._seen is None:
            return torch.zeros(len(alive), dtype=torch.bool, device=alive.device)
        return self._seen[alive, key] == self._version[alive]

    def note(self, queried: Tensor, todo: Tensor, key: Tensor | None, better: Tensor) -> None:
        """Images `queried`, at positions `todo` of the batch, took (`better`) or turned down their
        proposal.
        """
        if key is not None and self._seen is not None:
            self._seen[queried, key if len(key) == 1 else key[todo]] = self._version[queried]
        self._version[queried[better]] += 1


# -- l2 --------------------------------------------------------------------------------------------
def unit(delta: Tensor) -> Tensor:
    """delta [n,C,H,W], each image divided by its l2 norm."""
    return delta / (_norm(delta) + 1e-12)


def _norm(delta: Tensor) -> Tensor:
    norms: Tensor = delta.flatten(1).norm(dim=1)
    return norms[:, None, None, None]


def _tiles(x: Tensor, draws: Draws) -> Tensor:
    """The start: signed tiles over the image, [n,C,H,W]."""
    channels, height, width = x.shape[1:]
    side = max(height // TILES, 1)
    corners = [
        max((size - side * TILES) // 2, 0) + side * k
        for size in (height, width)
        for k in range(size // side)
    ]
    tops, lefts = corners[: height // side], corners[height // side :]
    delta = torch.zeros_like(x)
    drawn = draws.noise("uniform", torch.arange(len(x)), (len(tops), len(lefts), 1 + channels)).to(
        x
    )
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            if top + side <= height and left + side <= width:
                signs = torch.sign(2 * drawn[:, i, j, 1:] - 1)[:, :, None, None]
                delta[:, :, top : top + side, left : left + side] += (
                    bump(side, drawn[:, i, j, 0] > 0.5).to(x) * signs
                )
    return delta


def bump(side: int, turned: Tensor) -> Tensor:
    """The paper's eta: a positive and a negative pyramid side by side, of l2 norm 1; one above the
    other unless `turned` bool [n]. [n,1,S,S]
    """
    upper = side // 2
    plain = torch.cat([_pyramid(upper, side), -_pyramid(side - upper, side)])
    plain = (plain / plain.norm()).to(turned.device)
    return torch.where(turned[:, None, None], plain.T, plain)[:, None]


def _pyramid(height: int, width: int) -> Tensor:
    """Rectangles that grow by a pixel in every direction, the k-th adding 1/k^2; of l2 norm 1 where
    there is anything.
    """
    out = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for k in range(max(height // 2, width // 2) + 1):
        out[max(top - k, 0) : max(top + k + 1, 0), max(left - k, 0) : left + k + 1] += (
            1 / (k + 1) ** 2
        )
    return out / out.norm() if height else out


def _moved(x: Tensor, best: Tensor, eps: float, side: int, drawn: Tensor) -> Tensor:
    """Proposals [m,C,H,W]: the norm of two windows and what the ball has left goes into the first
    (their algorithm 3).

    `drawn` [m,5+C]: corners of both windows, orientation, signs.
    """
    channels, height, width = x.shape[1:]
    delta = best - x
    place = [
        ((size - side) * drawn[:, k]).long()
        for k, size in enumerate((height, width, height, width))
    ]
    window = _Window(place[0], place[1], side, channels)
    other = _Window(place[2], place[3], side, channels)
    both = _inside(place[0], place[1], side, height, width) | _inside(
        place[2], place[3], side, height, width
    )
    had = (delta * both).square().sum((2, 3), keepdim=True)
    left = (eps**2 - _norm(delta).square()).clamp(min=0) / channels
    old = window.of(delta)
    signs = torch.sign(2 * drawn[:, 5:] - 1).to(x)[:, :, None, None]
    fresh = bump(side, drawn[:, 4] > 0.5).to(x) * signs + old / (
        1e-12 + old.square().sum((2, 3), keepdim=True).sqrt()
    )
    fresh = fresh / (1e-12 + fresh.square().sum((2, 3), keepdim=True).sqrt()) * (left + had).sqrt()
    delta = window.put(other.put(delta, torch.zeros_like(fresh)), fresh)
    return (x + unit(delta) * eps).clamp(0, 1)


class _Window:
    """One window of `side` pixels in each image, at corners int64 [m]."""

    def __init__(self, top: Tensor, left: Tensor, side: int, channels: int) -> None:
        steps = torch.arange(side, device=top.device)
        self.index = (
            torch.arange(len(top), device=top.device)[:, None, None, None],
            torch.arange(channels, device=top.device)[None, :, None, None],
            (top[:, None] + steps)[:, None, :, None],
            (left[:, None] + steps)[:, None, None, :],
        )

    def of(self, images: Tensor) -> Tensor:
        return images[self.index]

    def put(self, images: Tensor, values: Tensor) -> Tensor:
        return images.index_put(self.index, values)
