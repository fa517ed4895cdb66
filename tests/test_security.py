"""Wherever we start or describe a cluster, a token is needed by our own word, not by Ray's default;
and the guides name what we depend on.
"""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from dra_ray import cluster

ROOT = Path(__file__).parents[1]
DESCRIBING = sorted(
    path
    for pattern in ("*.md", "*.yaml", "docs/*.md", "jobs/*.py", "dashboards/**/*.md")
    for path in ROOT.glob(pattern)
)
COMMAND = re.compile(r"\bray (?:start|job submit|attach)\b[^`\n]* --")


def test_a_cluster_of_our_own_says_that_it_wants_a_token() -> None:
    """Whatever Ray's default is, or the user's environment: each start has a token of its own."""
    first, second = cluster.of_our_own(), cluster.of_our_own()
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch("[0-9a-f]{64}", first["RAY_AUTH_TOKEN"])
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert first["RAY_ADDRESS"].startswith("127.0.0.1:")


@pytest.mark.parametrize("path", DESCRIBING, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_we_describe_says_so_too(path: Path) -> None:
    text = path.read_text()
    for command in COMMAND.finditer(text):
        before = text[max(0, command.start() - 600) : command.start()]
        assert "RAY_AUTH_MODE=token" in before, command[0]
    assert not re.search(r"RAY_AUTH_MODE[=: ]+(disabled|none|off)", text)
    assert not re.search(r"dashboard-host[= ]+(?!127\.0\.0\.1)\S", text)


def test_some_of_it_describes_a_cluster() -> None:
    told = [path.name for path in DESCRIBING if COMMAND.search(path.read_text())]
    assert {"README.md", "cluster.yaml"} <= set(told)
    assert "ssh -N -L 8265:127.0.0.1:8265" in (ROOT / "README.md").read_text()


def test_the_floor_of_ray_is_above_what_its_advisories_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ray = next(line for line in project["dependencies"] if line.startswith("ray["))
    floor = re.search(r">=(\d+)\.(\d+)", ray)
    assert floor
    assert (int(floor[1]), int(floor[2])) >= (2, 54)


def test_every_dependency_has_its_licence() -> None:
    licences = runpy.run_path(str(ROOT / ".ci" / "licences.py"))
    text = licences["FILE"].read_text()
    rows = re.findall(r"^\| (\S+) \| (.+?) \| \S+ \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == licences["dependencies"]()
    assert {name: said for name, said in rows if said != licences["licence"](name)} == {}
