"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled
freely.
"""

from dra_ray.storage.archives import StoredArray, TarMember, stored_array, tar_member
from dra_ray.storage.store import Store, cache, sha256
from dra_ray.storage.unpickle import torch_from_bytes, unpickle

__all__ = [
    "Store",
    "StoredArray",
    "TarMember",
    "cache",
    "sha256",
    "stored_array",
    "tar_member",
    "torch_from_bytes",
    "unpickle",
]
