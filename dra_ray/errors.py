"""The one tree of errors. The command line prints `str(error)` as one line and exits with
`exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DraError(Exception):
    """Base of every error raised on purpose; its message names field, value and remedy."""

    exit_code = 1


class ConfigError(DraError):
    """The user asked for something that is misspelt, out of range or contradictory."""

    exit_code = 2


class StorageError(DraError):
    """A URI cannot be read or written."""

    exit_code = 2


class DataError(DraError):
    """Images, labels or shards are missing, damaged or do not fit the experiment."""

    exit_code = 2


class CheckpointError(DraError):
    """A checkpoint is missing, damaged or belongs to another architecture."""

    exit_code = 2


class PoolError(DraError):
    """The teacher pool could not answer in time; the run can be resumed."""


class RunError(DraError):
    """A workload failed while it ran; the message says which run can be resumed and how."""


class LeaseError(RunError):
    """Another driver has the run: it writes the run's files, and nobody else."""

    exit_code = 2


class StoppedError(RunError):
    """A job was stopped by somebody; the same command goes on with it."""

    exit_code = 3


class ClusterError(DraError):
    """A Ray cluster cannot be reached, or does not let us in."""

    exit_code = 2


class LastingError(RunError):
    """A workload failed in a way that comes again: starting the same command once more does not
    help.
    """


def is_lasting(error: BaseException) -> bool:
    """Whether the same work would fail alike again, unlike a lost node, a full cluster or a store
    that is away.
    """
    if isinstance(error, DraError):
        return isinstance(error, (LastingError, ConfigError, DataError, CheckpointError))
    return not isinstance(error, (OSError, KeyboardInterrupt, SystemExit, MemoryError))


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: ` (did you mean 'x'?)`, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
