"""Tensors that lie in a file of the node's cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dra_ray.errors import StorageError
from dra_ray.storage import Store, large


def test_a_large_tensor_takes_no_memory_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path))
    before = large.anonymous_bytes()
    tensor = large.empty((3, large.LARGE_BYTES // 4))
    torch.rand(*tensor.shape, generator=torch.Generator().manual_seed(0), out=tensor)
    assert large.anonymous_bytes() - before < large.LARGE_BYTES / 4
    assert os.listdir(tmp_path) == []
    plain = torch.rand(*tensor.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tensor, plain)
    assert torch.equal(tensor[1:, 5:9], plain[1:, 5:9])


def test_a_small_one_is_as_usual() -> None:
    tensor = large.empty((2, 0, 3), torch.uint8)
    assert (tensor.shape, tensor.dtype) == ((2, 0, 3), torch.uint8)
    assert large.empty((4, 5)).fill_(1).sum() == 20


def test_a_disk_without_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path))
    with pytest.raises(StorageError, match=r"has no room for .* set DRA_CACHE"):
        large.empty((2**50,), torch.uint8)


@pytest.mark.parametrize("megabytes", [1, 70])
def test_an_npz_file_is_what_numpy_reads(tmp_path: Path, megabytes: int) -> None:
    """Made at once or part by part; equal arrays give equal bytes."""
    arrays = {
        "pixels": np.arange(megabytes * 2**20, dtype=np.uint8).reshape(2, -1),
        "turned": np.arange(12.0).reshape(3, 4).T,
        "names": np.array(["", "clean", "apgd-ce"]),
        "none": np.array([], dtype=str),
        "right": np.array([True, False]),
        "seconds": np.array(1.5),
    }
    file, again = Store(str(tmp_path / "a.npz")), Store(str(tmp_path / "b.npz"))
    file.write_npz(**arrays)
    again.write_npz(**arrays)
    assert file.read_bytes() == again.read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            assert np.array_equal(read[name], array)
    places = file.npz_arrays()
    assert places is not None
    assert np.array_equal(places["pixels"].map(), arrays["pixels"])
