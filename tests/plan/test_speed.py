"""What a device sustains, and what its hour costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dra_ray.errors import ConfigError
from dra_ray.plan import speed


def test_a_card_is_a_stated_share_of_its_peak() -> None:
    known = speed.table()
    found = speed.of_gpu("H100", known, "bf16")
    assert found.tflops == known.utilisation * known.gpus["h100"].bf16
    assert "a guess" in found.source
    assert speed.of_gpu("h100", known).tflops < speed.of_gpu("h100", known, "tf32").tflops
    with pytest.raises(ConfigError, match="--gpu h10: unknown; did you mean 'h100'"):
        speed.of_gpu("h10", known)


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"), ("a100-80gb", "a100")],
)
def test_a_card_is_known_by_its_full_name(name: str, key: str) -> None:
    known = speed.table()
    assert known.gpu(name) == known.gpus[key]


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "h100-nvl", "h100 or a100", "rtx4090", ""])
def test_another_card_is_not_taken_for_it(name: str) -> None:
    with pytest.raises(ConfigError, match="--gpu .*: unknown"):
        speed.table().gpu(name)


def test_a_users_prices(tmp_path: Path) -> None:
    packaged = Path(speed.__file__).with_name("gpus.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(packaged.replace("price: 3.00", "price: 7.5"))
    assert speed.table(str(file)).gpu("h100").price == 7.5
    file.write_text(packaged.replace("price: 3.00", "prise: 7.5"))
    with pytest.raises(ConfigError, match="prise"):
        speed.table(str(file))


def test_measured_here_within_seconds() -> None:
    found = speed.measured(seconds=0.1, side=256)
    assert 1e-4 < found.tflops < 10
    assert "measured" in found.source
