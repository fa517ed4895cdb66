"""Memory that a process of ours frees is its own again, without the system's help."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# a pass takes four blocks of 16 MiB, writes into them and gives them back; page faults of ten
# passes, after two. Without torch, whose own blocks would lie between them, at times in the way.
PROGRAM = """
import ctypes, resource
from dra_ray import memory
{keep}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, size = [ctypes.c_void_p], 2**24
def layers():
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    layers()
before = faults()
for _ in range(10):
    layers()
print(faults() - before)
"""


def _faults(keep: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_what_is_freed_is_kept() -> None:
    given_back, kept = _faults(""), _faults("memory.keep_freed()")
    assert kept < 1000 < given_back, (kept, given_back)
