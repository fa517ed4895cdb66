"""Reading pickles and torch files from outside without running what they say."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from dra_ray.errors import DataError
from dra_ray.storage.store import _load_bytearray8


def torch_from_bytes(data: bytes, source: str) -> Any:
    """What `torch.save` wrote, weights only: tensors and plain containers; `DataError` naming
    `source` for anything else.
    """
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        refused = re.search(r"GLOBAL (\S+)", str(error))
        first = (
            f"it asks for {refused[1]}"
            if refused
            else (str(error) or type(error).__name__).splitlines()[0]
        )
        raise DataError(f"'{source}' is not a weights-only torch file ({first})") from None


class _StandIn:
    """What a pickle gets for a name: something to call, made anew for each file, with nothing that
    a pickle could replace for others.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)


class _InertUnpickler(pickle._Unpickler):
    """Builds plain Python values, and asks only `stand_ins` for anything else.

    It is Python's own, not the one in C, which reserves memory for whatever memo index a few
    hostile bytes make up.
    """

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        # an object without arguments is made by calling its stand-in too, which is no class to make
        # an instance of
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,  # type: ignore[attr-defined]
        pickle.BYTEARRAY8[0]: _load_bytearray8,
    }

    def __init__(self, data: bytes, stand_ins: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # Python 2's strings, bytes included
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _StandIn(self._stand_ins[f"{module}.{name}"])


def unpickle(data: bytes, source: str, stand_ins: Mapping[str, Callable[..., Any]]) -> Any:
    """The plain values of a pickle; `DataError` naming `source` for one that is damaged or names
    anything but `stand_ins`.

    A pickle calls what it names. Here a name such as "numpy.dtype" never leads to what it says but
    to its stand-in, which gets the arguments and should do no more than keep them, and every other
    name is refused; so nothing from the file runs.
    """
    try:
        return _InertUnpickler(data, stand_ins).load()
    except Exception as error:  # a damaged or hostile file can make the unpickler and the stand-ins fail in any way
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"'{source}' is not a pickle that can be read safely ({first}); fetch it again from "
            "where you trust it"
        ) from None
