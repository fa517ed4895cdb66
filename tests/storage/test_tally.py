"""What a process did with stores is counted, and a file that is not there is no error."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec
import pytest

from dra_ray.errors import StorageError
from dra_ray.storage import Store, held_bytes, tally


def since(before: dict[tally.Event, int]) -> dict[str, int]:
    return {
        event: count - before[event]
        for event, count in tally.sums().items()
        if count != before[event]
    }


def test_failures_are_counted_once_and_missing_files_never(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    before = tally.sums()
    with pytest.raises(StorageError):
        (Store(str(tmp_path)) / "file" / "below").write_bytes(b"x")
    assert since(before) == {"errors": 1}
    with pytest.raises(StorageError):
        (Store(str(tmp_path)) / "nowhere").read_bytes()
    assert since(before) == {"errors": 1}


def test_the_first_copy_is_fetched_and_the_next_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    content = bytes(range(256)) * 40
    with fsspec.open("memory://tally/shard.npy", "wb") as file:
        file.write(content)
    shard, digest = Store("memory://tally/shard.npy"), hashlib.sha256(content).hexdigest()
    before = tally.sums()
    assert held_bytes() == 0
    first = shard.held(digest)
    assert since(before) == {"cache_misses": 1, "fetched_bytes": len(content)}
    second = shard.held(digest)
    assert since(before) == {"cache_misses": 1, "fetched_bytes": len(content), "cache_hits": 1}
    assert held_bytes() == len(content)
    assert Store(second.path).read_bytes() == content
    first.release()
    second.release()
    shard.local_copy()
    shard.local_copy()
    assert since(before)["cache_hits"] == 2
