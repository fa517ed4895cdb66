from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dra_ray.storage import Store
from tests.report.written_runs import write_evaluation, write_quickstart, write_train


@pytest.fixture
def quickstart(tmp_path: Path) -> Store:
    return write_quickstart(Store(str(tmp_path / "quick")))


@pytest.fixture
def make_train(tmp_path: Path) -> Callable[..., Store]:
    def make(name: str = "one", **more: Any) -> Store:
        run = Store(str(tmp_path / name))
        write_train(run, {"align.weight": 0.5, "align.sigma": 0.2, "synthetic.images": 0}, **more)
        write_evaluation(run, [], 3)
        return run

    return make
