"""Reading pickles and torch files from outside without running what they say."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from dra_ray.errors import DataError
from dra_ray.storage.archives import require_plausible

# what a reader of a pickle raises, such as Ray, where the file is empty or was cut
CUT_SHORT = (OSError, EOFError, pickle.UnpicklingError)


def torch_from_bytes(data: bytes, source: str) -> Any:
    """What `torch.save` wrote: tensors and plain containers; `DataError` naming `source` for
    anything else.

    Objects of classes of others beside the weights, such as a run's arguments, become plain dicts
    of what they hold: no code of theirs is imported or run.
    """
    import torch

    if kind := what_it_is(data):
        raise DataError(f"'{source}' is not a weights-only torch file: it is {kind}")
    try:
        if not _makes_bytes(data, source):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old pickle protocols
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception:  # in any way where the file is damaged; torch's advice is to trust the file
        pass
    try:
        return _torch_inertly(data)
    except Exception as error:
        known = isinstance(error, pickle.UnpicklingError) and str(error).startswith("it ")
        reason = (
            str(error).splitlines()[0] if known else "it is damaged, cut short or of another format"
        )
        raise DataError(
            f"'{source}' is not a weights-only torch file ({reason}); fetch it again from where "
            "you trust it"
        ) from None


def _makes_bytes(data: bytes, source: str) -> bool:
    """Whether `torch.load` might fill memory with a `bytearray` of as many zeros as the file names.

    It also unpacks whatever is compressed, so `DataError` where that is beyond any proportion.
    """
    if not data.startswith(b"PK"):
        return b"bytearray" in data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        require_plausible(source, sum(member.file_size for member in members), len(data))
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        return any(b"bytearray" in archive.read(member) for member in pickles)


class _StandIn:
    """What a pickle gets for a name: something to call, made anew for each file, with nothing that
    a pickle could replace for others.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)


def _load_bytearray8(unpickler: Any) -> None:
    """Reads first: Python's own reserves what the file declares before it reads."""
    (count,) = struct.unpack("<Q", unpickler.read(8))
    raw = unpickler.read(min(count, sys.maxsize))
    if len(raw) < count:
        raise pickle.UnpicklingError(f"it declares {count:,} bytes and ends before them")
    unpickler.append(bytearray(raw))


class _InertUnpickler(pickle._Unpickler):
    """Builds plain Python values, and asks only `stand_ins` for anything else.

    It is Python's own, not the one in C, which reserves memory for whatever memo index a few
    hostile bytes make up.
    """

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        # an object without arguments is made by calling its stand-in too, which is no class to make
        # an instance of
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,  # type: ignore[attr-defined]
        pickle.BYTEARRAY8[0]: _load_bytearray8,
    }

    def __init__(
        self, data: bytes | io.BytesIO, stand_ins: Mapping[str, Callable[..., Any]]
    ) -> None:
        stream = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
        super().__init__(stream, encoding="latin1")  # Python 2's strings, bytes included
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
    except Exception as error:  # the unpickler and the stand-ins can fail in any way
        first = what_it_is(data) or (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"'{source}' is not a pickle that can be read safely ({first}); fetch it again from "
            "where you trust it"
        ) from None


def what_it_is(data: bytes) -> str | None:
    """What a file plainly is that should hold weights but cannot, and the remedy; None where its
    first bytes say nothing.
    """
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "empty (0 bytes); fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer, not the file it points to; run `git lfs pull` where it comes from"
        )
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<script")):
        return "a web page (HTML), as a server sends it instead of a file; fetch the file itself"
    if head.startswith((b"<?xml", b"<error")):
        return "an XML document, as a server sends it with an error; fetch the file itself"
    if head.startswith((b"{", b"[")) and data[8:9] != b"{":
        return "JSON text, not weights; fetch the file itself"
    for magic, name in FORMATS.items():
        if data.startswith(magic):
            return f"{name}; give a file that torch.save or safetensors wrote"
    if len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return "a safetensors file; name it .safetensors"
    if data.startswith(b"PK"):
        return _kind_of_zip(data)
    return None


FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"(\xb5/\xfd": "compressed with zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89HDF": "an HDF5 file (of Keras, say)",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF file",
}


def _kind_of_zip(data: bytes) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "cut short or damaged; fetch it again"
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "a TorchScript archive; load it there and write its state_dict() with torch.save"
    if "data.pkl" in inner:
        return None
    first = ", ".join(names[:3]) or "none"
    return f"a zip archive of other files ({first}); give the weights inside it"


