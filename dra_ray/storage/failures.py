"""What storage says when it fails or takes long: one line with the URI, the cause and the remedy.

Drivers raise errors of their own (botocore, aiohttp, google.auth, ...), which are no `OSError`.
They are told apart by the names of their classes, so that no driver is imported for it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dra_ray.errors import DraError, StorageError
from dra_ray.storage import tally
from dra_ray.storage.uris import masked

log = logging.getLogger("dra_ray")
FIRST_WARNING_S, NEXT_WARNING_S = 5.0, 30.0


class Place(Protocol):
    """What is reached: its URI, and whether that is on this machine's file systems."""

    @property
    def uri(self) -> str: ...
    @property
    def is_local(self) -> bool: ...


S = TypeVar("S", bound=Place)
P = ParamSpec("P")
R = TypeVar("R")


def explained(
    what: str,
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Decorates methods that reach a store to do `what`, such as "read".

    Whatever a driver raises becomes a `StorageError`, and a wait is said on the log, first after
    FIRST_WARNING_S. Local reads are not watched: they are many and short.
    """

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def call(place: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            watched = not place.is_local or what == "write"
            with _watched(place.uri, what) if watched else contextlib.nullcontext():
                try:
                    return method(place, *args, **kwargs)
                except DraError:
                    raise
                except Exception as error:
                    if not isinstance(error, FileNotFoundError):
                        tally.add("errors")
                    raise StorageError(unreachable(place.uri, error, what == "write")) from None

        return call

    return decorate


_inside = threading.local()  # only the outermost of nested calls is watched


@contextlib.contextmanager
def _watched(uri: str, what: str) -> Iterator[None]:
    if getattr(_inside, "call", False):
        yield
        return
    done, began_s = threading.Event(), time.monotonic()

    def watch() -> None:
        wait_s = FIRST_WARNING_S
        while not done.wait(wait_s):
            log.warning(
                "still waiting to %s storage '%s', for %.0f s so far: it is large, or the store is "
                "slow or busy and is requested again",
                what,
                masked(uri),
                time.monotonic() - began_s,
            )
            wait_s = NEXT_WARNING_S

    threading.Thread(target=watch, daemon=True, name="dra-storage-watch").start()
    _inside.call = True
    try:
        yield
    finally:
        _inside.call = False
        done.set()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# what the class names and codes of drivers have in common -> the remedy, the first that fits
_REMEDIES = (
    (
        "NoCredentials|PartialCredentials|CredentialRetrieval|DefaultCredentials|TokenRetrieval"
        "|UnauthorizedSSO|SSOToken|RefreshError",
        "set credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS",
    ),
    ("ProfileNotFound|ConfigNotFound|ConfigParse", "check AWS_PROFILE and the AWS config files"),
    ("ParamValidation|InvalidBucketName", "check the URI, which has to be s3://BUCKET/FOLDER"),
    (
        "Checksum|Payload|IncompleteRead|ResponseStreaming|Disconnected|ResponseParser|BadDigest",
        "check the network and the store",
    ),
    (
        "SlowDown|ServiceUnavailable|Throttl|TooManyRequests|reduce your request rate"
        "|Service Unavailable|InternalError|Internal Server Error|Bad Gateway|status=5",
        "the store is busy or broken; try again later",
    ),
    (
        "EndpointConnection|ConnectTimeout|ReadTimeout|ConnectionRefused|ConnectionReset|Connector"
        "|ConnectionClosed|ConnectionError|ProxyConnection|SSLError|TimeoutError|gaierror"
        "|InvalidURL|InvalidEndpoint|HTTPClient",
        "check the network, the URI and the endpoint, such as AWS_ENDPOINT_URL",
    ),
    ("NoRegion|InvalidRegion", "set AWS_DEFAULT_REGION"),
)
_OF_ERRNO = {
    errno.ENOSPC: "free space on its disk, or choose a larger one",
    errno.EDQUOT: "free space in the quota, or choose another disk",
    errno.EROFS: "choose a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def unreachable(uri: str, error: Exception, writing: bool = False) -> str:
    """The one line for what a driver raised."""
    uri, cause = masked(uri), error.__cause__ or error.__context__
    # fsspec's http:// turns every status into this error
    missing = isinstance(error, FileNotFoundError) and getattr(cause, "status", 404) in (404, 410)
    if missing and not writing:
        return f"'{uri}' does not exist; check the URI"
    # a driver's own error is often behind the OSError that it is turned into
    names = [kind.__name__ for kind in type(error).__mro__]
    names += [type(cause).__name__, str(cause)] if cause else []
    words = " ".join([*names, str(error)])
    remedy = _OF_ERRNO.get(getattr(error, "errno", None) or 0) or next(
        (remedy for pattern, remedy in _REMEDIES if re.search(pattern, words)),
        "check the path, permissions and credentials",
    )
    told = cause if isinstance(error, FileNotFoundError) and cause and not missing else error
    reason = masked(getattr(told, "strerror", None) or first_line(told)).rstrip(".")
    return f"storage '{uri}' cannot be reached or written ({reason}); {remedy}"
