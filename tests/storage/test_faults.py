"""A real S3 server behind a proxy that cuts, flips and lengthens replies, or says that it is busy:
requested again, or refused by URI, cause and remedy."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dra_ray.errors import DataError, StorageError
from dra_ray.storage import ATTEMPTS, Store
from dra_ray.storage.failures import FIRST_WARNING_S, explained
from dra_ray.storage.store import S3_REQUESTS, S3_ROUNDS
from tests.support.s3 import SPOILT, Proxy, faulty_store

CONTENT = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with faulty_store("faults") as server:
        Store("s3://faults/x.bin").write_bytes(CONTENT)
        yield server


FILE = Store("s3://faults/x.bin")
WHOLE, RANGE, COPY = (
    (lambda: FILE.read_bytes()),
    (lambda: FILE.read_bytes(1000, 5000)),
    (lambda: FILE.local_copy().read_bytes()),
)
HELD, RANGES = (
    (lambda: Store(FILE.held(hashlib.sha256(CONTENT).hexdigest()).path).read_bytes()),
    (lambda: FILE.read_ranges([(1000, 2000), (3000, 3000)]).tobytes()),
)
READS = {"whole": (WHOLE, CONTENT), "range": (RANGE, CONTENT[1000:6000]), "copy": (COPY, CONTENT)}
READS |= {"held": (HELD, CONTENT), "ranges": (RANGES, CONTENT[1000:6000])}
# that a part has other contents, no checksum tells
CASES = [
    (read, kind)
    for read in READS
    for kind in SPOILT
    if read != "ranges" or kind not in ("flipped", "another")
]


@pytest.mark.parametrize(("read", "kind"), CASES)
def test_wrong_replies_are_requested_again(
    proxy, tmp_path, monkeypatch, read: str, kind: str
) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path))
    call, content = READS[read]
    for faults in (0, 1, ATTEMPTS - 1):
        monkeypatch.setenv("DRA_CACHE", str(tmp_path / str(faults)))
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
    assert not [name for name in Store(str(tmp_path)).files() if name.endswith("x.bin")]
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


# -- failures: one class, with the URI, the cause and the remedy -----------------------------------
USES: dict[str, Callable[[Store], object]] = {
    "exists": Store.exists,
    "names": Store.names,
    "files": Store.files,
    "size": Store.size,
    "read_bytes": Store.read_bytes,
    "range": lambda store: store.read_bytes(0, 5),
    "write_bytes": lambda store: store.write_bytes(b"1"),
    "probe": Store.probe,
    "local_copy": Store.local_copy,
    "read_json": Store.read_json,
    "read_npz": Store.read_npz,
    "read_torch": Store.read_torch,
    "write_json": lambda store: store.write_json({}),
}


def fails(use: str, uri: str, words: str) -> None:
    """`use` raises one line that names the URI and matches `words`, and exits with 2."""
    with pytest.raises(StorageError, match=words) as caught:
        USES[use](Store(uri))
    line = str(caught.value)
    assert uri in line
    assert "\n" not in line
    assert caught.value.exit_code == 2


@pytest.fixture
def aws(proxy, monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Sets the environment of a test, for which s3fs makes its connections anew."""
    import s3fs

    for kept in ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(kept, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    proxy.refusal = None
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("use", USES)
def test_missing_credentials_are_said(aws, tmp_path, use: str) -> None:
    aws.setenv("HOME", str(tmp_path))
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    began_s = time.monotonic()
    fails(use, "s3://faults/x.bin", "credentials.*set credentials in the environment")
    assert time.monotonic() - began_s < 10


# each waits for botocore's own attempts
@pytest.mark.parametrize(
    ("use", "login"),
    [
        ("names", "user:SeCrEt9@"),
        pytest.param("write_bytes", "user:SeCrEt9@", marks=pytest.mark.slow),
        pytest.param("exists", "user:SeCrEt9@", marks=pytest.mark.slow),
        ("write_bytes", ""),
    ],
)
def test_an_endpoint_that_does_not_answer_is_said(aws, use: str, login: str) -> None:
    aws.setenv("AWS_ENDPOINT_URL", f"http://{login}127.0.0.1:9")
    fails(use, "s3://faults/x.bin", "(?s)^(?!.*SeCrEt9).*AWS_ENDPOINT_URL")


@pytest.mark.parametrize("use", ["names", "write_bytes", "read_bytes", "exists"])
@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AccessDenied", "permissions and credentials"),
        (400, "ExpiredToken", "permissions and credentials"),
        (400, "NobodyKnowsThis", "check the path"),
    ],
)
def test_refusals_are_said(aws, proxy, use: str, status: int, code: str, remedy: str) -> None:
    proxy.refusal = (status, code)
    fails(use, "s3://faults/x.bin", remedy)


