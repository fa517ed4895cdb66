"""URIs and names: which are refused before they are used, and how they are shown."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from dra_ray.errors import ConfigError, DataError, StorageError

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"})
MASK = "***"
NAME_BYTES = 200  # file systems allow 255, and a run's name gets endings

# A password may hold slashes, as AWS's secrets do; digits before a slash are a port.
_LOGIN = re.compile(r"(?<=:/)(/*)[^\s/@:]*:(?!\d{1,5}(?:/|$))\S*@")
# A user alone is a token to these; to abfs:// and sftp:// it is a container or a person.
_USER = re.compile(r"\b((?:https?|s3a?|gs|gcs):/+)[^\s/@]+@")
# The signs may be written as %3F, %26, %3D. No name reaches beyond the next sign: it would be read
# again from each, in a time that grows with the square of a text's length.
_FIELD = re.compile(
    r"(?:(?<=[?&;#])|(?<=%3F)|(?<=%26))((?:(?!%3[DF]|%26)[^\s=&;#?'\"])+)(?:=|%3D)", re.IGNORECASE
)
_VALUE = re.compile(r"[^\s&;#'\"]+")
_SECRET = re.compile(
    r"(^|[^a-z])(sig|signature|key|auth|jwt|code|pass|pw|sas|hmac|ak|sk)($|[^a-z])|token|secret|"
    r"passw|pwd|credential|signature|apikey|accesskey|authorization|session",
    re.IGNORECASE,
)
_AS_URI = re.compile(r"[a-z0-9+.-]:/", re.IGNORECASE)
_SHOWN = 20  # characters of a scheme


def masked(text: str) -> str:
    """The same URI, or text with URIs in it, with `***` for logins before '@' and for secrets in
    queries; in a time that grows with its length."""
    if not _AS_URI.search(text):
        return text
    text = _USER.sub(rf"\1{MASK}@", _without_logins(text))
    shown, after = [], 0
    for field in _FIELD.finditer(text):
        if field.start() < after or not _is_secret(field[1]):
            continue
        if value := _VALUE.match(text, field.end()):
            shown += [text[after : field.end()], MASK]
            after = value.end()
    return "".join([*shown, text[after:]])


def _without_logins(text: str) -> str:
    """A login is looked for up to a word's last '@' alone: each ':' before that may begin one."""
    words = re.split(r"(\s+)", text)
    for number, word in enumerate(words):
        head, sign, tail = word.rpartition("@")
        if sign:
            words[number] = _LOGIN.sub(rf"\1{MASK}@", f"{head}@") + tail
    return "".join(words)


def masked_tree(value: Any) -> Any:
    """The same tree of mappings and lists, its texts as `masked` shows them; `DataError` where it
    has no end in sight."""
    try:
        return _masked_tree(value)
    except RecursionError:
        raise DataError("a manifest is nested too deeply; restore the file") from None


def _masked_tree(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: _masked_tree(item) for key, item in value.items()}
    return [_masked_tree(item) for item in value] if isinstance(value, list | tuple) else value


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(urllib.parse.unquote(name)))


def credentials_problem(uri: str) -> str | None:
    """What is wrong with a URI that holds credentials, and the remedy, without them; else None.

    They would stay in every manifest and report that names the URI.
    """
    joined = "".join(uri.split())  # a login may hold spaces, which end a URI inside a text
    if masked(joined) == joined:
        return None
    scheme = joined.partition(":")[0][:_SHOWN]
    return (
        f"the URI '{scheme}://{MASK}' holds credentials, which manifests and reports would keep; "
        "leave them out, credentials come from the environment (such as AWS_ACCESS_KEY_ID)"
    )


def require_no_credentials(uri: str) -> None:
    """`StorageError`, which does not show them, for a URI with credentials."""
    if problem := credentials_problem(uri):
        raise StorageError(problem)


def require_named(uri: str) -> None:
    """`StorageError` for an empty URI: a folder below it would lie in the root of the disk."""
    if not uri.strip():
        raise StorageError("a storage URI is empty; give a folder, such as '.' for this one")


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
        raise StorageError(f"storage URI '{masked(uri.partition('?')[0])}': {problem}")


def folder_name(name: str, option: str = "--name") -> str:
    """`name`, which is one folder's and stays in its storage; `ConfigError` naming `option` for any
    other."""
    problem = ""
    if not name.strip():
        problem = "it is empty"
    elif not name.isprintable():
        problem = "it holds control characters or what cannot be printed"
    elif "/" in name or "\\" in name or "::" in name:
        problem = "it is a path, not one folder"
    elif not name.strip("."):
        problem = "it leaves the storage"
    elif name != name.strip():
        problem = "it begins or ends with a space"
    elif set(name) & set("?*[]#%"):
        problem = "it holds one of ?*[]#%, which mean something else in URIs"
    elif len(name.encode()) > NAME_BYTES:
        problem = f"it has {len(name.encode()):,} bytes, at most {NAME_BYTES} are possible"
    if problem:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise ConfigError(
            f"{option} {shown!r}: {problem}; choose a name such as 'digits-2', and the folder "
            "around it with --storage"
        )
    return name
