"""What the workers of one run tell each other, over torch.distributed. A process without fellows
keeps what it has.

All workers must call the same function with tensors of the same shapes, in the same order; several
tensors travel as one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor


def count() -> int:
    """How many workers there are."""
    return (
        torch.distributed.get_world_size()
        if torch.distributed.is_available() and torch.distributed.is_initialized()
        else 1
    )


def total(tensor: Tensor) -> Tensor:
    """The sum over all workers."""
    return totals([tensor])[0]


def totals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over all workers of each tensor."""
    return _exchanged(tensors, torch.distributed.all_reduce)


def agreed(answer: bool, device: torch.device) -> bool:
    """Worker 0's answer, for all workers."""
    flag = torch.tensor([float(answer)], device=device)
    share_([flag])
    return bool(flag.item())


def average_(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its mean over all workers."""

    def average(flat: Tensor) -> None:
        torch.distributed.all_reduce(flat)
        flat /= count()

    _replace(tensors, average)


def share_(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes what worker 0 has."""
    _replace(tensors, lambda flat: torch.distributed.broadcast(flat, 0))


def gathered(tensor: Tensor) -> Tensor:
    """[W,...]: every worker's tensor, in the order of their ranks."""
    if count() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(count())]
    torch.distributed.all_gather(parts, tensor)
    return torch.stack(parts)


def joined(rows: Tensor) -> tuple[Tensor, int]:
    """(every worker's rows [b,...] in the order of their ranks, the place of this worker's first);
    their numbers may differ.
    """
    if count() == 1:
        return rows, 0
    sizes = gathered(torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
    missing = rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])
    parts = gathered(torch.cat([rows, missing]))
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return whole, sum(sizes[: torch.distributed.get_rank()])


def _exchanged(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> list[Tensor]:
    """What `exchange` makes in place of all tensors in a row; the tensors themselves where there is
    nobody to exchange with.
    """
    if count() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    exchange(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _replace(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    if count() > 1:
        for tensor, new in zip(tensors, _exchanged(tensors, exchange), strict=True):
            tensor.copy_(new)
