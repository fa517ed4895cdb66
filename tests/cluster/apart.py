"""Programs of the tests that need a Ray, or a process, of their own: they run apart, and hand one
value back through a file, since Ray prints to stdout as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dra_ray import cluster

ANSWER = "DRA_TEST_ANSWER"


def environment() -> dict[str, str]:
    """Of a process that starts a Ray of its own: without what the shared one of the tests has put
    there.
    """
    private = cluster.of_our_own()
    return {name: value for name, value in os.environ.items() if name not in private}


def play(module: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """What `python -m module arguments` gave to `answer`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment() | {ANSWER: str(file)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, (done.stdout[-1000:], done.stderr[-3000:])
        return json.loads(file.read_text())


def answer(value: dict[str, Any]) -> None:
    """Hand `value` to `play`; print it where a person has started the program."""
    if file := os.environ.get(ANSWER):
        Path(file).write_text(json.dumps(value))
    else:
        print(json.dumps(value))
