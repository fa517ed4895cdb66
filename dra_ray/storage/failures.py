"""What storage says when it fails: one line that names the URI, the cause and the remedy."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def unreachable(uri: str, error: Exception) -> str:
    reason = (
        getattr(error, "strerror", None) or str(error).splitlines()[0]
        if str(error)
        else type(error).__name__
    )
    return (
        f"storage '{uri}' cannot be reached or written ({reason}); check the path, permissions and "
        "credentials"
    )
