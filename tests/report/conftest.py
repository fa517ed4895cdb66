from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dra_ray.storage import Store
from tests.report.written_runs import (
    write_attacked,
    write_evaluation,
    write_quickstart,
    write_train,
)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that take a while to write; tests get copies."""
    folder = tmp_path_factory.mktemp("written")
    write_quickstart(Store(str(folder / "quick")))
    write_attacked(Store(str(folder / "attacked")))
    return folder


@pytest.fixture
def quickstart(written: Path, tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(written / "quick", tmp_path / "quick")))


@pytest.fixture
def attacked(written: Path, tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(written / "attacked", tmp_path / "attacked")))


@pytest.fixture
def make_train(tmp_path: Path) -> Callable[..., Store]:
    def make(name: str = "one", **more: Any) -> Store:
        run = Store(str(tmp_path / name))
        write_train(run, {"align.weight": 0.5, "align.sigma": 0.2, "synthetic.images": 0}, **more)
        write_evaluation(run, [], 3)
        return run

    return make
