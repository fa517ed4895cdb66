"""Logs that grow without being rewritten: `name.jsonl`, then `name.1.jsonl`, `name.2.jsonl` and so
on, each written whole and atomically while it is the newest.

Object stores cannot append to an object. A log in one file would be sent again at every line, which
grows with the square of its length; in segments it grows in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator

from dra_ray.storage.store import Store

SEGMENT_BYTES = 64 * 1024  # one write of an object store, small enough to be sent at every line


def segment(file: Store, number: int) -> Store:
    """Segment `number` of a log, from 0: the file itself."""
    if not number:
        return file
    stem, dot, suffix = file.name.rpartition(".")
    name = f"{stem}.{number}.{suffix}" if dot else f"{file.name}.{number}"
    return Store(f"{file.uri.rstrip('/')[: -len(file.name)]}{name}")


def segments(file: Store, first: int = 0) -> Iterator[tuple[Store, str]]:
    """Each segment of a log and its text, in order; nothing where the log is not written yet.

    Segments are written in order, so the first one that is not there ends the log.
    """
    number = first
    while (part := segment(file, number)).exists():
        yield part, part.read_text()
        number += 1


class Lines:
    """The lines of a log, and the end of it that grows.

    Args:
        kept: the text of each segment that is there as it should be, which may be another than it
            is: what differs is written with the first line that is appended.
        changed: numbers of the segments of which that is so.
    """

    def __init__(self, file: Store, kept: list[str], changed: set[int]) -> None:
        self.file = file
        filled = [number for number, text in enumerate(kept) if text]
        self._number = filled[-1] if filled else 0
        self._text = kept[self._number] if kept else ""
        self.is_late = False  # a line waits to be written
        self._due = {number: kept[number] for number in sorted(changed) if number != self._number}

    def append(self, line: str) -> None:
        """Add a line, or several in one write. Raises `StorageError`; the next call then brings
        them too.
        """
        self._text += line + "\n"
        self.is_late = True
        self.write()

    def write(self) -> None:
        """Write what an earlier call could not; `StorageError` as `append` raises it."""
        if not self.is_late:
            return
        for number in list(self._due):
            segment(self.file, number).write_text(self._due[number])
            del self._due[number]
        segment(self.file, self._number).write_text(self._text)
        self.is_late = False
        if len(self._text) >= SEGMENT_BYTES:
            self._number, self._text = self._number + 1, ""
