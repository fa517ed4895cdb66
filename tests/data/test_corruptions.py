"""Common corruptions: files in CIFAR-10-C's layout, and those made here, held by what each must do
to an image.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from dra_ray.data import corruptions
from dra_ray.data.corruptions import COMMON, GENERATED, SEVERITIES
from dra_ray.errors import ConfigError, DataError
from dra_ray.storage import Store

N = 6
CHANCE = ("gaussian-noise", "shot-noise", "impulse-noise", "translate")


def photographs(n: int = N, channels: int = 3, side: int = 32) -> Tensor:
    """Smooth shapes with an edge, uint8 [n,C,side,side], away from black and white."""
    rng = np.random.default_rng(0)
    low = torch.from_numpy(rng.uniform(0.2, 0.8, (n, channels, 5, 5))).float()
    smooth = torch.nn.functional.interpolate(low, (side, side), mode="bicubic").clamp(0.1, 0.9)
    smooth[..., side // 3 | 1 :, side // 2 | 1 :] *= 0.7
    return (255 * smooth).round().to(torch.uint8)


def numbers(array: np.ndarray) -> bytes:
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


def folder(tmp_path, names=("fog", "snow"), n: int = N, labels: np.ndarray | None = None) -> Store:
    """Image i at severity s of corruption number k has the value 40 k + 7 s + i, modulo 256."""
    store = Store(str(tmp_path / "set"))
    for k, name in enumerate(names):
        values = np.array(
            [40 * k + 7 * severity + i for severity in SEVERITIES for i in range(n)]
        ).astype(np.uint8)
        stacked = np.broadcast_to(values[:, None, None, None], (5 * n, 4, 5, 3)).copy()
        stacked[..., 2] = 255  # of the last channel, so that axes cannot be swapped
        (store / f"{name}.npy").write_bytes(numbers(stacked))
    (store / "labels.npy").write_bytes(
        numbers(np.tile(np.arange(n), 5) if labels is None else labels)
    )
    return store


# -- files -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [None, np.arange(N, dtype=np.uint8)])
def test_severities_are_stacked_blocks(tmp_path, labels) -> None:
    found = list(corruptions.read(folder(tmp_path, labels=labels).uri))
    assert [row[:2] for row in found] == [
        (name, severity) for name in ("snow", "fog") for severity in SEVERITIES
    ]  # in the order of the paper
    for name, severity, images, classes in found:
        assert images.dtype == torch.uint8
        assert images.shape == (N, 3, 4, 5)
        assert images[:, 0, 0, 0].tolist() == [
            40 * (name == "snow") + 7 * severity + i for i in range(N)
        ]
        assert (images[:, 2] == 255).all()
        assert classes.tolist() == list(range(N))


def test_the_four_extra_corruptions_do_not_count_beside_the_common_ones(tmp_path) -> None:
    assert {row[0] for row in corruptions.read(folder(tmp_path, (*COMMON, "spatter")).uri)} == set(
        COMMON
    )
    assert {row[0] for row in corruptions.read(folder(tmp_path / "own", ("rain", "mud")).uri)} == {
        "rain",
        "mud",
    }


def test_a_folder_must_be_of_the_test_images(tmp_path) -> None:
    uri, labels = folder(tmp_path).uri, torch.arange(N)
    assert [
        row[2].shape[0]
        for row in corruptions.sets(uri, torch.zeros(3, 3, 4, 5, dtype=torch.uint8), labels[:3], 0)
    ] == [3] * 10
    for images, classes, words in (
        (
            torch.zeros(N, 3, 5, 4),
            labels,
            r"has images \[3, 4, 5\], but the test images are \[3, 5, 4\]",
        ),
        (torch.zeros(N, 3, 4, 5), labels.flip(0), "other labels than the test images"),
    ):
        with pytest.raises(DataError, match=words):
            next(corruptions.sets(uri, images.byte(), classes, 0))


def test_what_is_damaged_is_one_line(tmp_path) -> None:
    def refused(words: str, file: str, content: bytes) -> None:
        store = folder(tmp_path)
        (store / file).write_bytes(content)
        with pytest.raises(DataError, match=words) as caught:
            list(corruptions.read(store.uri))
        assert "\n" not in str(caught.value)

    refused("snow.npy' holds float64", "snow.npy", numbers(np.zeros((5 * N, 4, 5, 3))))
    refused(
        r"snow.npy' holds uint8 \[29, 4, 5, 3\], expected",
        "snow.npy",
        numbers(np.zeros((5 * N - 1, 4, 5, 3), np.uint8)),
    )
    refused(
        "snow.npy' has 25 images, but labels.npy 30",
        "snow.npy",
        numbers(np.zeros((25, 4, 5, 3), np.uint8)),
    )
    refused(
        "snow.npy' is not a readable npy file",
        "snow.npy",
        numbers(np.array([{"a": 1}], dtype=object)),
    )
    refused("labels.npy' holds float64", "labels.npy", numbers(np.zeros(5 * N)))
    with pytest.raises(
        DataError, match="not in CIFAR-10-C's layout; give a folder with labels.npy"
    ):
        corruptions.read(str(tmp_path / "nowhere"))


# -- made here -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (2, 28)])
def test_each_severity_is_further_from_the_image(name: str, channels: int, side: int) -> None:
    images = photographs(30, channels, side)
    errors = []
    for severity in SEVERITIES:
        made = corruptions.generated(images, name, severity, seed=0)
        assert made.dtype == torch.uint8
        assert made.shape == images.shape
        errors.append(float((made.double() - images.double()).square().mean()))
    rising = (
        errors if side > 8 or name not in ("translate", "jpeg") else [errors[0], errors[-1]]
    )  # 8 pixels have few steps
    assert errors[0] > 0, errors
    assert rising == sorted(set(rising)), errors


@pytest.mark.parametrize("name", GENERATED)
def test_chance_belongs_to_the_image_not_to_its_company(name: str) -> None:
    images = photographs().repeat(44, 1, 1, 1)[: corruptions.PART + 4, :, :8, :8]
    whole = corruptions.generated(images, name, 3, seed=1)
    assert torch.equal(whole, corruptions.generated(images, name, 3, seed=1))
    for first in (5, corruptions.PART - 1):
        assert torch.equal(
            whole[first : first + 4],
            corruptions.generated(images[first : first + 4], name, 3, seed=1, first=first),
        )
    other_seed, other_number = (
        corruptions.generated(images[:4], name, 3, **change)
        for change in ({"seed": 2}, {"seed": 1, "first": 9})
    )
    assert (
        torch.equal(whole[:4], other_seed)
        == torch.equal(whole[:4], other_number)
        == (name not in CHANCE)
    )


def test_noise_has_the_moments_it_names() -> None:
    grey = torch.full((40, 1, 32, 32), 102, dtype=torch.uint8)  # 0.4
    for severity, deviation in zip(SEVERITIES[:3], GENERATED["gaussian-noise"][1], strict=False):
        off = corruptions.generated(grey, "gaussian-noise", severity, 0).double() / 255 - 0.4
        assert abs(float(off.mean())) < 4 * deviation / 200
        assert float(off.std()) == pytest.approx(deviation, rel=0.03)
    photons = GENERATED["shot-noise"][1][0]
    off = corruptions.generated(grey, "shot-noise", 1, 0).double() / 255 - 0.4
    assert float(off.var()) == pytest.approx(0.4 / photons, rel=0.05)
    share = GENERATED["impulse-noise"][1][4]
    hit = corruptions.generated(grey, "impulse-noise", 5, 0)
    for value in (0, 255):
        assert float((hit == value).double().mean()) == pytest.approx(share / 2, rel=0.05)


def test_blurs_and_shifts_are_what_they_say() -> None:
    kernel = corruptions.disc(2.3)
    assert kernel.shape == (5, 5)
    assert float(kernel.sum()) == pytest.approx(1)
    assert torch.equal(kernel, kernel.T)
    assert torch.equal(kernel, kernel.flip(0))
    assert float(kernel[2, 2]) == pytest.approx(
        1 / (np.pi * 2.3**2), rel=0.01
    )  # a pixel that is covered whole
    flat = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    for name in ("defocus-blur", "contrast", "pixelate", "translate"):
        assert torch.equal(corruptions.generated(flat, name, 5, 0), flat), name
    images = photographs()
    mosaic = corruptions.generated(images, "pixelate", 2, 0)  # 16 cells a side of 2 by 2 pixels
    assert torch.equal(mosaic[..., ::2, ::2], mosaic[..., 1::2, 1::2])
    assert (
        mosaic[..., ::2, ::2] - torch.nn.functional.avg_pool2d(images.double(), 2)
    ).abs().max() < 0.51
    flatter = corruptions.generated(images, "contrast", 2, 0).double()
    assert flatter.flatten(1).std(1) / images.double().flatten(1).std(1) == pytest.approx(
        GENERATED["contrast"][1][1], abs=0.01
    )
    brighter = corruptions.generated(flat, "brightness", 1, 0)
    assert torch.equal(brighter, flat + round(255 * GENERATED["brightness"][1][0]))
    moved = corruptions.generated(images, "translate", 3, 0)
    inner, length = slice(10, 22), 4  # ceil(0.10 * 32)
    for one, other in zip(moved, images, strict=True):
        shifts = [
            (dy, dx) for dy in range(-length, length + 1) for dx in range(-length, length + 1)
        ]
        fits = [
            s
            for s in shifts
            if torch.equal(
                one[:, inner, inner], other[:, 10 + s[0] : 22 + s[0], 10 + s[1] : 22 + s[1]]
            )
        ]
        assert len(fits) == 1
        assert 3 < np.hypot(*fits[0]) < 5


def test_generated_sets_cover_every_kind() -> None:
    images, labels = photographs(2, 1, 8), torch.tensor([3, 1])
    found = list(corruptions.sets("generated", images, labels, 0))
    assert [row[:2] for row in found] == [
        (name, severity) for name in GENERATED for severity in SEVERITIES
    ]
    assert all(torch.equal(row[3], labels) for row in found)


def test_bad_arguments_are_named() -> None:
    images = photographs(1)
    with pytest.raises(
        ConfigError,
        match="corruption 'gausian-noise' is not made here; did you mean 'gaussian-noise'",
    ):
        corruptions.generated(images, "gausian-noise", 1, 0)
    with pytest.raises(ConfigError, match="severity=6"):
        corruptions.generated(images, "jpeg", 6, 0)
    with pytest.raises(DataError, match=r"float32 \[1, 3, 32, 32\], expected uint8"):
        corruptions.generated(images.float(), "jpeg", 1, 0)


# -- accuracies ------------------------------------------------------------------------------------
def test_the_summary_is_the_mean_of_means() -> None:
    rows = [
        (name, severity, 0.9 - 0.1 * severity - 0.2 * (name == "fog"))
        for name in ("snow", "fog")
        for severity in SEVERITIES
    ]
    found = corruptions.summary(reversed(rows))
    assert found["corruption_accuracy"] == pytest.approx(0.5)
    assert found["by_corruption"] == pytest.approx({"snow": 0.6, "fog": 0.4})
    assert found["by_severity"]["snow"] == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])
    assert not found["published_sets"]
    assert "mce" not in found
    assert corruptions.summary(
        [(name, severity, 0.5) for name in COMMON for severity in SEVERITIES]
    )["published_sets"]
    with pytest.raises(DataError, match="no accuracy under any corruption"):
        corruptions.summary([])


def test_mce_is_the_mean_ratio_of_errors() -> None:
    rows = [("snow", 1, 0.8), ("snow", 2, 0.6), ("fog", 1, 0.5), ("fog", 2, 0.5)]
    assert corruptions.summary(rows, {"snow": 0.6, "fog": 0.25})["mce"] == pytest.approx(
        (0.3 / 0.6 + 0.5 / 0.25) / 2
    )
    with pytest.raises(DataError, match="no error rate above 0 for 'fog'"):
        corruptions.summary(rows, {"snow": 0.6})
