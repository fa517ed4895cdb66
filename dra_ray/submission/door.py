"""A cluster's door: its address, the token, and one question that is answered within seconds. No
Ray here, which takes seconds to import. The token goes into requests alone.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping

import requests

from dra_ray.errors import ClusterError, ConfigError
from dra_ray.storage import Store, credentials_problem

CONNECT_S, ANSWER_S = 3.0, 4.0


def opened(address: str) -> tuple[str, dict[str, str]]:
    """The address of a cluster's dashboard, and the headers with which it lets us in.

    Raises `ConfigError` for what is no address, `ClusterError` where nobody answers there or it
    does not let us in.
    """
    address, headers = checked(address), authorization()
    require_answer(address, headers)
    return address, headers


def checked(address: str) -> str:
    if problem := credentials_problem(address):
        raise ConfigError(f"--address: {problem.partition('; ')[0]}; leave them out")
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(
            f"--address '{address}' is not the URL of a Ray dashboard; give one such as "
            "http://127.0.0.1:8265"
        )
    return address.rstrip("/")


def authorization(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Headers with the token that Ray itself would use; none where there is none, or where
    RAY_AUTH_MODE says another way.
    """
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token, where = environment.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not token:
        path = environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
        file = Store(path).resolved()
        if not file.exists():
            return {}
        token, where = file.read_bytes().decode("utf-8", "replace").strip(), f"'{path}'"
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ClusterError(f"the token in {where} holds spaces or signs that no token has")
    return {"Authorization": f"Bearer {token}"}


def require_answer(address: str, headers: Mapping[str, str]) -> None:
    """One question to the dashboard, with an answer within seconds."""
    try:
        answer = requests.get(
            f"{address}/api/version",
            headers=headers,
            timeout=(CONNECT_S, ANSWER_S),
            allow_redirects=False,
        )
    except requests.RequestException as error:
        raise unanswered(address, error) from None
    if answer.status_code in (401, 403):
        raise not_let_in(address, answer.status_code)
    if answer.status_code != 200:
        raise ClusterError(
            f"'{address}' answers with HTTP {answer.status_code}, so it is no Ray dashboard; check "
            "--address"
        )


def not_let_in(address: str, status: int) -> ClusterError:
    if status == 401:
        return ClusterError(
            f"the cluster at '{address}' wants a token and got none (HTTP 401); set RAY_AUTH_TOKEN "
            "or put it into ~/.ray/auth_token"
        )
    return ClusterError(
        f"the cluster at '{address}' does not take this token (HTTP {status}); check "
        "RAY_AUTH_TOKEN, which comes before ~/.ray/auth_token"
    )


def unanswered(address: str, error: Exception) -> ClusterError:
    """Without the error's own words, which may quote what was sent."""
    if isinstance(error, requests.exceptions.SSLError):
        reason = "its certificate is not accepted"
    elif isinstance(error, requests.Timeout):
        reason = "no answer in time"
    else:
        reason = "no connection"
    return ClusterError(
        f"no Ray dashboard answers at '{address}' ({reason}); check --address, and that the port "
        "is forwarded (`ray dashboard cluster.yaml`)"
    )
