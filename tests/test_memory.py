"""Memory that a process of ours frees is its own again, without the system's help."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# a layer after the other, each of which takes and frees 8 MiB; page faults of ten rounds
PROGRAM = """
import resource, torch
from dra_ray import memory
{keep}
def layers():
    for _ in range(8):
        torch.ones(8 * 2**18).mul(2.0).add(1.0)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
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
