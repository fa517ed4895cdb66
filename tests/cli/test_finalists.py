"""A sweep stands for its best trials."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dra_ray import runs
from dra_ray.cli.main import app
from dra_ray.errors import ConfigError
from dra_ray.storage import Store


def written(folder: Path, **facts: object) -> Store:
    sweep = Store(str(folder))
    (sweep / runs.MANIFEST).write_json({"kind": "sweep", "digest": "x", **facts})
    return sweep


def test_finalists_of_a_sweep_are_runs_of_its_trials(tmp_path: Path) -> None:
    sweep = written(tmp_path / "s", finals={"dra": "trial-003", "baseline": "trial-000"})
    assert runs.finalists(sweep) == {
        "dra": sweep / "trials" / "trial-003",
        "baseline": sweep / "trials" / "trial-000",
    }
    assert runs.finalists(Store(str(tmp_path / "nowhere"))) == {}


def test_those_of_a_quickstart_are_its_sweeps(quickstart: Store) -> None:
    finals = runs.finalists(quickstart)
    assert finals
    assert all((run / runs.MANIFEST).exists() for run in finals.values())


def test_an_unfinished_sweep_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no best trials yet; resume it with `dra sweep`"):
        runs.finalists(written(tmp_path / "s"))


def test_options_of_one_model_are_refused_for_a_sweep(tmp_path: Path) -> None:
    sweep = written(tmp_path / "s", finals={"dra": "trial-003"})
    done = CliRunner().invoke(app, ["evaluate", str(sweep), "--norm", "l2"])
    assert isinstance(done.exception, ConfigError)
    assert "--norm is for one model" in str(done.exception)
    assert "trial-003" in str(done.exception)
