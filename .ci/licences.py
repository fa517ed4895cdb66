"""The table of docs/licences.md from pyproject.toml and what is installed: `make licences`."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "licences.md"
TITLES = "| package | licence | looked at |"
TROVE = "License :: OSI Approved :: "
# what packages say in words, as SPDX has it
SPDX = {
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
}


def dependencies() -> list[str]:
    """Names in `[project] dependencies`, in order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[\[<>=!~; ]", line)[0] for line in project["dependencies"]]


def licence(name: str) -> str:
    """By the metadata's expression, its one line, or its classifier."""
    facts = metadata.metadata(name)
    trove = [c.removeprefix(TROVE) for c in facts.get_all("Classifier") or [] if TROVE in c]
    text = facts.get("License") or ""
    line = text if text and len(text) < 40 else ""
    said = facts.get("License-Expression") or line or (trove[0] if trove else "not stated")
    return SPDX.get(said, said)


def table() -> str:
    rows = [f"| {name} | {licence(name)} | {metadata.version(name)} |" for name in dependencies()]
    return "\n".join([TITLES, "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    FILE.write_text(FILE.read_text().partition(TITLES)[0] + table())