class Stray(dict[Any, Any]):
    """An object of a class that is not imported: a dict of its attributes, or of its items where it
    is a mapping.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.update(part)

    def append(self, item: Any) -> None:
        """Items of a list are not kept."""

    def extend(self, items: Any) -> None:
        """Items of a list are not kept."""


class _TorchUnpickler(_InertUnpickler):
    """Tensors and plain values of a `torch.save` file; any other object is a `Stray`.

    Args:
        storage: (dtype, key, number of elements) -> the flat tensor of that storage.
    """

    # names that no checkpoint has a use for: a file with one of them is refused, although it could
    # do nothing here
    HOSTILE: ClassVar = frozenset(
        {
            "os",
            "posix",
            "nt",
            "sys",
            "subprocess",
            "shutil",
            "socket",
            "importlib",
            "runpy",
            "pty",
            "ctypes",
        }
    )
    PLAIN: ClassVar = frozenset(
        {
            "set",
            "frozenset",
            "complex",
            "slice",
            "range",
            "bytearray",
            "object",
            "type",
            "dict",
            "list",
            "tuple",
        }
    )

    def __init__(self, stream: io.BytesIO, storage: Callable[[Any, str, int], Any]) -> None:
        import torch

        def tensor(flat: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
            return torch.as_strided(flat, tuple(size), tuple(stride), offset)

        def tensor_of_bytes(flat: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
            _grad, _hooks, dtype, *_ = rest
            return tensor(flat.view(dtype), offset, size, stride)

        stand_ins: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": tensor,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_tensor_v3": tensor_of_bytes,
            "torch._utils._rebuild_parameter": lambda value, *rest: value,
            "torch._utils._rebuild_parameter_with_state": lambda value, *rest: value,
            "torch._tensor._rebuild_from_type_v2": lambda make, kind, arguments, state: make(
                *arguments
            ),
            "torch.Size": tuple,
            "torch.device": lambda *parts: ":".join(map(str, parts)),
            "_codecs.encode": lambda text, encoding: text.encode(encoding),
        }
        super().__init__(stream, stand_ins)
        self._storage = storage
        self._dtypes = {
            f"torch.{name}": value
            for name, value in vars(torch).items()
            if isinstance(value, torch.dtype)
        }
        self._dtypes |= {
            f"torch.{kind}Storage": getattr(torch, name) for kind, name in STORAGES.items()
        }
        self._dtypes["torch.storage.UntypedStorage"] = torch.uint8

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._dtypes:
            return self._dtypes[full]
        if full in self._stand_ins:
            return super().find_class(module, name)
        if module.partition(".")[0] in self.HOSTILE or (
            module in ("builtins", "__builtin__") and name not in self.PLAIN
        ):
            raise pickle.UnpicklingError(f"it asks for {full}")
        return _StandIn(lambda *arguments: Stray())

    def persistent_load(self, pid: Any) -> Any:
        if (
            pid[0] == "module"
        ):  # (.., class, file, source): older files keep the source of a module's class
            return pid[1]
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("it shares storages in a way that PyTorch has given up")
        return self._storage(dtype, key, count)


STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "Untyped": "uint8",
}
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # of files before PyTorch 1.6


def _torch_inertly(data: bytes) -> Any:
    """As `torch.load` reads it, zip or older format, with strays in place of foreign objects."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _torch_zip(archive)
    stream = io.BytesIO(data)
    header = [_InertUnpickler(stream, {}).load() for _ in range(3)]
    if header[:2] != [TORCH_MAGIC, 1001] or not header[2]["little_endian"]:
        raise pickle.UnpicklingError("it was not written by torch.save on a usual machine")
    return _torch_stream(stream, len(data))


def _torch_zip(archive: zipfile.ZipFile) -> Any:
    import torch

    top = next(
        name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"
    ).removesuffix("data.pkl")
    flat: dict[str, Any] = {}

    def storage(dtype: Any, key: str, count: int) -> Any:
        if key not in flat:
            member = archive.getinfo(f"{top}data/{key}")
            if member.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("it is compressed")
            content = bytearray(archive.read(member))
            flat[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        return flat[key]

    pickled = archive.getinfo(f"{top}data.pkl")
    if pickled.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("it is compressed")
    return _TorchUnpickler(io.BytesIO(archive.read(pickled)), storage).load()


def _torch_stream(stream: io.BytesIO, limit: int) -> Any:
    """The pickle, a list of its storages' keys, and each storage: its number of elements, then
    their bytes.
    """
    import torch

    flat: dict[str, Any] = {}

    def storage(dtype: Any, key: str, count: int) -> Any:
        if key not in flat:
            if sum(kept.nbytes for kept in flat.values()) + count * dtype.itemsize > limit:
                raise pickle.UnpicklingError("it is cut short")
            flat[key] = torch.empty(count, dtype=dtype)
        return flat[key]

    value = _TorchUnpickler(stream, storage).load()
    for key in _InertUnpickler(stream, {}).load():
        count = int.from_bytes(stream.read(8), "little")
        content = bytearray(stream.read(count * flat[key].element_size()))
        flat[key].copy_(torch.frombuffer(content, dtype=flat[key].dtype))
    return value
