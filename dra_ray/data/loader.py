"""Batch t of the plan, as tensors on the device: from a set that lives there whole, or read ahead
in the background.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dra_ray.data.batches import BatchPlan
from dra_ray.data.pictures import CHUNK, Pictures, Split, picture_bytes

# Real and synthetic images up to this size live on the device as one uint8 tensor: CIFAR with 1
# million synthetic images takes 3.2 GB of it
RESIDENT_BYTES = 4 * 2**30


class Batches:
    """`get(t)` is this worker's slice `mine` of batch t, a pure function of (plan, t): any step may
    be asked for, in any order, repeatedly.

    Larger sets than `resident_bytes` are read by one background thread, which works on steps t+1 to
    t+`ahead` while step t trains. What fails there is raised by the `get` of that step. Call
    `close` at the end.
    """

    def __init__(
        self,
        real: Pictures,
        synthetic: Pictures | None,
        plan: BatchPlan,
        device: torch.device,
        mine: slice,
        *,
        ahead: int = 2,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self._sets = [real] if synthetic is None else [real, synthetic]
        assert [len(pictures) for pictures in self._sets] == [
            plan.real_images,
            plan.synthetic_images,
        ][: len(self._sets)]
        self._plan, self._device, self._mine, self._ahead = plan, torch.device(device), mine, ahead
        self._resident: Split | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._near: list[int] = []
        self._under_way: dict[int, Future[tuple[Tensor, Tensor]]] = {}
        if sum(map(picture_bytes, self._sets)) <= resident_bytes:
            self._resident = self._on_device()
        else:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def _on_device(self) -> Split:
        """All images one after another, brought over in parts, so that sets on disk never lie in
        the host's memory whole.
        """
        if len(self._sets) == 1 and isinstance(self._sets[0], Split):
            return Split(
                self._sets[0].images.to(self._device), self._sets[0].labels.to(self._device)
            )
        images = torch.empty(
            (sum(map(len, self._sets)), *self._sets[0].picture_shape),
            dtype=torch.uint8,
            device=self._device,
        )
        labels = torch.empty(len(images), dtype=torch.int64, device=self._device)
        start = 0
        for pictures in self._sets:
            for rows in torch.arange(len(pictures)).split(CHUNK):
                place = slice(start, start + len(rows))
                part = pictures.take(rows)
                images[place], labels[place] = (tensor.to(self._device) for tensor in part)
                start += len(rows)
            pictures.close()
        return Split(images, labels)

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """images uint8 [b,C,H,W] and labels int64 [b] on the device."""
        if self._resident is not None:
            return self._resident.take(self._plan.indices(step)[self._mine].to(self._device))
        assert self._thread is not None
        wanted = range(step, step + self._ahead + 1)
        for other in self._under_way.keys() - set(wanted):
            self._under_way.pop(other).cancel()
        for coming in wanted:
            if coming not in self._under_way:
                self._under_way[coming] = self._thread.submit(self._read, coming)
        images, labels = self._under_way.pop(step).result()
        return images.to(self._device, non_blocking=True), labels.to(
            self._device, non_blocking=True
        )

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        near = self._plan.near(step)
        if near != self._near:
            self._near = near
            self._sets[-1].fetch(near)
        chosen = self._plan.indices(step)[self._mine]
        batch = self._gathered(chosen)
        return (
            (batch[0].pin_memory(), batch[1].pin_memory()) if self._device.type == "cuda" else batch
        )

    def _gathered(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at indices into real and synthetic images together."""
        images = torch.empty((len(chosen), *self._sets[0].picture_shape), dtype=torch.uint8)
        labels = torch.empty(len(chosen), dtype=torch.int64)
        start = 0
        for pictures in self._sets:
            inside = (chosen >= start) & (chosen < start + len(pictures))
            images[inside], labels[inside] = pictures.take(chosen[inside] - start)
            start += len(pictures)
        return images, labels

    def close(self) -> None:
        """Stop reading ahead; waits for the batch that is being read."""
        self._under_way.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        for pictures in self._sets:
            pictures.close()
