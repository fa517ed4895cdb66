"""The snippets of docs/api.md run as they are written, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HERE / "docs" / "api.md").read_text(), re.DOTALL)


def run(code: str, cwd: Path, timeout_s: float) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=outside | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_needs_no_ray(tmp_path: Path) -> None:
    said = run(snippets()[0] + "\nimport sys; assert 'ray' not in sys.modules", tmp_path, 120)
    assert "steps" in said.splitlines()[0]
    assert "minutes" in said.splitlines()[0]


@pytest.mark.slow
def test_the_whole_story(tmp_path: Path) -> None:
    said = run("\n".join(snippets()), tmp_path, 800)
    assert "under AutoAttack on 40 images" in said
    assert "'baseline': 'trial-0" in said
    assert "report.html" in said
    assert (tmp_path / "runs" / "many" / "report.html").exists()
