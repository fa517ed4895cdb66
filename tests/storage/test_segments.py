"""A log in segments reads as one file would, and costs a bounded write at every line."""

from __future__ import annotations

import fsspec
import pytest

from dra_ray import runs
from dra_ray.errors import StorageError
from dra_ray.pool.records import LogRow
from dra_ray.storage import Store
from dra_ray.storage.segments import SEGMENT_BYTES, segment, segments

NOTE = "n" * 300  # a row long enough that a few hundred fill segments
ROWS = 600


def row(number: int) -> LogRow:
    return LogRow(at=1000.0 + number, running=1, note=NOTE)


def numbers(file: Store) -> list[int]:
    return [round(row.at) - 1000 for row in runs.read_rows(file, LogRow)]


def test_a_segment_has_the_name_of_its_log() -> None:
    log = Store("s3://bucket/run.jsonl/rungs.jsonl")
    assert [segment(log, k).uri for k in (0, 1, 12)] == [
        "s3://bucket/run.jsonl/rungs.jsonl",
        "s3://bucket/run.jsonl/rungs.1.jsonl",
        "s3://bucket/run.jsonl/rungs.12.jsonl",
    ]


def test_many_rows_read_as_one_log_and_each_is_a_bounded_write() -> None:
    file, rows = Store("memory://many/log.jsonl"), 3 * SEGMENT_BYTES // len(NOTE)
    log = runs.Log(file, LogRow)
    for number in range(rows // 2):
        log.append(row(number))
    log = runs.Log(file, LogRow)  # another driver goes on
    for number in range(rows // 2, rows):
        log.append(row(number))

    assert numbers(file) == list(range(rows))
    assert [r.at for r in log.rows] == [row(number).at for number in range(rows)]
    sizes = [len(text) for _, text in segments(file)]
    assert len(sizes) >= 3
    assert max(sizes) < SEGMENT_BYTES + 2 * len(NOTE)


@pytest.mark.parametrize("kept", [0, 1, 200, 260, 500, 599])
def test_rows_taken_back_are_gone_from_every_segment(kept: int) -> None:
    file = Store(f"memory://taken-back-{kept}/log.jsonl")
    log = runs.Log(file, LogRow)
    for number in range(ROWS):
        log.append(row(number))

    log = runs.Log(file, LogRow, keep=lambda r: r.at < 1000 + kept)
    assert numbers(file) == list(range(ROWS))  # nothing is lost before there is something new
    for number in range(kept, kept + 3):
        log.append(row(number))

    assert numbers(file) == list(range(kept + 3))


def test_rows_that_could_not_be_written_come_with_the_next(tmp_path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    file = Store(str(tmp_path / "run" / "log.jsonl"))
    log = runs.Log(file, LogRow)
    for number in range(3):
        with pytest.raises(StorageError):
            log.append(row(number))
    (tmp_path / "run").unlink()
    log.append(row(3))
    assert numbers(file) == [0, 1, 2, 3]


def test_a_tail_sees_every_row_once_and_reads_only_the_end() -> None:
    file = Store("memory://tail/log.jsonl")
    log, tail = runs.Log(file, LogRow), runs.Tail(file, LogRow)
    seen: list[int] = []
    for number in range(ROWS):
        log.append(row(number))
        if number % 70 == 0:
            seen += [round(r.at) - 1000 for r in tail.new()]
    seen += [round(r.at) - 1000 for r in tail.new()]
    assert seen == list(range(ROWS))

    fsspec.filesystem("memory").rm_file("/tail/log.jsonl")  # the first segment is not looked at
    log.append(row(ROWS))
    assert [round(r.at) - 1000 for r in tail.new()] == [ROWS]


def test_a_tail_does_not_repeat_what_a_resumed_run_repeats(tmp_path) -> None:
    file = Store(str(tmp_path / "log.jsonl"))
    log, tail = runs.Log(file, LogRow), runs.Tail(file, LogRow)
    for number in range(5):
        log.append(row(number))
    assert len(tail.new()) == 5
    log = runs.Log(file, LogRow, keep=lambda r: r.at < 1003)
    for number in range(3, 7):
        log.append(row(number))
    assert [round(r.at) - 1000 for r in tail.new()] == [5, 6]