def test_a_bucket_that_is_not_possible(aws) -> None:
    fails("write_bytes", "s3://a bucket!/x", "s3://BUCKET/FOLDER")


def test_a_busy_store_is_said_within_10_s_and_given_up(aws, proxy, caplog) -> None:
    proxy.refusal, proxy.requests = (503, "SlowDown"), 0
    began_s = time.monotonic()
    fails("write_bytes", "s3://faults/x.bin", "the store is busy or broken; try again later")
    took_s = time.monotonic() - began_s
    assert took_s < 40
    assert proxy.requests == S3_ROUNDS * S3_REQUESTS
    warnings = [record for record in caplog.records if record.name == "dra_ray"]
    # the pauses between requests are random: only a wait that is long has to be said
    assert took_s < FIRST_WARNING_S or warnings
    for record in warnings:
        assert "still waiting to write storage 's3://faults/x.bin'" in record.getMessage()
        assert record.created - (time.time() - took_s) < 10 + took_s


def test_a_wait_is_said(caplog) -> None:
    class Slow:
        uri, is_local = "s3://u:SeCrEt9@bucket/x", False

        @explained("read")
        def nap(self) -> None:
            time.sleep(FIRST_WARNING_S + 0.5)

    Slow().nap()
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "still waiting to read storage 's3://***@bucket/"
    ]


@pytest.mark.parametrize("use", ["read_bytes", "local_copy", "size"])
def test_other_drivers_errors_are_said_too(aws, proxy, use: str) -> None:
    """aiohttp's are no `OSError`; that of the file system http:// is what fsspec raises."""
    proxy.refusal = (500, "InternalError")
    fails(use, f"http://127.0.0.1:{proxy.server_address[1]}/faults/x.bin", "cannot be reached")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Store]:
    """A file system of 1 MiB; skips where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("this user cannot mount a file system")
    yield Store(str(folder))
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_at_once(small_disk, aws) -> None:
    file, began_s = small_disk / "a.bin", time.monotonic()
    file.write_bytes(b"before")
    with pytest.raises(StorageError, match=r"a\.bin.*No space left.*free space") as caught:
        file.write_bytes(bytes(2**21))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began_s < 5
    assert file.read_bytes() == b"before"
    assert small_disk.names() == ["a.bin"]
    aws.setenv("DRA_CACHE", small_disk.uri)
    (remote := Store("s3://faults/large.bin")).write_bytes(bytes(2**21))
    with pytest.raises(StorageError, match="room for .*DRA_CACHE"):
        remote.local_copy()
    with pytest.raises(StorageError, match=r"no room for it.*DRA_CACHE.*synthetic\.window_images"):
        remote.held(hashlib.sha256(bytes(2**21)).hexdigest())


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"[" * 100_000, b"9" * 5000, b'{"a": ', b"\x89PNG\r\n"]
)
def test_what_is_no_json_is_one_line(tmp_path, content: bytes) -> None:
    file = Store(str(tmp_path / "a.json"))
    file.write_bytes(content)
    for read in (file.read_json, file.read_jsonl):
        with pytest.raises(DataError, match=r"a\.json") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
