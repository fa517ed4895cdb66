"""One driver at a time: a lease in the storage of a run, renewed while its driver lives.

Two drivers of one run would write over each other's records: a user who starts a command twice, a
job that the cluster retries while its first attempt still runs. The lease is a small object that is
only replaced by whoever knows its last version (`Store.replace`); each owner counts one attempt
further. No clock of another machine is trusted: a lease has expired once it was seen unchanged for
its whole term.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from dra_ray.errors import DataError, LeaseError, StorageError
from dra_ray.storage.plain_json import read_json, strict_json
from dra_ray.storage.store import Store

LEASE = "lease.json"
TERM_S = 30.0  # how long a driver that is gone is waited for
LONGEST_TERM_S = 3600.0  # of somebody else, who is waited for
STALE_TERMS = 4  # without a renewal a driver counts as gone in lists; leaves room for clocks
log = logging.getLogger("dra_ray")


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has a lease.

    Attributes:
        attempt: 1 for the first driver of a run, one more for each that took over.
        driver: differs between any two drivers.
        beat: counts renewals, so that each is another content.
        process: of the driver on its machine; None where that cannot be told.
        released: whether its driver has ended.
    """

    attempt: int
    driver: str
    machine: str
    process: str | None
    term_s: float
    beat: int = 0
    released: bool = False

    def text(self) -> bytes:
        return strict_json(dataclasses.asdict(self)).encode()

    def require_plain(self) -> None:
        """`ValueError` for values that no driver writes, such as a term without end."""
        texts = (self.driver, self.machine, self.process or "0")
        numbers = (self.attempt, self.beat, self.term_s)
        plain = all(isinstance(text, str) for text in texts) and all(
            isinstance(number, int | float) for number in numbers
        )
        if not plain or not 0 < self.term_s <= LONGEST_TERM_S:
            raise ValueError("not a driver's")
        int((self.process or "0").split(" ")[0])

    def is_gone(self) -> bool:
        """Whether it certainly does not run any more; without asking the storage again."""
        if self.released:
            return True
        if self.machine != _machine() or self.process is None:
            return False
        return _process(int(self.process.split()[0])) != self.process


def read(run: Store) -> tuple[Holder, str] | None:
    """The holder of a run's lease and the version of the object; None where there was none yet.

    Raises `DataError` for a damaged file.
    """
    content = (run / LEASE).read_versioned()
    if content is None:
        return None
    return _holder(run, content[0]), content[1]


def has_driver(run: Store) -> bool:
    """Whether a driver holds the run's lease, as far as one look tells: on this machine its process
    lives; on another one it renewed the lease lately, by that machine's clock and the store's.

    For people; whoever wants to take over enters a `Lease`. Raises `DataError` for a damaged file.
    """
    content = (run / LEASE).read_dated()
    if content is None:
        return False
    holder = _holder(run, content[0])
    if holder.is_gone():
        return False
    is_here = holder.machine == _machine() and holder.process is not None
    return is_here or time.time() - content[1] < STALE_TERMS * holder.term_s


def _holder(run: Store, content: bytes) -> Holder:
    try:
        fields: dict[str, Any] = read_json(content.decode())
        known = {field.name for field in dataclasses.fields(Holder)}
        holder = Holder(**{k: v for k, v in fields.items() if k in known})
        holder.require_plain()
        return holder
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError(f"'{run / LEASE}' is damaged; delete it") from None


class Lease:
    """A run's lease for the length of a `with` block.

    Entering takes it, if need be after a driver that is gone, and raises `LeaseError` while another
    driver lives. `require` raises `LeaseError` once another driver has taken over, so call it
    before writing what only the run's driver may write.

    Args:
        term_s: renewed every third of it; after so long without a renewal another driver may take
            over.
    """

    def __init__(self, run: Store, term_s: float = TERM_S) -> None:
        self._run, self._term_s = run, term_s
        self._holder = Holder(0, uuid.uuid4().hex, _machine(), _process(os.getpid()), term_s)
        self._version: str | None = None
        self._renewed_at = 0.0
        self._is_lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True, name="dra-lease")
        self._alone = threading.Lock()

    def __enter__(self) -> Lease:
        current = read(self._run)
        if current is not None and not current[0].is_gone():
            current = self._outlived(current)
        attempt = current[0].attempt + 1 if current else 1
        self._holder = dataclasses.replace(self._holder, attempt=attempt)
        if not self._write(self._holder, current[1] if current else None):
            raise self._refusal(read(self._run))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._is_lost:
            try:
                self._write(dataclasses.replace(self._holder, released=True), self._version)
            except StorageError as error:
                log.warning("%s; the next driver has to wait %g s", error, self._term_s)

    def require(self) -> None:
        """Raise `LeaseError` unless this driver still has the lease.

        Costs nothing while renewals succeed. A driver that was suspended past its term asks the
        storage before it goes on.
        """
        if not self._is_lost and time.monotonic() - self._renewed_at < self._term_s:
            return
        if not self._is_lost:
            self._renew()
        if self._is_lost:
            raise self._refusal(read(self._run))

    def _outlived(self, current: tuple[Holder, str]) -> tuple[Holder, str] | None:
        """The lease of a holder that was seen not to renew it for its term; `LeaseError` once it
        does.
        """
        holder, version = current
        log.warning(
            "'%s' has a driver on %s; waiting up to %g s to see whether it still lives",
            self._run,
            holder.machine,
            holder.term_s,
        )
        deadline = time.monotonic() + holder.term_s
        while time.monotonic() < deadline:
            time.sleep(min(holder.term_s / 10, 2.0))
            latest = read(self._run)
            if latest is None or latest[0].released:
                return latest
            if latest[1] != version:
                raise self._refusal(latest)
        return current

    def _refusal(self, current: tuple[Holder, str] | None) -> LeaseError:
        holder = current[0] if current else None
        where = f"{holder.machine}, process {holder.process}" if holder else "another machine"
        return LeaseError(
            f"run '{self._run}' has another driver ({where}); wait for it or stop it, then start "
            "the same command again"
        )

    def _write(self, holder: Holder, version: str | None) -> bool:
        began_at = time.monotonic()  # before the write: the term never begins too late
        written = (self._run / LEASE).replace(holder.text(), version)
        if written is None:
            return False
        self._version, self._renewed_at = written, began_at
        return True

    def _renew(self) -> None:
        with self._alone:
            if self._is_lost:
                return
            holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
            if self._write(holder, self._version):
                self._holder = holder
                return
            # a write whose answer was lost changes the version too
            current = read(self._run)
            if current is not None and current[0].driver == self._holder.driver:
                self._holder, self._version = current
                return
            self._is_lost = True

    def _repeat(self) -> None:
        while not self._stop.wait(self._term_s / 3):
            if self._is_lost:
                return
            try:
                self._renew()
            except (StorageError, DataError) as error:
                log.warning("%s; the hold on the run could not be renewed yet", error)


def _machine() -> str:
    """This machine since its last start: a process number says nothing about another one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "0"
    return f"{socket.gethostname()} {boot[:8]}"


def _process(number: int) -> str | None:
    """A process and when it started, as the number may be given again; None where there is none."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else f"{number} {fields[19]}"
