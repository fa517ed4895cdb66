"""Checkpoints under the zoo's names, written down here key by key, against plain implementations of
their networks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dra_ray import config
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError
from dra_ray.storage import Store
from dra_ray.students import robustbench
from tests.parity.test_forward import SHAPE, trades_resnet, wave, wide_resnet

SMALL = Shape(5, 3, 8, SHAPE.mean, SHAPE.std)
WIDTHS = (16, 32, 64, 128)  # of a WRN-16-2: two blocks in each of three groups
State = dict[str, Tensor]


def filled(shapes: dict[str, tuple[int, ...]]) -> State:
    """Values by formula: weights of unit gain, positive variances, no gain or offset that is 1 or
    0.
    """
    state: State = {}
    for number, (key, shape) in enumerate(shapes.items()):
        values = wave(number, torch.Size(shape))
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif len(shape) > 1:
            state[key] = (values * (2 / np.prod(shape[1:])) ** 0.5).float()
        else:
            state[key] = (
                1 + 0.4 * values if key.endswith((".weight", "running_var")) else 0.3 * values
            ).float()
    return state


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    tensors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{tensor}": (width,) for tensor in tensors} | {
        f"{name}.num_batches_tracked": ()
    }


def dm_state() -> State:
    """A state dict as DMWideResNet names it."""
    shapes: dict[str, tuple[int, ...]] = {"init_conv.weight": (16, 3, 3, 3)}
    for group in range(3):
        for block in range(2):
            name, before, after = (
                f"layer.{group}.block.{block}",
                WIDTHS[group + (block > 0)],
                WIDTHS[group + 1],
            )
            shapes |= norm(f"{name}.batchnorm_0", before) | {
                f"{name}.conv_0.weight": (after, before, 3, 3)
            }
            shapes |= norm(f"{name}.batchnorm_1", after) | {
                f"{name}.conv_1.weight": (after, after, 3, 3)
            }
            if block == 0:
                shapes |= {f"{name}.shortcut.weight": (after, before, 1, 1)}
    return filled(
        shapes | norm("batchnorm", 128) | {"logits.weight": (5, 128), "logits.bias": (5,)}
    )


def trades_state() -> State:
    """A state dict as TRADES' WideResNet names it, with the fourth group that its forward never
    calls.
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}
    for group in ("block1", "sub_block1", "block2", "block3"):
        number = int(group[-1])
        for block in range(2):
            name, before, after = (
                f"{group}.layer.{block}",
                WIDTHS[number - 1 + (block > 0)],
                WIDTHS[number],
            )
            shapes |= norm(f"{name}.bn1", before) | {f"{name}.conv1.weight": (after, before, 3, 3)}
            shapes |= norm(f"{name}.bn2", after) | {f"{name}.conv2.weight": (after, after, 3, 3)}
            if block == 0:
                shapes |= {f"{name}.convShortcut.weight": (after, before, 1, 1)}
    return filled(shapes | norm("bn1", 128) | {"fc.weight": (5, 128), "fc.bias": (5,)})


def pixels() -> Tensor:
    return 0.5 + 0.5 * wave(100, torch.Size((4, 3, 8, 8)))


def saved(tmp_path, value: object) -> Store:
    store = Store(str(tmp_path)) / "Zoo2023Entry.pt"
    store.write_torch(value)
    return store


def doubled(state: State) -> State:
    return {key: value.double() for key, value in state.items()}


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_a_dm_wide_resnet_keeps_its_keys_and_its_logits(
    tmp_path, wrapper: str, prefix: str
) -> None:
    state = dm_state()
    value: dict = {prefix + key: tensor for key, tensor in state.items()}
    store = saved(tmp_path, {wrapper: value, "epoch": 3} if wrapper else value)
    student = robustbench.load(store, config.Model(name="wrn-16-2"), SMALL)
    own = student.state_dict()
    assert set(own) == set(state)
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(own[key], tensor), key
    assert not student.training
    assert not any(tensor.requires_grad for tensor in student.parameters())
    logits, _ = wide_resnet(doubled(state), pixels(), False)
    torch.testing.assert_close(student.double()(pixels()), logits, rtol=1e-6, atol=1e-6)


def test_a_trades_network_keeps_its_logits_on_images_as_they_are(tmp_path) -> None:
    store = saved(tmp_path, {f"module.{key}": tensor for key, tensor in trades_state().items()})
    student = robustbench.load(store, config.Model(name="relu-wrn-16-2", normalise=False), SMALL)
    logits, _ = trades_resnet(doubled(trades_state()), pixels(), False)
    torch.testing.assert_close(student.double()(pixels()), logits, rtol=1e-6, atol=1e-6)


def test_the_zoos_wrapper_of_imagenet_models(tmp_path) -> None:
    """normalize.mean and normalize.std beside model.*: kept apart, and compared with the
    student's.
    """
    normalise = {
        "normalize.mean": torch.tensor(SHAPE.mean).view(1, 3, 1, 1),
        "normalize.std": torch.tensor(SHAPE.std).view(1, 3, 1, 1),
    }
    store = saved(
        tmp_path, normalise | {f"model.{key}": tensor for key, tensor in dm_state().items()}
    )
    student = robustbench.load(store, config.Model(name="wrn-16-2"), SMALL)
    torch.testing.assert_close(
        student.double()(pixels()),
        wide_resnet(doubled(dm_state()), pixels(), False)[0],
        rtol=1e-6,
        atol=1e-6,
    )
    with pytest.raises(CheckpointError, match=r"another normalisation.*model.mean=\[0.4914"):
        robustbench.load(
            store, config.Model(name="wrn-16-2", mean=(0.5,) * 3, std=(0.5,) * 3), SMALL
        )


def refused(words: str, store: Store, name: str = "wrn-16-2") -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        robustbench.load(store, config.Model(name=name), SMALL)
    assert "\n" not in str(caught.value)


def test_another_network_is_named_by_its_first_keys(tmp_path) -> None:
    refused(
        r"missing: 70 \(init_conv.weight, .*unexpected: 108 \(conv1.weight, ",
        saved(tmp_path, trades_state()),
    )
    refused(
        r"of another shape: .*init_conv.weight|of another shape: \d+ \(layer.0",
        saved(tmp_path, dm_state()),
        "wrn-16-4",
    )
    half = {
        ("model." if number % 2 else "") + key: tensor
        for number, (key, tensor) in enumerate(dm_state().items())
    }
    refused(
        r"unexpected: \d+ \(model\.", saved(tmp_path, half)
    )  # a prefix that only some keys have is no prefix


def test_a_scalar_beside_the_weights_is_no_hindrance_and_a_cut_file_is_one_line(tmp_path) -> None:
    robustbench.load(
        saved(tmp_path, {"state_dict": dm_state(), "best": np.float64(0.5)}),
        config.Model(name="wrn-16-2"),
        SMALL,
    )
    store = Store(str(tmp_path)) / "cut.pt"
    store.write_bytes(saved(tmp_path, dm_state()).read_bytes()[:5000])
    refused("not a weights-only torch file.* fetch it again", store)
