"""README's commands run as they are written, in order, from a clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
HEADING = "## A first sweep of your own"


def block(text: str, heading: str) -> list[str]:
    """The commands of the first indented block below a heading."""
    lines = iter(text.split(f"{heading}\n", 1)[1].splitlines())
    taken: list[str] = []
    for line in lines:
        if line.startswith("    "):
            taken.append(line.strip())
        elif taken:
            break
    return taken


def test_the_block_names_every_step() -> None:
    commands = block((HERE / "README.md").read_text(), HEADING)
    assert len(commands) > 8
    assert all(command.startswith("dra ") for command in commands)
    assert "dra recipes" in commands[0]


@pytest.mark.slow
def test_the_block_runs_from_a_clone(tmp_path: Path) -> None:
    clone = tmp_path / "dra_ray"
    subprocess.run(["git", "clone", "-q", str(HERE), str(clone)], check=True, timeout=60)
    shim = tmp_path / "bin" / "dra"  # what `source .venv/bin/activate` puts on the path
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m dra_ray "$@"\n')
    shim.chmod(0o755)
    script = "set -e\n" + "\n".join(block((clone / "README.md").read_text(), HEADING))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=clone,
        env=outside | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for run in ("digits-edm", "digits-synthesis", "digits-dm-at", "digits-dra", "digits-sweep"):
        assert (clone / "runs" / run / "manifest.json").exists(), run
    assert "points" in done.stdout  # of the comparison
    assert "runs/digits-sweep/report.html" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(".tar")  # of the bundle
    assert (clone / "digits-dra.tar").exists()
