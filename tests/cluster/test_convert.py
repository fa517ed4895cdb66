"""`dra data convert` on Ray: the same bytes whoever writes them, and a run on what it wrote."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from dra_ray import config, data
from dra_ray.cli.main import app
from dra_ray.data import in_memory, rows, synthetic
from dra_ray.storage import Store
from dra_ray.workloads import convert


@pytest.fixture
def source(tmp_path) -> Store:
    drawn = np.random.default_rng(0)
    file = Store(str(tmp_path / "source.npz"))
    images = drawn.integers(0, 256, (1000, 8, 8, 1)).astype(np.uint8)
    file.write_npz(image=images, label=np.arange(1000) // 100)
    return file


def test_a_conversion_goes_on_to_the_same_bytes(ray_cluster, source, tmp_path) -> None:
    settings = config.Conversion(source=source.uri, shard_images=100, workers=1)
    one, two = Store(str(tmp_path / "one")), Store(str(tmp_path / "two"))
    shown = []
    manifest = convert.run(settings, one, shown.append)
    assert [row.images for row in shown][-1] == 1000
    convert.run(settings.model_copy(update={"workers": 2}), two)
    whole = {name: (one / name).read_bytes() for name in manifest.shards}
    assert whole == {name: (two / name).read_bytes() for name in manifest.shards}

    # stopped early: a shard is missing, one is half there, and no index says that the set is whole
    (two / "manifest.json").write_json((two / "manifest.json").read_json() | {"status": "running"})
    (two / "index.json").remove()
    (two / "shard-00001.npy").remove()
    (two / "shard-00002.npy").write_bytes(whole["shard-00002.npy"][:500])
    convert.run(settings, two)
    assert whole == {name: (two / name).read_bytes() for name in manifest.shards}
    assert rows.read_index(one) == rows.read_index(two)

    digits = data.load(config.Data())
    few, more = (in_memory(synthetic.read(one, images, digits)) for images in (250, 500))
    assert (more.images[:250] == few.images).all()
    assert len(few.labels.unique()) == 10
    result = CliRunner().invoke(app, ["data", "check", one.uri])
    assert result.exit_code == 0, result.output
    (one / "shard-00003.npy").write_bytes(whole["shard-00002.npy"])
    result = CliRunner().invoke(app, ["data", "check", one.uri])
    assert "shard-00003.npy' has another SHA-256" in str(result.exception or result.output)
