"""URIs: which are refused before they are used."""

from __future__ import annotations

import re

from dra_ray.errors import StorageError

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"})


def require_plain(uri: str) -> None:
    """`StorageError` for a URI of an object store whose parts would silently become part of the
    objects' names."""
    scheme, separator, rest = uri.partition("://")
    problem = ""
    if not separator:
        if slip := re.match(r"([a-z][a-z0-9]+):/(?!/)", uri):
            problem = f"it is neither a path nor a URI; write {slip[1]}://"
    elif scheme in OBJECT_STORES and "::" not in uri:
        if "?" in rest:
            problem = (
                "what follows '?' would become part of a name; leave it out, credentials come from "
                "the environment"
            )
        elif not rest or rest.startswith("/"):
            problem = f"it names no bucket; write {scheme}://BUCKET/FOLDER"
        elif "//" in rest:
            problem = "it has a folder without a name between two slashes; write one slash"
    if problem:
        raise StorageError(f"storage URI '{uri.partition('?')[0]}': {problem}")
