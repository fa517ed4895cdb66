"""What this process's C library does with memory that is freed."""

from __future__ import annotations

import ctypes

# of malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, in bytes
_KEPT = {-1: 2**30, -2: 2**26, -3: 2**25}


def keep_freed() -> None:
    """Let this process keep up to a gigabyte that it frees.

    glibc gives what a layer frees back to the system at once, and the next layer takes it anew,
    page by page: 15,000 page faults in a step of a small student, 11,000 in a batch of a small
    teacher. Other C libraries have no `mallopt`, and blocks above its limit of 32 MiB are given
    back still.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, size in _KEPT.items():
            set_option(option, size)
