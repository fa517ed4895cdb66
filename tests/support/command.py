"""The `dra` command in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def dra(folder: Path, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`dra ARGUMENTS` run in `folder`, whose output is kept."""
    return subprocess.run(
        [sys.executable, "-m", "dra_ray", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
