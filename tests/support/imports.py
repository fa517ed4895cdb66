"""What a process must not import, since it takes seconds."""

from __future__ import annotations

import subprocess
import sys


def without(module: str, code: str) -> None:
    """Assert that a new process that runs `code` does not import `module`."""
    code = f"import sys\n{code}\nsys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
