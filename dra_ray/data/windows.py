"""Which images of a set in shards a run draws, and when: by windows, so that few shards are needed
at any time.

A pass goes through all shards in a random order, window by window; of a window as many images are
drawn as it holds. Where the images of a set were shuffled when it was written, the few shards of a
window are a fair sample of it. Draw number d is a pure function of (seed, d).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dra_ray.data.random import Stream, generator

# Windows of draws with replacement: a batch of k out of n images holds about k*k/2n pairs of the
# same image, so that k/2000 are expected, one in three batches of 700
BATCHES_WITH_REPLACEMENT = 1000
BATCHES_WITHOUT = 8
WHOLE_BYTES = 2**32  # sets up to this size have no windows unless the config says so
LEAST_BYTES = 2**28  # eight shards of 32 MB
# The first windows are smaller, 1/64 of the size and then twice as large every time: a run may
# begin once the first few shards have come
DOUBLINGS = 6


class _Window(NamedTuple):
    first: int  # the draw of its pass with which it begins
    shards: np.ndarray  # int64, in the order of the pass


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Draws from a set whose shard i holds the positions `offsets[i]` to `offsets[i + 1]` - 1.

    images: what a window holds at least, but for the first ones and where the set is smaller.
    """

    seed: int
    offsets: np.ndarray  # int64
    images: int
    replace: bool

    @property
    def count(self) -> int:
        return int(self.offsets[-1])

    def draws(self, first: int, count: int) -> Tensor:
        """Positions int64 [count] of the draws from number `first` on."""
        parts = []
        while count:
            number, place = divmod(first, self.count)
            window, position = self._at(number, place)
            sizes = self._sizes(window.shards)
            taken = min(count, window.first + int(sizes.sum()) - place)
            rows = self._rows(number, position, int(sizes.sum()), place - window.first, taken)
            parts.append(self._positions(window.shards, sizes, rows))
            first, count = first + taken, count - taken
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def near(self, first: int) -> list[int]:
        """Numbers of the shards of the window in which draw `first` lies, and of the next one."""
        number, place = divmod(first, self.count)
        window, position = self._at(number, place)
        following = _windows(self, number)[position + 1 :] or _windows(self, number + 1)
        shards = [*window.shards.tolist(), *following[0].shards.tolist()]
        return list(dict.fromkeys(shards))

    def _at(self, number: int, place: int) -> tuple[_Window, int]:
        """The window of pass `number` in which its draw `place` lies, and which one it is."""
        windows = _windows(self, number)
        position = bisect.bisect_right(windows, place, key=lambda window: window.first) - 1
        return windows[position], position

    def _sizes(self, shards: np.ndarray) -> np.ndarray:
        sizes: np.ndarray = self.offsets[shards + 1] - self.offsets[shards]
        return sizes

    def _rows(self, number: int, window: int, size: int, begin: int, count: int) -> Tensor:
        """Of the images of a window, which its draws from `begin` on are."""
        if not self.replace:
            return _permutation(size, self.seed, number, window)[begin : begin + count]
        drawn = generator(self.seed, Stream.WINDOW_DRAWS, number, window, begin)
        return torch.randint(size, (count,), generator=drawn)

    def _positions(self, shards: np.ndarray, sizes: np.ndarray, rows: Tensor) -> Tensor:
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, rows.numpy(), side="right")
        begins = self.offsets[shards] - (ends - sizes)
        return torch.from_numpy(rows.numpy() + begins[which])


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int, number: int, window: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, Stream.WINDOW_ROWS, number, window))


@functools.lru_cache(maxsize=4)
def _windows(windows: Windows, number: int) -> list[_Window]:
    """The windows of a pass: shards in their order, as many as it takes; a remainder of less than
    half a window joins the one before.
    """
    shards = len(windows.offsets) - 1
    drawn = generator(windows.seed, Stream.WINDOW_ORDER, number)
    order = torch.randperm(shards, generator=drawn).numpy()
    ends = np.cumsum(windows._sizes(order))
    found: list[_Window] = []
    begin = 0
    while begin < shards:
        first = int(ends[begin - 1]) if begin else 0
        growing = 0 if number or windows.images >= windows.count else DOUBLINGS - len(found)
        size = max(windows.images >> max(growing, 0), 1)
        end = min(int(np.searchsorted(ends, first + size)) + 1, shards)
        if windows.count - int(ends[end - 1]) < size / 2:
            end = shards
        found.append(_Window(first, order[begin:end]))
        begin = end
    return found


def suited(row_bytes: int, per_batch: int, replace: bool) -> int:
    """Images of a window, for batches that draw `per_batch` of them."""
    batches = BATCHES_WITH_REPLACEMENT if replace else BATCHES_WITHOUT
    return max(batches * per_batch, -(-LEAST_BYTES // row_bytes))
