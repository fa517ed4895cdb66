"""A function on two workers: two processes that talk to each other over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def on_two(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)`, a function of a module, returns on either worker: tensors and
    plain containers. Its errors are raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (folder, work, arguments), nprocs=2)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]


def _worker(rank: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    try:
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
