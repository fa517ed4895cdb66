"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled
freely.
"""

from dra_ray.storage.archives import StoredArray, TarMember, stored_array, tar_member
from dra_ray.storage.store import (
    ATTEMPTS,
    DATA_FACTS,
    HEADER_BYTES,
    MOST_EXPANSION,
    SMALL_BYTES,
    TEXT_BYTES,
    WAITS_S,
    Seekable,
    Store,
    T,
    cache,
    decoded_text,
    is_clutter,
    open_tar,
    readable_name,
    require_plausible,
    sha256,
    tar_content,
)
from dra_ray.storage.unpickle import torch_from_bytes, unpickle

__all__ = [
    "ATTEMPTS",
    "DATA_FACTS",
    "HEADER_BYTES",
    "MOST_EXPANSION",
    "SMALL_BYTES",
    "TEXT_BYTES",
    "WAITS_S",
    "Seekable",
    "Store",
    "StoredArray",
    "T",
    "TarMember",
    "cache",
    "decoded_text",
    "is_clutter",
    "open_tar",
    "readable_name",
    "require_plausible",
    "sha256",
    "stored_array",
    "tar_content",
    "tar_member",
    "torch_from_bytes",
    "unpickle",
]
