"""Replies of remote stores: checked by length and checksum, and requested again where wrong."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec

from dra_ray.errors import StorageError
from dra_ray.storage import tally
from dra_ray.storage.archives import require_readable
from dra_ray.storage.failures import first_line

ATTEMPTS, WAITS_S = 4, (0.0, 0.1, 0.5)
T = TypeVar("T")


class WrongReply(Exception):
    """What a store sent is not what it holds; the message says in what."""


def repeated(uri: str, read: Callable[[], T]) -> T:
    """What `read` returns, called again where a reply is wrong or breaks off; `StorageError` naming
    `uri` after ATTEMPTS."""
    for wait_s in (*WAITS_S, None):
        try:
            return read()
        except Exception as error:
            if not isinstance(error, WrongReply) and not re.search(
                "Payload|Incomplete|Streaming|Checksum|Disconnected", type(error).__name__
            ):
                raise
            if wait_s is None:
                tally.add("errors")
                raise StorageError(
                    f"'{uri}' came back wrong {ATTEMPTS} times, the last time with "
                    f"{first_line(error)}; check the network and the store"
                ) from None
            tally.add("retries")
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def whole(
    fs: fsspec.AbstractFileSystem, path: str, uri: str, digest: str | None, at_most: int | None
) -> bytes:
    info = fs.info(path)
    require_readable(uri, int(info["size"] or 0), at_most)
    data: bytes = fs.cat_file(path)
    check_reply(fs, path, info, len(data), lambda kind: hashlib.new(kind, data).hexdigest(), digest)
    return data


def check_reply(
    fs: fsspec.AbstractFileSystem,
    path: str,
    info: Mapping[str, Any],
    length: int,
    hashed: Callable[[str], str],
    digest: str | None,
) -> None:
    """`WrongReply` unless a whole file of this length, and of these hashes by their names, is what
    `info` and `digest` say."""
    problem, size, md5 = "", info.get("size"), _stored_md5(fs, info)
    if size is not None and length != int(size):
        problem = f"{length:,} bytes instead of {int(size):,}"
    elif digest:
        problem = (
            ""
            if hashed("sha256") == digest
            else "contents of another SHA-256 than the one that was recorded"
        )
    elif md5 and hashed("md5") != md5 and not _has_other_etag(fs, path):
        problem = "contents of another MD5 than the store gives"
    if problem:
        fs.invalidate_cache()  # what was known of the file may be older than the file
        raise WrongReply(problem)


def _stored_md5(fs: fsspec.AbstractFileSystem, info: Mapping[str, Any]) -> str | None:
    """The MD5 of the contents in hex, where the store gives it: S3's ETag of what was uploaded in
    one part, GCS's md5Hash."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    etag = str(info.get("ETag") or "").strip('"')
    if protocols & {"s3", "s3a"} and re.fullmatch("[0-9a-f]{32}", etag):
        return etag
    return (
        base64.b64decode(info["md5Hash"]).hex()
        if protocols & {"gs", "gcs"} and info.get("md5Hash")
        else None
    )


def _has_other_etag(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether S3 encrypts the object with a key of KMS or of the customer: its ETag is then no MD5
    (S3 API, Object)."""
    try:
        bucket, key, _ = fs.split_path(path)
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    except Exception:  # a store that cannot say has not said that it does
        return False
    return (
        str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        or "SSECustomerAlgorithm" in head
    )
