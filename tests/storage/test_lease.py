"""One driver at a time, on a disk and on S3: a second is refused, or takes over after the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dra_ray.errors import DataError, LeaseError
from dra_ray.storage import Lease, Store
from dra_ray.storage.lease import LEASE, Holder, read

TERM_S = 1.0


@pytest.fixture(params=["disk", "s3", "memory"])
def run(request: pytest.FixtureRequest, tmp_path, s3_bucket) -> Store:
    return Store(
        {
            "disk": str(tmp_path / "run"),
            "s3": f"{s3_bucket}/{tmp_path.name}",
            "memory": f"memory://{tmp_path.name}",
        }[request.param]
    )


@pytest.mark.seconds
def test_only_who_knows_the_version_replaces(run: Store) -> None:
    file = run / "object"
    assert file.read_versioned() is None
    first = file.replace(b"one", None)
    assert first is not None
    assert file.replace(b"two", None) is None
    assert file.replace(b"two", "another") is None
    assert file.read_versioned() == (b"one", first)
    second = file.replace(b"two", first)
    assert second not in (None, first)
    assert file.replace(b"three", first) is None
    assert file.read_versioned() == (b"two", second)


@pytest.mark.parametrize("writers", [8])
def test_of_many_at_once_one_wins(run: Store, writers: int) -> None:
    if run.uri.startswith("memory"):
        pytest.skip("fsspec's memory store has no conditional write")
    file, start = run / "object", threading.Barrier(writers)
    won: list[int] = []

    def write(number: int) -> None:
        start.wait()
        if file.replace(f"{number}".encode(), None):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    content = file.read_versioned()
    assert content is not None
    assert content[0] == str(won[0]).encode()


@pytest.mark.seconds
def test_a_second_driver_is_refused_while_the_first_lives(run: Store) -> None:
    with Lease(run, TERM_S) as first:
        with pytest.raises(LeaseError, match="another driver"), Lease(run, TERM_S):
            pass
        time.sleep(1.5 * TERM_S)  # renewed meanwhile
        first.require()
    assert attempt(run) == 1
    with Lease(run, TERM_S):
        assert attempt(run) == 2


def attempt(run: Store) -> int:
    held = read(run)
    assert held is not None
    return held[0].attempt


HOLD = """
import sys, time
from dra_ray.storage import Lease, Store
with Lease(Store(sys.argv[1]), float(sys.argv[2])) as lease:
    print("held", flush=True)
    time.sleep(60)
"""


def holder(run: Store) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run.uri, str(TERM_S)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline().strip() == "held"
    return process


@pytest.mark.seconds
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_after_a_kill_the_next_takes_over_at_once_on_the_same_machine(
    place: str, tmp_path, s3_bucket: str
) -> None:
    run = Store(str(tmp_path / "run") if place == "disk" else f"{s3_bucket}/{tmp_path.name}-kill")
    process = holder(run)
    process.kill()
    process.wait()
    began = time.monotonic()
    with Lease(run, TERM_S):
        assert time.monotonic() - began < TERM_S
        assert attempt(run) == 2


@pytest.mark.seconds
def test_after_another_machine_is_gone_its_term_is_waited_for(run: Store) -> None:
    away = Holder(4, driver="x", machine="elsewhere", process="1 2", term_s=TERM_S)
    (run / LEASE).replace(away.text(), None)
    began = time.monotonic()
    with Lease(run, TERM_S):
        assert time.monotonic() - began >= TERM_S
        assert attempt(run) == 5


GO_ON = """sys.stdin.readline()
    try:
        lease.require()
        print("wrote", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def test_a_driver_that_was_suspended_stops_writing_once_another_has_taken_over(tmp_path) -> None:
    """SIGSTOP: its threads renew nothing; when it goes on, it asks before it writes."""
    run = Store(str(tmp_path))
    code = HOLD.replace("time.sleep(60)", GO_ON)
    process = subprocess.Popen(
        [sys.executable, "-c", code, run.uri, str(TERM_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline().strip() == "held"
    os.kill(process.pid, signal.SIGSTOP)
    with Lease(run, TERM_S):
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "LeaseError"
    process.wait(timeout=30)


@pytest.mark.seconds
def test_a_store_that_was_away_ends_no_lease(tmp_path) -> None:
    """A file stands in the folder's place for twice the term; the thread that renews goes on."""
    run, aside = tmp_path / "run", tmp_path / "aside"
    with Lease(Store(str(run)), TERM_S) as lease:
        run.rename(aside)
        run.write_text("a file where the folder should be")
        time.sleep(2 * TERM_S)
        run.unlink()
        aside.rename(run)
        before = read(Store(str(run)))
        time.sleep(TERM_S)
        after = read(Store(str(run)))
        assert before is not None
        assert after is not None
        assert after[0].beat > before[0].beat
        lease.require()


def test_who_has_lost_the_lease_is_refused_and_releases_nothing(run: Store) -> None:
    with Lease(run, TERM_S) as lease:
        held = read(run)
        assert held is not None
        usurper = held[0].text().replace(held[0].driver.encode(), b"somebody else")
        while (run / LEASE).replace(usurper, held[1]) is None:
            held = read(run)
            assert held is not None
        time.sleep(1.5 * TERM_S)  # longer than its last renewal is trusted
        with pytest.raises(LeaseError):
            lease.require()
    left = read(run)
    assert left is not None
    assert left[0].driver == "somebody else"  # not released by who has lost it


def lease_of(**changes: object) -> bytes:
    fields = {"attempt": 1, "driver": "a", "machine": "b", "process": "1 2", "term_s": 1.0}
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{}", b"\xff", b'{"attempt": 1}', b"[" * 50_000, lease_of(process=5),
        lease_of(process="x"), lease_of(term_s="1"), lease_of(term_s=1e12), lease_of(term_s=-1),
        lease_of(term_s=float("nan")), lease_of(attempt=None), lease_of(machine=[]),
    ],
)  # fmt: skip
def test_a_damaged_lease_is_told(tmp_path, text: bytes) -> None:
    (tmp_path / LEASE).write_bytes(text)
    with pytest.raises(DataError, match="delete it"), Lease(Store(str(tmp_path))):
        pass
