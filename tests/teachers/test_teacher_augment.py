"""EDM's augmentation: pixels against permutations and exact patterns, its label, its draws, and
training with it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dra_ray import data
from dra_ray.config import Data, TeacherTraining, UNet
from dra_ray.data.random import generator
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.teachers import augment
from dra_ray.teachers.edm import EDM
from dra_ray.workloads import train_teacher

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TRAINING = TeacherTraining(
    net=UNet(model_channels=16, augment_dim=9, label_dropout=0),
    augment=0.5,
    images_seen=640,
    batch=32,
    warmup_images=0,
    lr=5e-3,
)


def draws(count: int = 2, **changed: Any) -> augment.Draws:
    """The same for every image; what is not named does not happen."""
    wide = {"mirrored", "shift"}
    fields = {
        field.name: torch.zeros((count, 2) if field.name in wide else (count,))
        for field in dataclasses.fields(augment.Draws)
    }
    for name, value in changed.items():
        fields[name] += torch.tensor(value, dtype=torch.float32)
    return augment.Draws(**fields)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, lambda x: x),
        ({"mirrored": [1, 0]}, lambda x: x.flip(3)),
        ({"mirrored": [0, 1]}, lambda x: x.flip(2)),
        ({"turn": math.pi / 2}, lambda x: x.rot90(1, (2, 3))),
        ({"turn": -math.pi / 2}, lambda x: x.rot90(-1, (2, 3))),
        ({"turn": math.pi}, lambda x: x.rot90(2, (2, 3))),
        ({"mirrored": [1, 0], "turn": math.pi / 2}, lambda x: x.flip(3).rot90(1, (2, 3))),
        (
            {"shift": [8 / 6, 16 / 6]},
            lambda x: x[:, :, [2, 1, 0, 1, 2, 3]][..., [1, 0, 1, 2, 3, 4]],
        ),
        ({"shift": [-8 * 7 / 6, 0]}, lambda x: x[..., [3, 2, 1, 0, 1, 2]]),
        ({"axis": 1.0}, lambda x: x),
    ],
)
def test_what_moves_pixels_only_moves_them_exactly(changed: dict[str, Any], wanted: Any) -> None:
    assert torch.equal(augment.apply(IMAGES, draws(**changed)), wanted(IMAGES))


def pattern(at: Tensor) -> Tensor:
    """A sum of waves of up to 0.3 periods per pixel, at points [2,...] counted from the centre;
    deviation 1.
    """
    draws = torch.Generator().manual_seed(1)
    angles, phases, lengths = (
        torch.rand(24, generator=draws, dtype=torch.float64) for _ in range(3)
    )
    waves = (
        2
        * math.pi
        * 0.3
        * lengths.sqrt()
        * torch.stack([(2 * math.pi * angles).cos(), (2 * math.pi * angles).sin()])
    )
    return torch.einsum("ik,i...->k...", waves, at).add(
        (2 * math.pi * phases)[:, None, None]
    ).cos().sum(0) / math.sqrt(12)


def grid(side: int) -> Tensor:
    """float64 [2,side,side]: column and row, counted from the centre."""
    along = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return torch.stack([along.expand(side, side), along[:, None].expand(side, side)])


def turned(at: Tensor, angle: float) -> Tensor:
    """`at` turned counter-clockwise as seen, with rows downwards."""
    x, y = at
    return torch.stack(
        [math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x]
    )


@pytest.mark.parametrize(
    ("changed", "source"),
    [
        ({"turn": 0.5}, lambda at: turned(at, -0.5)),
        ({"turn": 0.02}, lambda at: turned(at, -0.02)),
        ({"scale": 1.3}, lambda at: at / 2**0.26),
        ({"scale": -1.3}, lambda at: at * 2**0.26),
        (
            {"shift": [0.06, -0.03]},
            lambda at: at - 64 / 8 * torch.tensor([0.06, -0.03])[:, None, None],
        ),
        ({"stretch": 1.0}, lambda at: at / torch.tensor([2**0.2, 2**-0.2])[:, None, None]),
        (
            {"stretch": 1.0, "axis": 0.4},
            lambda at: turned(
                turned(at, -0.4) / torch.tensor([2**0.2, 2**-0.2])[:, None, None], 0.4
            ),
        ),
        (
            {"scale": 1.0, "turn": 0.5, "shift": [0.1, 0]},
            lambda at: turned(at - torch.tensor([0.8, 0])[:, None, None], -0.5) / 2**0.2,
        ),
        (
            {"mirrored": [1, 0], "turn": 0.5},
            lambda at: turned(at, -0.5) * torch.tensor([-1, 1])[:, None, None],
        ),
    ],
)
def test_a_pattern_goes_where_the_map_says(changed: dict[str, Any], source: Any) -> None:
    """In the middle, where nothing is reflected; plain bilinear reading errs by 0.17 on the
    first.
    """
    image = pattern(grid(64)).float()[None, None]
    found = augment.apply(image, draws(1, **changed))[0, 0]
    error = (found - pattern(source(grid(64))))[24:40, 24:40].square().mean().sqrt()
    assert float(error) < 0.05


def test_shrinking_does_not_alias() -> None:
    """Stripes too fine for the shrunken image become grey; read at single points they would stay
    stripes of another width.
    """
    stripes = torch.cos(math.pi * 0.95 * torch.arange(64.0)).expand(1, 1, 64, 64)
    shrunken = augment.apply(stripes, draws(1, scale=-3.0))[0, 0, 16:48, 16:48]
    assert float(shrunken.square().mean().sqrt()) < 0.05


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.randn(40, 1, 8, 8)
    drawn = augment.parameters(40, 0.5, generator(0, 1))
    whole = augment.apply(images, drawn)
    assert torch.equal(whole[7:23], augment.apply(images[7:23], drawn[7:23]))
    assert torch.equal(whole[:1], augment.apply(images[:1], drawn[:1]))
    assert not torch.equal(whole, images)


def test_the_label_says_what_was_drawn() -> None:
    assert torch.equal(draws().label, torch.zeros(2, augment.LABEL_DIM))
    told = draws(
        1, mirrored=[1, 0], scale=0.3, turn=0.5, stretch=2.0, axis=0.7, shift=[-1, 0.5]
    ).label[0]
    wanted = [
        1,
        0,
        0.3,
        math.cos(0.5) - 1,
        math.sin(0.5),
        2 * math.cos(0.7),
        2 * math.sin(0.7),
        -1,
        0.5,
    ]
    assert told.tolist() == pytest.approx(wanted)


def test_draws_have_their_probabilities() -> None:
    drawn = augment.parameters(20_000, 0.12, generator(0, 1))
    rate = {
        name: float((getattr(drawn, name) != 0).float().mean())
        for name in ("scale", "turn", "stretch", "axis")
    }
    assert rate == pytest.approx(
        {"scale": 0.12, "turn": 0.12, "stretch": 0.12, "axis": 0.5}, abs=0.01
    )
    assert drawn.mirrored.mean(0).tolist() == pytest.approx([0.5, 0.06], abs=0.01)
    assert (drawn.shift != 0).all(1).float().mean().item() == pytest.approx(0.12, abs=0.01)
    assert torch.equal(drawn.shift[:, 0] != 0, drawn.shift[:, 1] != 0)
    assert float(drawn.turn.abs().max()) > 3
    assert float(drawn.scale[drawn.scale != 0].std()) == pytest.approx(1, abs=0.06)
    never, always = (augment.parameters(100, chance, generator(0, 1)) for chance in (0.0, 1.0))
    assert not never.label[:, 1:].any()
    assert bool((always.turn != 0).all())


def test_a_denoiser_learns_with_it() -> None:
    training = train_teacher.Training(TRAINING, data.load(TRAINING.data))
    losses = [float(training.advance(training.net)) for _ in range(training.steps)]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert training.net.model.map_augment.weight.grad.abs().max() > 0


def test_workers_take_slices_of_one_batch() -> None:
    """Mean loss and gradient of two halves are those of the whole; the step before made the network
    use its label.
    """
    whole, *halves = (train_teacher.Training(TRAINING, data.load(TRAINING.data)) for _ in range(3))
    whole.advance(whole.net)
    for half in halves:
        half.load_state(whole.state())
    losses = [half.advance(half.net, rank, 2) for rank, half in enumerate(halves)]
    torch.testing.assert_close(sum(losses) / 2, whole.advance(whole.net), rtol=1e-4, atol=0)
    for one, *two in zip(
        whole.net.parameters(), *(half.net.parameters() for half in halves), strict=True
    ):
        torch.testing.assert_close(
            sum(part.grad for part in two) / 2, one.grad, rtol=1e-3, atol=1e-3
        )


def test_what_is_not_changed_is_not_labelled() -> None:
    images = torch.randn(200, 1, 8, 8)
    drawn = augment.parameters(200, 0.12, generator(0, 1))
    still = ~drawn.label.any(1)
    assert 0.2 < float(still.float().mean()) < 0.4  # half of 0.94 * 0.88^4 is 0.28
    assert torch.equal((augment.apply(images, drawn) == images).flatten(1).all(1), still)


def test_features_and_samples_are_of_images_as_they_are() -> None:
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16, augment_dim=9), 8, 1, 10, 0.7).eval()
    torch.nn.init.normal_(
        net.model.dec["8x8_aux_conv"].weight
    )  # a fresh network's output hardly depends on its inputs
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 2.0])
    assert torch.equal(net(x, sigma), net(x, sigma, None, torch.zeros(3, 9)))
    assert not torch.equal(net(x, sigma), net(x, sigma, None, draws(3, scale=1.0).label))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"net": UNet()},
            r"augment=0.5 tells the network 9 numbers, but net.augment_dim=0; set it to 9",
        ),
        ({"net": UNet(augment_dim=4)}, r"net.augment_dim=4; set it to 9"),
        ({"augment": 0.0}, r"net.augment_dim=9, but augment=0 leaves that input untrained"),
        ({"objective": "classify"}, r"objective='classify' augments as `data` says; set both to 0"),
        (
            {"objective": "classify", "net": UNet()},
            r"augment=0.5 and net.augment_dim=0, but objective='classify'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match=words):
        train_teacher.fit(
            TRAINING.model_copy(update={"data": Data(), **changed}), Store(str(tmp_path))
        )
