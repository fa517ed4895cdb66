"""What analyses found out that was dear: attacks, features, autoencoders; each under a name that
says all that it depends on, so that another analysis, or the same one after a kill, finds it there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dra_ray.errors import DataError, StorageError
from dra_ray.storage import Store


@dataclasses.dataclass(frozen=True)
class Kept:
    """A folder of results by name; without one nothing is kept."""

    store: Store | None = None

    def tensors(
        self, name: str, compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """What is there under `name`, or what `compute` returns and is there from then on; a
        damaged file is made again.
        """
        if self.store is None:
            return compute()
        file = self.store / f"{name}.safetensors"
        if (found := _read(file, file.read_tensors)) is not None:
            return dict(found)
        made = compute()
        file.write_tensors(made)
        return made

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """The same of plain JSON values."""
        if self.store is None:
            return compute()
        file = self.store / f"{name}.json"
        if (found := _read(file, file.read_json)) is not None:
            return found
        made = compute()
        file.write_json(made)
        return made

    def has(self, name: str) -> bool:
        """Whether tensors are there under `name`; whether they can be read is seen later."""
        return self.store is not None and (self.store / f"{name}.safetensors").is_file()


def _read(file: Store, read: Callable[[], Any]) -> Any:
    if not file.is_file():
        return None
    try:
        return read()
    except (DataError, StorageError):
        return None


def identity(*parts: object) -> str:
    """A name for a result: 32 hexadecimal digits that change with any of `parts`, which are
    tensors, networks (by their weights), or plain values.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(str(part).encode())
            for key, tensor in part.state_dict().items():
                _add(digest, key, tensor)
        elif isinstance(part, Tensor):
            _add(digest, "", part)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _add(digest: Any, key: str, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous()
    digest.update(f"{key} {values.dtype} {list(values.shape)}\n".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
