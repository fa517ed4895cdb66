"""Class folders and tar shards against torchvision's own reader and transforms; nothing is decoded
before it is used.
"""

from __future__ import annotations

import functools
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from dra_ray import config, data
from dra_ray.errors import DataError
from dra_ray.storage import Store

CLASSES = ("ant", "bee", "cat")


@functools.cache
def encoded(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image of its own size and colours."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
    small.resize((30 + 7 * (number % 5), 30 + 11 * (number % 3)), Image.Resampling.BICUBIC).convert(
        mode
    ).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def class_folders(root: Path, train: int = 6, test: int = 2, test_name: str = "val") -> Path:
    for part, count, start in (("train", train, 0), (test_name, test, 100)):
        for index, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                (root / part / name / f"{number}.JPEG").write_bytes(
                    encoded(start + 10 * index + number)
                )
    return root


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards(root: Path, per_class: int = 6, test: int = 2, classes: int = 3) -> Path:
    root.mkdir(exist_ok=True)
    for part, count, start in (("train", per_class, 0), ("val", test, 100)):
        for shard in range(2):
            files = {}
            for number in range(shard, count * classes, 2):
                files |= {
                    f"x/{number}.jpg": encoded(start + number % 50),
                    f"x/{number}.cls": str(number % classes).encode(),
                }
            tar(root / f"set-{part}-{shard:04d}.tar", files)
    return root


def settings(uri: object, **changes: Any) -> config.Data:
    return config.Data(
        **{"name": "folder", "uri": str(uri), "resolution": 21, "validation_images": 5} | changes
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_images_are_those_of_torchvision(tmp_path) -> None:
    class_folders(tmp_path)
    (tmp_path / "val" / "ant" / "1.JPEG").write_bytes(encoded(1, mode="L"))
    (tmp_path / "val" / "bee" / "1.JPEG").unlink()
    (tmp_path / "val" / "bee" / "1.png").write_bytes(encoded(2, "PNG", "RGBA"))
    (tmp_path / "val" / "bee" / "readme.txt").write_text("no image")
    images = data.load(settings(tmp_path))
    standard = transforms.Compose(
        [
            transforms.Resize(24, InterpolationMode.BICUBIC),
            transforms.CenterCrop(21),
            transforms.PILToTensor(),
        ]
    )
    reference = ImageFolder(str(tmp_path / "val"), standard)
    pixels, labels = images.test.take(torch.arange(len(images.test)))
    assert len(images.test) == len(reference) == 6
    for index in range(len(reference)):
        assert torch.equal(pixels[index], reference[index][0])
        assert labels[index] == reference[index][1]
    assert images.shape == data.Shape(3, 3, 21, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("make", [class_folders, shards])
def test_splits_are_disjoint_mixed_and_fixed_by_their_seed(tmp_path, make) -> None:
    uri = make(tmp_path / "set")
    images, again, other = (data.load(settings(uri, split_seed=seed)) for seed in (0, 0, 1))
    assert (len(images.train), len(images.validation), len(images.test)) == (13, 5, 6)
    assert len(images.validation.labels.unique()) > 1
    assert images.sha256 == again.sha256 != other.sha256
    assert images.facts()["sha256_of"] == "file names, file sizes and labels"
    rows = torch.cat(
        [data.in_memory(part).images for part in (images.train, images.validation)]
    ).flatten(1)
    assert len(rows.unique(dim=0)) == 18
    fewer = data.load(settings(uri, train_images=6, test_images=4))
    assert torch.equal(data.in_memory(fewer.train).images, data.in_memory(images.train[:6]).images)
    assert len(fewer.test) == 4
    assert len(fewer.test.labels.unique()) > 1
    outline = data.outline(settings(uri))
    assert (outline.train, outline.validation, outline.test, outline.shape) == (
        13,
        5,
        6,
        images.shape,
    )


def test_shards_hold_what_folders_hold(tmp_path, cache) -> None:
    uri = shards(tmp_path / "set")
    images = data.load(settings(uri, validation_images=0))
    for part in (images.train, pickle.loads(pickle.dumps(images.train))):
        labelled = data.in_memory(part)
        found = {
            image.numpy().tobytes(): int(label)
            for image, label in zip(labelled.images, labelled.labels, strict=True)
        }
        assert len(found) == 18
        for number in range(18):
            (tmp_path / "one" / "train" / "a").mkdir(parents=True, exist_ok=True)
            image = Image.open(io.BytesIO(encoded(number)))
            pixels = transforms.CenterCrop(21)(
                transforms.Resize(24, InterpolationMode.BICUBIC)(image)
            )
            assert found[transforms.PILToTensor()(pixels).numpy().tobytes()] == number % 3
    kept = sorted(file.name for file in cache.iterdir())
    assert len(kept) == 4
    assert data.load(settings(uri, validation_images=0)).sha256 == images.sha256
    (cache / kept[0]).unlink()
    assert data.load(settings(uri, validation_images=0)).sha256 == images.sha256


@pytest.mark.parametrize("make", [class_folders, shards])
def test_remote_sets_are_the_local_ones(tmp_path, make) -> None:
    local, remote = make(tmp_path / "set"), Store(f"memory://{tmp_path.name}-{make.__name__}")
    for name in Store(str(local)).files():
        (remote / name).write_bytes((local / name).read_bytes())
    here, there = data.load(settings(local)), data.load(settings(remote))
    assert here.sha256 == there.sha256
    assert torch.equal(data.in_memory(here.train).images, data.in_memory(there.train).images)


def test_nothing_is_decoded_before_it_is_used(tmp_path) -> None:
    uri = class_folders(tmp_path)
    for file in (uri / "train").rglob("*.JPEG"):
        file.write_bytes(b"not an image")
    images = data.load(settings(uri))
    with pytest.raises(DataError, match=r"train/\w+/\d\.JPEG' cannot be decoded"):
        images.train.take(torch.tensor([0]))
    file = uri / "val" / "ant" / "0.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"val/ant/0\.JPEG"):
        images.test.take(torch.tensor([0]))
    assert images.test.take(torch.tensor([1, 2]))[0].shape == (2, 3, 21, 21)


def refused(words: str, uri: Path, **changes: Any) -> None:
    with pytest.raises(DataError, match=words) as caught:
        data.load(settings(uri, **changes))
    assert "\n" not in str(caught.value)


def test_sets_that_lack_something_say_what(tmp_path) -> None:
    refused("holds neither a folder train nor shards", tmp_path)
    uri = class_folders(tmp_path / "a")
    refused("has 3 classes in train, but imagenet has 1000", uri, name="imagenet")
    refused("validation_images=18.*has 18 training images", uri, validation_images=18)
    (uri / "val" / "dog").mkdir()
    (uri / "val" / "dog" / "0.JPEG").write_bytes(encoded(0))
    refused("class folder 'dog' that .*train' lacks", uri)
    (uri / "val").rename(uri / "held-out")
    refused("has no folder test or val or validation, so nothing to test on", uri)
    (uri / "val").mkdir()
    refused("val' holds no images", uri)
    (uri / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded(0))
    refused("lies in no class folder", uri)


def test_damaged_shards_are_named(tmp_path) -> None:
    uri = shards(tmp_path / "a")
    whole = (uri / "set-train-0001.tar").read_bytes()
    cls = whole.index(b".cls")
    for wrong, words in (
        (whole[:1500], "train-0001.tar"),
        (b"", "train-0001.tar"),
        (whole[:cls] + b".txt" + whole[cls + 4 :], "train-0001.tar"),
        (whole.replace(b"x/1.cls", b"x/y.cls"), "train-0001.tar"),
    ):
        (uri / "set-train-0001.tar").write_bytes(wrong)
        refused(words, uri)
    for file in uri.glob("*train*"):
        file.unlink()
    (uri / "train-0.tar").write_bytes(whole)
    (uri / "set-val-0000.tar").unlink()
    (uri / "set-val-0001.tar").unlink()
    refused(r"no shards named \*test\*.tar or", uri)


def test_class_numbers_are_checked(tmp_path) -> None:
    uri = shards(tmp_path / "a")
    for number, words in (
        (b"3", "labels reach 3, but there are 3 classes"),
        (b"-1", "labels reach -1"),
        (b"ant", "holds 'ant', not a class number"),
    ):
        tar(uri / "val-extra.tar", {"0.jpg": encoded(0), "0.cls": number})
        refused(words, uri)
    tar(uri / "val-extra.tar", {"0.JPG": encoded(0), "0.json": b"{}", "0.cls": b"2\n"})
    assert len(data.load(settings(uri)).test) == 7


def test_imagenet_has_a_thousand_classes(tmp_path) -> None:
    uri = shards(tmp_path / "a", per_class=1, test=1, classes=1000)
    images = data.load(
        settings(uri, name="imagenet", resolution=16, validation_images=100, test_images=50)
    )
    assert (images.num_classes, len(images.train), len(images.validation), len(images.test)) == (
        1000,
        900,
        100,
        50,
    )
    assert images.shape == data.outline(settings(uri, name="imagenet", resolution=16)).shape


def test_what_macos_and_other_encodings_add_to_shards(tmp_path) -> None:
    uri = shards(tmp_path / "set")
    before = data.in_memory(data.load(settings(uri)).test)
    marks = {
        "\xe4/0.jpg": encoded(100),
        "\xe4/0.cls": b"\xef\xbb\xbf0\r\n",
        "1.jpg": encoded(101),
        "1.cls": "1".encode("utf-16"),
    }
    clutter = dict.fromkeys(
        ("._1.jpg", "._1.cls", "__MACOSX/x/._1.jpg", "x/._lone.cls", ".DS_Store"),
        b"\x00\x05\x16\x07",
    )
    (uri / "._set-val-0000.tar").write_bytes(b"\0\5\x16\7")
    tar(
        uri / "set-val-0002.tar",
        marks | clutter | {"1.json": b"\xef\xbb\xbf{}", "1.csv": b"\xff\xfea"},
    )
    after = data.in_memory(data.load(settings(uri)).test)
    assert torch.equal(after.images[:-2], before.images)
    assert after.labels.tolist() == [
        *before.labels.tolist(),
        0,
        1,
    ]
    tar(uri / "set-val-0002.tar", {"1.jpg": encoded(1), "1.cls": b"\xe9"})
    refused("'1.cls' holds '\ufffd', not a class number", uri)


def test_classnames_say_how_many_classes_there_are(tmp_path) -> None:
    """The training shards may lack the last class, and the test shards may hold it."""
    uri = shards(tmp_path / "set")
    tar(uri / "set-val-0002.tar", {"0.jpg": encoded(0), "0.cls": b"3"})
    refused("labels reach 3, but there are 3 classes", uri)
    (uri / "classnames.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncat\r\ndog\r\n\r\n")
    images = data.load(settings(uri))
    assert images.num_classes == 4
    assert int(images.test.labels.max()) == 3
    (uri / "classnames.txt").write_text("ant\nbee")
    refused("labels reach 2, but there are 2 classes", uri)
    (uri / "classnames.txt").write_text("x\n" * 1000)
    refused("has 1,000 classes by classnames.txt, but only 3 of them have images", uri)
    (uri / "classnames.txt").write_text("x\n" * 10**6)
    refused("classnames.txt' has 2,000,000 bytes", uri)
