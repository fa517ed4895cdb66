"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled
freely.
"""

from dra_ray.storage.archives import StoredArray
from dra_ray.storage.store import (
    Store,
    cache,
    decoded_text,
    is_clutter,
    open_tar,
    read_json,
    readable_name,
    require_plausible,
    sha256,
    tar_content,
)
from dra_ray.storage.unpickle import torch_from_bytes, unpickle

__all__ = [
    "Store",
    "StoredArray",
    "cache",
    "decoded_text",
    "is_clutter",
    "open_tar",
    "read_json",
    "readable_name",
    "require_plausible",
    "sha256",
    "tar_content",
    "torch_from_bytes",
    "unpickle",
]
