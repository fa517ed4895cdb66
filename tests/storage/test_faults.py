"""A real S3 server behind a proxy that cuts, flips and lengthens replies: they are requested again,
or refused by URI."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from dra_ray.errors import StorageError
from dra_ray.storage import ATTEMPTS, Store

CONTENT = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8).tobytes()
SPOILT = {
    "short": lambda body: body[:-100],
    "empty": lambda body: b"",
    "long": lambda body: body + b"more",
    "flipped": lambda body: (
        body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
    ),
    "another": lambda body: bytes(len(body)),
    "broken off": lambda body: body[: len(body) // 2],  # after the whole length was announced
    "whole": lambda body: CONTENT,  # where a range was requested
}


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to `upstream`, and spoils the next `faults` replies that carry an object's
    bytes, as `kind` says."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.kind, self.faults = upstream, "", 0

    def will(self, kind: str, faults: int) -> None:
        self.kind, self.faults = kind, faults


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def relay(self) -> None:
        upstream = http.client.HTTPConnection(*self.server.upstream)
        upstream.request(
            self.command,
            self.path,
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            dict(self.headers),
        )
        reply = upstream.getresponse()
        body, length = reply.read(), reply.getheader("Content-Length")
        if (
            self.command == "GET"
            and reply.status in (200, 206)
            and "list-type" not in self.path
            and self.server.faults
        ):
            self.server.faults -= 1
            body = SPOILT[self.server.kind](body)
            length = length if self.server.kind == "broken off" else str(len(body))
            self.close_connection = self.server.kind == "broken off"
        self.send_response(reply.status)
        for name, value in reply.getheaders():  # not every store keeps checksums beside the ETag
            if (
                name.lower()
                not in ("content-length", "transfer-encoding", "connection", "date", "server")
                and "checksum" not in name.lower()
            ):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay

    def log_message(self, *_: object) -> None:
        """Nothing: a test says what matters."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    import s3fs
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    server = Proxy(moto.get_host_and_port())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("faults")
    Store("s3://faults/x.bin").write_bytes(CONTENT)
    yield server
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    moto.stop()


FILE = Store("s3://faults/x.bin")
WHOLE, RANGE, COPY = (
    (lambda: FILE.read_bytes()),
    (lambda: FILE.read_bytes(1000, 5000)),
    (lambda: FILE.local_copy().read_bytes()),
)
READS = {"whole": (WHOLE, CONTENT), "range": (RANGE, CONTENT[1000:6000]), "copy": (COPY, CONTENT)}
# a range has no checksum of its own, so that only its length can be wrong
CASES = [(read, kind) for read in ("whole", "copy") for kind in SPOILT if kind != "whole"]
CASES += [("range", kind) for kind in SPOILT if kind not in ("flipped", "another")]


@pytest.mark.parametrize(("read", "kind"), CASES)
def test_wrong_replies_are_requested_again(
    proxy, tmp_path, monkeypatch, read: str, kind: str
) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path))
    call, content = READS[read]
    for faults in (0, 1, ATTEMPTS - 1):
        for copy in tmp_path.glob("*"):
            copy.unlink()
        proxy.will(kind, faults)
        assert call() == content
        assert proxy.faults == 0


# without replies that break off: s3fs itself repeats these for 9 s
@pytest.mark.parametrize(("read", "kind"), [case for case in CASES if case[1] != "broken off"])
def test_replies_that_stay_wrong_are_refused(
    proxy, tmp_path, monkeypatch, read: str, kind: str
) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path))
    proxy.will(kind, 1000)
    with pytest.raises(
        StorageError, match=r"'s3://faults/x\.bin' came back wrong 4 times"
    ) as caught:
        READS[read][0]()
    assert "\n" not in str(caught.value)
    assert not [name for name in Store(str(tmp_path)).names() if name.endswith("x.bin")]
    proxy.will("", 0)


def test_a_range_may_end_with_the_file(proxy) -> None:
    proxy.will("", 0)
    assert FILE.read_bytes(len(CONTENT) - 10, 100) == CONTENT[-10:]


def test_a_recorded_digest_is_held(proxy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path))
    right, wrong = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(b"").hexdigest()
    assert FILE.read_bytes(digest=right) == FILE.local_copy(right).read_bytes() == CONTENT
    for copy in tmp_path.glob("*"):
        copy.unlink()
    for read in (FILE.read_bytes, FILE.local_copy):
        with pytest.raises(StorageError, match="another SHA-256 than the one that was recorded"):
            read(digest=wrong)


def test_an_object_of_several_parts_has_no_md5(proxy) -> None:
    """Its ETag ends in the number of parts; only its length can be checked."""
    import s3fs

    parts = s3fs.S3FileSystem()
    content = CONTENT * 60
    with parts.open("s3://faults/parts.bin", "wb", block_size=5 * 2**20) as file:
        file.write(content)
    assert "-" in parts.info("faults/parts.bin")["ETag"]
    assert Store("s3://faults/parts.bin").read_bytes() == content
    proxy.will("short", 1)
    assert Store("s3://faults/parts.bin").read_bytes() == content
