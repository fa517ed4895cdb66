"""The shape of the code: calls that name what they pass, and lines that fit a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_POSITIONAL = 6
COLUMNS = 100


def positional(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every function with the number of parameters that a call may leave unnamed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [given.arg for given in (*node.args.posonlyargs, *node.args.args)]
            yield node.name, len(names) - (names[:1] in (["self"], ["cls"]))


def test_long_calls_name_their_arguments() -> None:
    """A command's parameters, in cli/, are its options."""
    wrong = {
        f"{path.relative_to(ROOT)}: {name}": count
        for path in sorted((ROOT / "dra_ray").rglob("*.py"))
        if "cli" not in path.parts
        for name, count in positional(ast.parse(path.read_text(), str(path)))
        if count > MOST_POSITIONAL
    }
    assert wrong == {}, "make the later ones keyword-only, or pass a record"


def test_lines_fit() -> None:
    """Ruff lets lines pass that end in a comment to it or to mypy."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("dra_ray", "tests", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > COLUMNS
    ]
    assert wrong == []


def test_what_counts_as_positional() -> None:
    code = "def f(a, /, b, *c, d=1): ...\nclass X:\n    def g(self, a): ...\n    def h(cls): ..."
    assert dict(positional(ast.parse(code))) == {"f": 2, "g": 1, "h": 0}
