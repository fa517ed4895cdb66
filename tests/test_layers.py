"""The architecture, held by parsing the imports: arrows only downward, no Ray below the pool, one
place for files.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dra_ray"
LAYERS = (
    {"config", "runs", "storage", "errors", "memory", "recipes"},
    {"attacks", "students", "teachers", "data"},
    {"sweeps", "training", "evaluation", "inspection"},
    {"pool", "cluster", "meters", "submission"},
    {"bench", "workloads", "plan", "report", "dashboards"},
    {"cli", "__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
WITHOUT_RAY = LAYERS[0] | LAYERS[1] | LAYERS[2]
WITHOUT_RAY_INSIDE = {"pool.rows", "pool.policy", "bench.policy"}
# a sweep's trials are training runs, and the quickstart is every workload in turn
BETWEEN_WORKLOADS = {
    "workloads.sweep": {"workloads.train", "workloads.fidelity"},
    "workloads.fidelity": {"workloads.evaluate", "workloads.session"},
    "workloads.train": {"workloads.session", "workloads.judging"},
    "workloads.judging": {"workloads.session"},
    "workloads.quickstart": None,
    "workloads.evaluate": {"workloads.tasks"},
    "workloads.synthesize": {"workloads.tasks"},
    "workloads.canonical": {"workloads.tasks"},
    "workloads.look": {"workloads.tasks"},
    "workloads.convert": {"workloads.tasks"},
}
STORAGE_ONLY = {
    "open",
    "io.open",
    "os.open",
    "pathlib.Path",
    "torch.load",
    "torch.save",
    "numpy.load",
    "numpy.save",
    "numpy.savez",
    "numpy.savez_compressed",
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree; `data` is data/__init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            path.read_text(), str(path)
        )
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported, at the top or lazily, in full: `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func, {}) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            yield (
                node.args[0].value if isinstance(node.args[0], ast.Constant) else "a computed name"
            )


def uses(name: str, tree: ast.AST, known: dict[str, ast.Module]) -> set[str]:
    """The modules of the package that module `name` imports: what is not a module itself is an
    attribute of one.
    """
    below = [
        found.removeprefix("dra_ray.").split(".")
        for found in imports(tree)
        if top(found) == "dra_ray"
    ]
    parents = ([".".join(parts[:length]) for length in range(len(parts), 0, -1)] for parts in below)
    return {
        next((found for found in longest_first if found in known), "") for longest_first in parents
    } - {name, ""}


def top(name: str) -> str:
    return name.split(".")[0]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> full dotted name of what was imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                alias.asname or top(alias.name): alias.name if alias.asname else top(alias.name)
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return found


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def file_access(tree: ast.AST) -> list[str]:
    """Calls that open files or read pickles behind the storage's back, and imports of pickle's
    family.
    """
    aliases = _aliases(tree)
    calls = [_dotted(node.func, aliases) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    read = [
        call
        for call in calls
        if call in STORAGE_ONLY or call.startswith(("pathlib.Path.", "safetensors."))
    ]
    return read + [
        name
        for name in imports(tree)
        if top(name) in {"pickle", "dill", "cloudpickle", "joblib", "shelve", "fsspec", "s3fs"}
    ]


def test_every_module_has_a_layer():
    assert [name for name in modules() if name and top(name) not in LAYER] == []


def test_imports_point_downward():
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, tree in known.items()
        for other in uses(name, tree, known)
        if name and top(other) != top(name) and LAYER[top(other)] > LAYER[top(name)]
    ]
    assert wrong == []


def test_workloads_do_not_import_each_other():
    known = modules()
    between = {
        name: {other for other in uses(name, tree, known) if top(other) == "workloads"}
        for name, tree in known.items()
        if top(name) == "workloads" and BETWEEN_WORKLOADS.get(name, set()) is not None
    }
    wrong = {name: others - BETWEEN_WORKLOADS.get(name, set()) for name, others in between.items()}
    assert {name: others for name, others in wrong.items() if others} == {}


def test_the_lower_layers_never_import_ray():
    bare = [name for name in modules() if top(name) in WITHOUT_RAY or name in WITHOUT_RAY_INSIDE]
    wrong = [
        name for name in bare if any(top(found) == "ray" for found in imports(modules()[name]))
    ]
    assert wrong == []


def test_no_import_cycle():
    """Lazy imports count: a cycle that only works by luck of the order is still one."""
    known = modules()
    graph = {name: uses(name, tree, known) for name, tree in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_storage_touches_files():
    found = {name: file_access(tree) for name, tree in modules().items() if top(name) != "storage"}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_autoattack_is_imported_in_one_place():
    importers = [
        name
        for name, tree in modules().items()
        if any(top(found) == "pyautoattack" for found in imports(tree))
    ]
    assert len(importers) == 1, importers


def test_the_checks_see_what_they_forbid():
    """Each rule on a snippet that breaks it, also where the name is disguised or the import
    lazy.
    """
    assert "ray.train" in set(imports(ast.parse("def f():\n    import ray.train")))
    assert "ray" in set(imports(ast.parse("import importlib\nimportlib.import_module('ray')")))
    for text in (
        "open('x')",
        "import numpy as np\nnp.load('x')",
        "from torch import load\nload('x')",
        "import pickle",
        "from pathlib import Path\nPath('x')",
    ):
        assert file_access(ast.parse(text)), text
    assert not file_access(
        ast.parse("store.read_npz()\nself.open('x')\nimport numpy as np\nnp.zeros(3)")
    )


def test_the_package_root_imports_nothing():
    assert list(imports(modules()[""])) == []
