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
    """The events of a file and where each ends, up to a record that is cut off. Checks lengths and
    not contents: a writer that was killed leaves the start of a record.
    """
    start = 0
    while len(content) >= start + _HEADER_BYTES + _CHECK_BYTES:
        length = content[start : start + 8]
        begin = start + _HEADER_BYTES
        end = begin + struct.unpack("<Q", length)[0]
        if content[start + 8 : begin] != struct.pack("<I", masked_crc32c(length)):
            return
        if end + _CHECK_BYTES > len(content):
            return
        start = end + _CHECK_BYTES
        yield Event.FromString(content[begin:end]), start


class EventFile:
    """The event file of a run; a row that it holds already is not added again.

    On a disk `send` appends, as TensorBoard follows a file that grows; to an object store it sends
    the file whole. Raises `StorageError` as `Store` does.
    """

    def __init__(self, file: Store) -> None:
        self.file = file
        written = file.read_dated()
        content = written[0] if written else b""
        self._rows: set[tuple[str, int]] = set()
        whole_bytes = 0
        for message, whole_bytes in events(content):  # noqa: B007 - the last end is what is whole
            if message.summary.value:
                self._rows.add((message.summary.value[0].tag.split("/")[0], message.step))
        if whole_bytes < len(content):  # its writer was killed within a row
            file.write_bytes(content[:whole_bytes])
        self._is_new = not whole_bytes
        self._sent = b"" if file.is_local else content[:whole_bytes]
        self._due = b""

    def add(self, row: Row) -> None:
        key = (curve(row), row.step)
        if key not in self._rows:
            self._rows.add(key)
            self._due += _first(row.at) + event(row) if self._is_new else event(row)
            self._is_new = False

    def send(self) -> None:
        if not self._due:
            return
        if self.file.is_local:
            self.file.append_bytes(self._due)
        else:
            self.file.write_bytes(self._sent + self._due)
            self._sent += self._due
        self._due = b""


class Mirror:
    """Brings a run's event file up to its logs, which somebody else writes; a look reads what is
    new.
    """

    def __init__(self, run: Store) -> None:
        self._events = EventFile(run / EVENTS)
        self._validations = runs.Tail(run / runs.METRICS, ValidationRow)
        self._steps = runs.Tail(run / runs.STEPS, StepRow)

    def look(self) -> None:
        rows: list[Row] = [*self._validations.new(), *self._steps.new()]
        for row in sorted(rows, key=lambda row: row.at):
            self._events.add(row)
        self._events.send()


def logged(run: Store) -> list[Row]:
    """The rows of a run's logs, in order of time."""
    rows: list[Row] = [
        *runs.read_rows(run / runs.METRICS, ValidationRow),
        *runs.read_rows(run / runs.STEPS, StepRow),
    ]
    return sorted(rows, key=lambda row: row.at)
