"""A cluster's door against real sockets: who answers, with what, and how soon it is said."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dra_ray.errors import ClusterError, ConfigError
from dra_ray.submission import door

TOKEN = "0123456789abcdef"


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Lets in whoever has the token, as Ray's does; below /other it is something else."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        status = 401 if given is None else 200 if given == f"Bearer {TOKEN}" else 403
        self.send_response(302 if self.path.startswith("/other") else status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_right_token_opens(address: str) -> None:
    door.require_answer(address, door.authorization({"RAY_AUTH_TOKEN": TOKEN}))


def test_a_token_that_is_missing_or_wrong_is_said_without_it(address: str, tmp_path: Path) -> None:
    nowhere = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    with pytest.raises(ClusterError, match=r"HTTP 401.*RAY_AUTH_TOKEN.*~/\.ray/auth_token"):
        door.require_answer(address, door.authorization(nowhere))
    with pytest.raises(ClusterError, match=r"HTTP 403.*RAY_AUTH_TOKEN") as raised:
        door.require_answer(address, door.authorization({"RAY_AUTH_TOKEN": "hunter2"}))
    assert "hunter2" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_tokens_come_from_where_ray_takes_them(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    path = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    header = {"Authorization": f"Bearer {TOKEN}"}
    assert door.authorization(path) == header
    assert door.authorization(path | {"RAY_AUTH_TOKEN": "other"}) != header
    assert door.authorization(path | {"RAY_AUTH_MODE": "disabled"}) == {}
    with pytest.raises(ClusterError, match="the token in RAY_AUTH_TOKEN holds") as raised:
        door.authorization({"RAY_AUTH_TOKEN": "hunter2\r\nX: y"})
    assert "hunter2" not in str(raised.value)


def test_what_is_no_dashboard(address: str) -> None:
    with pytest.raises(ClusterError, match="HTTP 302, so it is no Ray dashboard"):
        door.require_answer(f"{address}/other", {})


@pytest.mark.seconds
def test_silence_is_said_within_ten_seconds() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        begun = time.monotonic()
        with pytest.raises(ClusterError, match="no answer in time"):
            door.require_answer(f"http://127.0.0.1:{deaf.getsockname()[1]}", {})
        assert time.monotonic() - begun < 10


def test_nobody_there() -> None:
    with pytest.raises(ClusterError, match="no connection.*--address"):
        door.require_answer("http://127.0.0.1:9", {})


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.1:6379", "ray://head:10001", "http://", "http://h/?token=x"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="--address"):
        door.checked(address)


def test_an_address_with_a_login_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="holds credentials") as raised:
        door.checked("http://me:hunter2@head:8265")
    assert "hunter2" not in str(raised.value)
