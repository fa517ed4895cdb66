"""A training run's rows as a TensorBoard event file beside its logs.

The file is a mirror: it holds each row of metrics.jsonl and steps.jsonl once, however often the run
was resumed. `tensorboard --logdir RUN` reads it, and with a sweep's folder all trials.

Format: TFRecords (length, checksum, content, checksum) of `tensorboard.Event` messages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from dra_ray import runs
from dra_ray.runs import RungRow, StepRow, ValidationRow
from dra_ray.storage import Store

EVENTS = "events.out.tfevents.dra"  # TensorBoard looks for "tfevents" in names
Row = ValidationRow | StepRow
# what a row says that is a curve; losses of a ValidationRow are means of training since the last
_LOSSES = ("loss", "loss_clean", "loss_robust", "loss_align", "lr")
_CURVES: dict[type[runs.Record], tuple[str, tuple[str, ...]]] = {
    ValidationRow: ("validation", ("clean_accuracy", "robust_accuracy", "images_seen", *_LOSSES)),
    StepRow: ("steps", (*_LOSSES, "images_per_s")),
    RungRow: ("rungs", ("clean_accuracy", "robust_accuracy", "epoch")),
}
_HEADER_BYTES, _CHECK_BYTES = 12, 4  # length uint64 and its checksum; checksum of the content


def curve(row: runs.Record) -> str:
    """The name before the slash of a row's curves."""
    return _CURVES[type(row)][0]


def scalars(row: runs.Record) -> dict[str, float]:
    """Value by name of curve, such as "validation/robust_accuracy"; what is None has none."""
    name, fields = _CURVES[type(row)]
    values = {f"{name}/{field}": getattr(row, field) for field in fields}
    return {tag: float(value) for tag, value in values.items() if value is not None}


def event(row: Row) -> bytes:
    """A row as one record of an event file."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
    return _record(Event(wall_time=row.at, step=row.step, summary=Summary(value=values)))


def _record(message: Event) -> bytes:
    content = message.SerializeToString()
    length = struct.pack("<Q", len(content))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + checks[0] + content + checks[1]


def _first(at: float) -> bytes:
    """Version 2 says that a step may come after a later one: a validation's row does."""
    return _record(Event(wall_time=at, file_version="brain.Event:2"))


def events(content: bytes) -> Iterator[tuple[Event, int]]:
    """The events of a file and where each ends; what follows a record that is cut off or damaged
    is left out.
    """
    start = 0
    while len(content) >= start + _HEADER_BYTES + _CHECK_BYTES:
        length = content[start : start + 8]
        begin = start + _HEADER_BYTES
        end = begin + struct.unpack("<Q", length)[0]
        checks = content[start + 8 : begin] + content[end : end + _CHECK_BYTES]
        if end + _CHECK_BYTES > len(content) or checks != b"".join(
            struct.pack("<I", masked_crc32c(part)) for part in (length, content[begin:end])
        ):
            return
        start = end + _CHECK_BYTES
        yield Event.FromString(content[begin:end]), start


class EventFile:
    """The event file of a run; a row that it holds already is not added again.

    On a disk each row is appended, as TensorBoard follows a file that grows; to an object store the
    file is sent whole, at validations and in `close`. Raises `StorageError` as `Store` does.
    """

    def __init__(self, file: Store) -> None:
        self._file = file
        written = file.read_dated()
        content = written[0] if written else b""
        self._rows: set[tuple[str, int]] = set()
        whole_bytes = 0
        for message, whole_bytes in events(content):  # noqa: B007 - the last end is what is whole
            if message.summary.value:
                self._rows.add((message.summary.value[0].tag.split("/")[0], message.step))
        self._content = content[:whole_bytes]
        if whole_bytes < len(content):  # its writer was killed within a row
            file.write_bytes(self._content)
        self._sent_bytes = whole_bytes

    def row(self, row: Row) -> None:
        key = (curve(row), row.step)
        if key in self._rows:
            return
        self._rows.add(key)
        self._content += event(row) if self._content else _first(row.at) + event(row)
        if self._file.is_local or isinstance(row, ValidationRow):
            self._send()

    def close(self) -> None:
        self._send()

    def _send(self) -> None:
        if self._sent_bytes == len(self._content):
            return
        if self._file.is_local:
            self._file.append_bytes(self._content[self._sent_bytes :])
        else:
            self._file.write_bytes(self._content)
        self._sent_bytes = len(self._content)


def logged(run: Store) -> list[Row]:
    """The rows of a run's logs, in order of time."""
    rows: list[Row] = [
        *runs.read_rows(run / runs.METRICS, ValidationRow),
        *runs.read_rows(run / runs.STEPS, StepRow),
    ]
    return sorted(rows, key=lambda row: row.at)


def mirror(run: Store) -> None:
    """Bring a run's event file up to its logs; while nothing trains it."""
    file = EventFile(run / EVENTS)
    for row in logged(run):
        file.row(row)
    file.close()
