"""Every byte in or out: any fsspec URI, atomic writes, and nothing from outside is ever unpickled
freely.
"""

from dra_ray.storage.archives import (
    StoredArray,
    decoded_text,
    is_clutter,
    open_tar,
    readable_name,
    require_plausible,
    tar_content,
)
from dra_ray.storage.crc import combined
from dra_ray.storage.lease import Lease
from dra_ray.storage.plain_json import read_json
from dra_ray.storage.replies import ATTEMPTS
from dra_ray.storage.room import Held
from dra_ray.storage.store import Store, cache, held_bytes, sha256
from dra_ray.storage.unpickle import torch_from_bytes, unpickle
from dra_ray.storage.uris import credentials_problem, folder_name, masked, masked_tree

__all__ = [
    "ATTEMPTS",
    "Held",
    "Lease",
    "Store",
    "StoredArray",
    "cache",
    "combined",
    "credentials_problem",
    "decoded_text",
    "folder_name",
    "held_bytes",
    "is_clutter",
    "masked",
    "masked_tree",
    "open_tar",
    "read_json",
    "readable_name",
    "require_plausible",
    "sha256",
    "tar_content",
    "torch_from_bytes",
    "unpickle",
]
