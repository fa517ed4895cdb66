"""A real S3 server behind a proxy that cuts, flips and lengthens replies, or says that it is
busy.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import threading
from collections.abc import Iterator

SPOILT = {
    "short": lambda body: body[:-100],
    "empty": lambda body: b"",
    "long": lambda body: body + b"more",
    "flipped": lambda body: (
        body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
    ),
    "another": lambda body: bytes(len(body)),
    "broken off": lambda body: body[: len(body) // 2],  # after the whole length was announced
}


WAYS = ((503, "SlowDown"), "short", (500, "InternalError"), "flipped", "broken off")


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to `upstream`, and spoils the next `faults` replies that carry an object's
    bytes, as `kind` says."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.kind, self.faults = upstream, "", 0
        self.refusal: tuple[int, str] | None = None  # status and S3's code for every request
        self.requests = 0
        self.every = 0  # of requests, one in so many fails for a while, each time in another way

    def will(self, kind: str, faults: int) -> None:
        self.kind, self.faults = kind, faults


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def relay(self) -> None:
        self.server.requests += 1
        if self.server.refusal:
            self.refuse(*self.server.refusal)
            return
        turn, now = divmod(self.server.requests, self.server.every or 2**62)
        if turn and not now:
            kind = WAYS[turn % len(WAYS)]
            if isinstance(kind, tuple):
                self.refuse(*kind)
                return
            self.server.will(kind, 1)
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

    def refuse(self, status: int, code: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<Error><Code>{code}</Code><Message>It says {code}.</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay

    def log_message(self, *_: object) -> None:
        """Nothing: a test says what matters."""


@contextlib.contextmanager
def faulty_store(bucket: str) -> Iterator[Proxy]:
    """The server, with a bucket; the environment says where, as a user's would."""
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
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(bucket)
    try:
        yield server
    finally:
        for name, value in before.items():
            _ = os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        moto.stop()
