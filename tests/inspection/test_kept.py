"""What an analysis keeps is taken, not computed again, and only where it is the same."""

import pytest
import torch
from torch import nn

from dra_ray.inspection.kept import Kept, identity
from dra_ray.storage import Store


def refuse() -> dict[str, torch.Tensor]:
    raise AssertionError("computed again")


def test_tensors_and_values_are_computed_once(tmp_path) -> None:
    kept = Kept(Store(str(tmp_path)))
    made = {"a": torch.randn(3), "b": torch.tensor([True, False])}
    assert not kept.has("x/y")
    kept.tensors("x/y", lambda: made)
    found = kept.tensors("x/y", refuse)
    assert kept.has("x/y")
    assert all(torch.equal(found[key], made[key]) for key in made)
    kept.value("v", lambda: [1.5, None])
    assert kept.value("v", refuse) == [1.5, None]


def test_a_damaged_file_is_made_again(tmp_path) -> None:
    kept = Kept(Store(str(tmp_path)))
    kept.tensors("x", lambda: {"a": torch.zeros(4)})
    file = Store(str(tmp_path)) / "x.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(kept.tensors("x", lambda: {"a": torch.ones(4)})["a"], torch.ones(4))
    (Store(str(tmp_path)) / "v.json").write_bytes(b"[1,")
    assert kept.value("v", lambda: 2) == 2


def test_without_a_folder_nothing_is_kept() -> None:
    calls = []
    for _ in range(2):
        Kept().value("v", lambda: calls.append(1))
    assert len(calls) == 2
    assert not Kept().has("v")


@pytest.mark.parametrize(
    "other",
    [
        (nn.Linear(2, 3), torch.arange(4), {"steps": 5}),
        (nn.Linear(2, 2), torch.arange(5), {"steps": 5}),
        (nn.Linear(2, 2), torch.arange(4).float(), {"steps": 5}),
        (nn.Linear(2, 2), torch.arange(4).reshape(2, 2), {"steps": 5}),
        (nn.Linear(2, 2), torch.arange(4), {"steps": 6}),
        (nn.Linear(2, 2, bias=False), torch.arange(4), {"steps": 5}),
    ],
)
def test_a_name_changes_with_each_part(other) -> None:
    def zeroed(net: nn.Module) -> nn.Module:
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        return net

    ours = identity(zeroed(nn.Linear(2, 2)), torch.arange(4), {"steps": 5})
    assert ours == identity(zeroed(nn.Linear(2, 2)), torch.arange(4), {"steps": 5})
    assert ours != identity(zeroed(other[0]), *other[1:])
