"""Exports give the run's logits where their own snippet loads them, without our code where they
need none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dra_ray import config, data, students
from dra_ray.errors import ConfigError, DataError
from dra_ray.report import export
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from tests.report.written_runs import manifest

ROOT = Path(__file__).parents[2]


def trained(folder: Path, name: str, **more: object) -> Store:
    """A run whose student has drawn weights and norms that are not the initial ones."""
    run = Store(str(folder / "run"))
    settings = config.Experiment(model=config.Model(name=name, **more))  # type: ignore[arg-type]
    manifest(run, "train", settings.model_dump(mode="json"))
    torch.manual_seed(1)
    student = students.build(settings.model, data.outline(settings.data).shape)
    weights = {
        key: value + 0.1 * torch.rand_like(value) if value.is_floating_point() else value
        for key, value in student.state_dict().items()
    }
    checkpoint.save(run, weights)
    return run


@torch.no_grad()
def logits_elsewhere(run: Store, written: export.Exported, call: str) -> torch.Tensor:
    """What the snippet's model gives in a process of its own."""
    folder = written.folder.resolved().uri
    code = (
        written.snippet
        + f"\nimport torch\nimages = torch.load('{folder}/images.pt')\n"
        + f"torch.save(torch.as_tensor({call}).detach(), '{folder}/logits.pt')\n"
    )
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    (written.folder / "images.pt").write_torch(images)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    student, _ = checkpoint.load(run)
    theirs = (written.folder / "logits.pt").read_torch()
    assert theirs.shape == (4, 10)
    ours = student(images)
    return (theirs - ours).abs().max() / ours.abs().max().clamp(min=1)


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["wrn-10-1", "vit-t-2", "resnet-18"])
def test_safetensors_give_equal_logits(tmp_path: Path, name: str) -> None:
    run = trained(tmp_path, name)
    written = export.export(run, "safetensors")
    assert written.difference == 0
    if name == "wrn-10-1":
        assert logits_elsewhere(run, written, "model(images)") == 0


@pytest.mark.seconds
def test_timm_gives_equal_logits_without_our_code(tmp_path: Path) -> None:
    run = trained(tmp_path, "timm/resnet10t")
    written = export.export(run, "timm")
    assert "dra_ray" not in written.snippet
    assert logits_elsewhere(run, written, "logits(images)") < 1e-5


def test_timm_is_refused_for_other_networks(tmp_path: Path) -> None:
    run = trained(tmp_path, "wrn-10-1")
    with pytest.raises(ConfigError, match="is not a network of timm's; use --to safetensors"):
        export.export(run, "timm")
    with pytest.raises(ConfigError, match="--to pickle"):
        export.export(run, "pickle")
    with pytest.raises(DataError, match="none' does not exist"):
        export.export(Store(str(tmp_path / "none")), "safetensors")


HAS_ONNX = all(importlib.util.find_spec(name) for name in export.NEEDED)


@pytest.mark.skipif(HAS_ONNX, reason="ONNX is installed")
def test_onnx_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--to onnx needs onnx.*pip install 'dra-ray\[onnx\]'"):
        export.export(trained(tmp_path, "wrn-10-1"), "onnx")


@pytest.mark.skipif(not HAS_ONNX, reason="an optional extra")
def test_onnx_gives_equal_logits_without_our_code(tmp_path: Path) -> None:
    run = trained(tmp_path, "wrn-10-1")
    written = export.export(run, "onnx")
    assert "dra_ray" not in written.snippet
    assert logits_elsewhere(run, written, "logits(images.numpy())") < 1e-3
