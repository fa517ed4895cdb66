"""Every form in which CIFAR is passed around gives the same images; hostile and damaged files run
nothing and are named.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dra_ray import config, data
from dra_ray.data import cifar
from dra_ray.errors import DataError

TRAIN, TEST = 15, 4
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def made(name: str) -> dict[str, np.ndarray]:
    """Images uint8 [N,3,32,32] and labels of both parts."""
    rng, classes = np.random.default_rng(0), 10 if name == "cifar10" else 100
    parts = {"train": TRAIN, "test": TEST}
    images = {
        part: rng.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
        for part, count in parts.items()
    }
    return images | {
        f"{part}_labels": np.append(rng.integers(0, classes, count - 1), classes - 1)
        for part, count in parts.items()
    }


def batches(name: str) -> dict[str, dict[str, Any]]:
    """The files of the official archive before they are pickled."""
    arrays, files = made(name), {}
    for part, names in (("train", cifar.ARCHIVES[name][2]), ("test", cifar.ARCHIVES[name][3])):
        split = zip(
            names,
            np.array_split(arrays[part], len(names)),
            np.array_split(arrays[f"{part}_labels"], len(names)),
            strict=True,
        )
        for file, images, labels in split:
            files[file] = {
                "data": images.reshape(len(images), -1),
                "filenames": ["a.png"] * len(images),
                "batch_label": file,
            }
            if name == "cifar10":
                files[file]["labels"] = labels.tolist()
            else:
                files[file] |= {"fine_labels": labels.tolist(), "coarse_labels": [0] * len(labels)}
    return files


def as_python_2(value: Any) -> bytes:
    """The opcodes that Python 2 with numpy 1 wrote for protocol 2, as in the official files: byte
    strings throughout.
    """

    def text(value: bytes) -> bytes:
        return (
            b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        ) + value

    def body(value: Any) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(body(key) + body(item) for key, item in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(body, value)) + b"e"
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"(" + b"".join(map(body, value.shape)) + b"t"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return array + b"(K\x01" + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02" + body(value) + b"."


def as_python_3(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def unpacked(folder: Path, name: str, dump: Callable[[Any], bytes] = as_python_2) -> Path:
    inside = folder / FOLDERS[name]
    inside.mkdir(parents=True)
    for file, batch in batches(name).items():
        (inside / file).write_bytes(dump(batch))
    (inside / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(
        as_python_2({"label_names": ["a"]})
    )
    return inside


def archived(folder: Path, name: str) -> Path:
    inside = unpacked(folder / "before", name)
    archive = folder / cifar.ARCHIVES[name][0]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, inside.name)
    return archive


def in_one_npz(folder: Path, name: str) -> Path:
    arrays = made(name)
    image, test_image = (arrays[part].transpose(0, 2, 3, 1) for part in ("train", "test"))
    np.savez(
        folder / "set.npz",
        image=image,
        label=arrays["train_labels"],
        test_image=test_image,
        test_label=arrays["test_labels"],
    )
    return folder / "set.npz"


def in_two_npz(folder: Path, name: str) -> Path:
    arrays = made(name)
    for part in ("train", "test"):
        np.savez_compressed(
            folder / f"{part}.npz",
            image=arrays[part].transpose(0, 2, 3, 1),
            label=arrays[f"{part}_labels"],
        )
    return folder


def in_npy(folder: Path, name: str) -> Path:
    arrays = made(name)
    for part in ("train", "test"):
        np.save(folder / f"{part}_images.npy", arrays[part].transpose(0, 2, 3, 1))
        np.save(folder / f"{part}_labels.npy", arrays[f"{part}_labels"])
    return folder


def png(image: np.ndarray) -> bytes:
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def in_parquet(
    folder: Path, name: str, image: str = "img", plain: bool = False, below: str = ""
) -> Path:
    (folder / below).mkdir(exist_ok=True)
    for part, images in ((part, made(name)[part]) for part in ("train", "test")):
        labels = made(name)[f"{part}_labels"]
        for index, rows in enumerate(np.array_split(np.arange(len(images)), 2)):
            files = [
                png(images[row]) if plain else {"bytes": png(images[row]), "path": None}
                for row in rows
            ]
            columns = {
                image: files,
                "fine_label" if name == "cifar100" else "label": labels[rows].tolist(),
            }
            columns |= {"coarse_label": [0] * len(rows)} if name == "cifar100" else {}
            pyarrow.parquet.write_table(
                pyarrow.table(columns), folder / below / f"{part}-{index:05d}-of-00002.parquet"
            )
    return folder


FORMS: dict[str, Callable[[Path, str], Path]] = {
    "unpacked": unpacked,
    "unpacked by Python 3": lambda folder, name: unpacked(folder, name, as_python_3),
    "folder with the unpacked folder": lambda folder, name: unpacked(folder, name).parent,
    "archive": archived,
    "folder with the archive": lambda folder, name: archived(folder, name).parent,
    "one npz": in_one_npz,
    "two npz": in_two_npz,
    "npy": in_npy,
    "parquet": in_parquet,
    "parquet of bytes": lambda folder, name: in_parquet(folder, name, "image", plain=True),
    "parquet one folder deeper": lambda folder, name: in_parquet(folder, name, below="plain_text"),
}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(tmp_path, form: str, name: str) -> None:
    settings = config.Data(
        name=name,
        uri=str(FORMS[form](tmp_path, name)),
        validation_images=4,
        train_images=8,
        test_images=3,
    )
    images, arrays = data.load(settings), made(name)
    for split, part, rows in (
        (images.validation, "train", slice(4)),
        (images.train, "train", slice(4, 12)),
        (images.test, "test", slice(3)),
    ):
        assert isinstance(split, data.Split)
        assert np.array_equal(split.images.numpy(), arrays[part][rows])
        assert np.array_equal(split.labels.numpy(), arrays[f"{part}_labels"][rows])
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    assert images.shape == data.outline(settings).shape


def with_bytes_keys(batch: dict[str, Any]) -> dict[Any, Any]:
    return {key.encode(): value for key, value in batch.items()}


def with_arrays(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batch: (
        batch
        | {key: np.array(batch[key], kind) for key in ("labels", "fine_labels") if key in batch}
    )


def with_scalars(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {
        key: [np.int32(value) for value in batch[key]]
        for key in ("labels", "fine_labels")
        if key in batch
    }


CHANGES: dict[str, Callable[[dict[str, Any]], dict[Any, Any]]] = {
    "as they are": dict,
    "keys of bytes": with_bytes_keys,
    "labels int64": with_arrays("<i8"),
    "labels big-endian": with_arrays(">i4"),
    "labels uint8": with_arrays("u1"),
    "labels of numpy": with_scalars,
    "columns first": lambda batch: batch | {"data": np.asfortranarray(batch["data"])},
    "keys of bytes, labels int64": lambda batch: with_bytes_keys(with_arrays("<i8")(batch)),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_protocol_and_writer_gives_the_same_images(
    tmp_path, name: str, change: str, protocol: int
) -> None:
    (tmp_path / FOLDERS[name]).mkdir()
    for file, batch in batches(name).items():
        (tmp_path / FOLDERS[name] / file).write_bytes(
            pickle.dumps(CHANGES[change](batch), protocol)
        )
    if name == "cifar100":
        (tmp_path / FOLDERS[name] / "meta").write_bytes(b"")
    images = data.load(config.Data(name=name, uri=str(tmp_path), validation_images=4))
    assert np.array_equal(data.in_memory(images.test).images.numpy(), made(name)["test"])
    assert images.test.labels.tolist() == made(name)["test_labels"].tolist()
    assert (
        torch.cat([images.validation.labels, images.train.labels]).tolist()
        == made(name)["train_labels"].tolist()
    )


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0.0, 1.0, 2.0]),
        np.zeros((3, 2), np.int64),
        np.array(1),
        np.array([b"a", b"b", b"c"]),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_labels_that_are_none_are_refused(tmp_path, labels: np.ndarray, protocol: int) -> None:
    (unpacked(tmp_path, "cifar10") / "data_batch_2").write_bytes(
        pickle.dumps(batches("cifar10")["data_batch_2"] | {"labels": labels}, protocol)
    )
    refused(tmp_path, FOLDERS["cifar10"])


def test_what_macos_adds_to_an_archive_is_passed_over(tmp_path) -> None:
    before = data.load(
        config.Data(name="cifar10", uri=str(archived(tmp_path, "cifar10")), validation_images=4)
    )
    with tarfile.open(tmp_path / "mac.tar.gz", "w:gz") as archive:
        for file in sorted((tmp_path / "before" / FOLDERS["cifar10"]).iterdir()):
            for name in (
                f"__MACOSX/{FOLDERS['cifar10']}/{file.name}",
                f"{FOLDERS['cifar10']}/._{file.name}",
            ):
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
            archive.add(file, f"{FOLDERS['cifar10']}/{file.name}")
            archive.addfile(tarfile.TarInfo(f"__MACOSX/{file.name}"), io.BytesIO())
    assert (
        data.load(
            config.Data(name="cifar10", uri=str(tmp_path / "mac.tar.gz"), validation_images=4)
        ).sha256
        == before.sha256
    )


class Hostile:
    """What runs when an ordinary unpickler reads it."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def object_array(value: Any) -> np.ndarray:
    array = np.empty((3, 3072), dtype=object)
    array[:] = value
    return array


@pytest.mark.parametrize(
    "hostile",
    [
        lambda canary: as_python_3(Hostile(canary)),
        lambda canary: as_python_3({"data": Hostile(canary), "labels": [0]}),
        lambda canary: as_python_3({"data": object_array(Hostile(canary)), "labels": [0] * 3}),
        lambda canary: pickle.dumps({"data": 1, Hostile(canary): 2}, protocol=4),
        lambda canary: f"cbuiltins\nexec\n(S'open({canary!r}, \"w\")'\ntR.".encode(),
        lambda canary: (
            f"c_codecs\nencode\nc__builtin__\neval\n(S'open({canary!r}, \"w\")'\ntR.".encode()
        ),
        lambda canary: b"(S'open(\"" + canary.encode() + b'", "w")\'\ni__builtin__\neval\n.',
        lambda canary: b"\x80\x04cnumpy\nload\n.",
        lambda canary: b"\x80\x04cnumpy\ndtype.__class__\n.",
    ],
)
def test_a_hostile_pickle_runs_nothing(tmp_path, hostile: Callable[[str], bytes]) -> None:
    canary = tmp_path / "canary"
    (unpacked(tmp_path, "cifar10") / "data_batch_3").write_bytes(hostile(str(canary)))
    with pytest.raises(DataError, match=r"data_batch_3.*read safely") as caught:
        data.load(config.Data(name="cifar10", uri=str(tmp_path), validation_images=4))
    assert not canary.exists()
    assert "\n" not in str(caught.value)


def batch_with(**changes: Any) -> bytes:
    return as_python_3(batches("cifar10")["data_batch_2"] | changes)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\x80\x02}q",
        as_python_2(batches("cifar10")["data_batch_2"])[:-300],
        as_python_2(batches("cifar10")["data_batch_2"]).replace(b"u1", b"i8"),
        as_python_2([1, 2]),
        batch_with(data=[1, 2, 3]),
        batch_with(data=np.zeros((3, 3000), np.uint8)),
        batch_with(data=np.zeros((3, 3072), np.float32)),
        batch_with(data=np.zeros((4, 3072), np.uint8)),
        batch_with(labels=[0, 1]),
        batch_with(labels=[0, 1, 10]),
        batch_with(labels=[0, 1, -1]),
        batch_with(labels=[0, 1, "2"]),
        batch_with(labels=[0, 1, [2]]),
        batch_with(labels=[0, 1, 2**70]),
        batch_with(labels=[0.0, 1.0, 2.0]),
        batch_with(labels=None),
    ],
)
def test_damaged_batches_are_refused(tmp_path, wrong: bytes) -> None:
    (unpacked(tmp_path, "cifar10") / "data_batch_2").write_bytes(wrong)
    with pytest.raises(DataError, match=FOLDERS["cifar10"]) as caught:
        data.load(config.Data(name="cifar10", uri=str(tmp_path), validation_images=4))
    assert "\n" not in str(caught.value)


def refused(path: Path, words: str, name: str = "cifar10", **changes: Any) -> None:
    with pytest.raises(DataError, match=words) as caught:
        data.load(config.Data(**{"name": name, "uri": str(path), "validation_images": 4} | changes))
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files_are_named(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "none", "does not exist; give cifar-10-python.tar.gz")
    refused(tmp_path / "empty", "holds no cifar100; give cifar-100-python.tar.gz", "cifar100")
    for name, file in (("cifar10", "data_batch_4"), ("cifar100", "train")):
        (unpacked(tmp_path, name) / file).unlink()
        refused(tmp_path / FOLDERS[name], f"lacks {file} of {name}", name)
    archive = archived(tmp_path, "cifar10")
    refused(archive, "validation_images=50.*15 training images", validation_images=50)
    archive.write_bytes(archive.read_bytes()[:2000])
    refused(archive, "not a whole tar archive.*fetch cifar-10-python.tar.gz again")


def test_wrong_arrays_are_named(tmp_path) -> None:
    image, label = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)
    good = {"image": image, "label": label, "test_image": image, "test_label": label}
    for change, words in (
        ({"image": image.astype(np.float32)}, "float32"),
        ({"image": image.transpose(0, 3, 1, 2)}, "transpose"),
        ({"image": image[:, :28, :28]}, r"\(3, 32, 32\)"),
        ({"label": label[:7]}, "8 images, but labels are"),
        ({"test_label": label + 3}, "labels reach 10"),
        ({"label": label / 2}, "float64"),
    ):
        np.savez(tmp_path / "a.npz", **good | change)
        refused(tmp_path / "a.npz", words)
    np.savez(tmp_path / "a.npz", image=image, label=label)
    refused(tmp_path / "a.npz", "expected 'test_image'")
    np.save(tmp_path / "train_images.npy", image)
    np.save(
        tmp_path / "test_images.npy", np.array([Hostile(str(tmp_path / "canary"))], dtype=object)
    )
    refused(tmp_path, "train_labels.npy' is missing")
    np.save(tmp_path / "train_labels.npy", label)
    np.save(tmp_path / "test_labels.npy", label)
    refused(tmp_path, "test_images.npy' is not a readable npy file")
    assert not (tmp_path / "canary").exists()


def test_wrong_parquet_is_named(tmp_path) -> None:
    def write(part: str, **columns: list[Any]) -> None:
        pyarrow.parquet.write_table(
            pyarrow.table(columns), tmp_path / f"{part}-00000-of-00001.parquet"
        )

    small, right = png(np.zeros((3, 28, 28), np.uint8)), png(np.zeros((3, 32, 32), np.uint8))
    write("train", img=[right] * 6, label=[1] * 6)
    refused(tmp_path, "there is no .*/test-")
    for columns, words in (
        ({"img": [right, small], "label": [1, 2]}, r"row 1: the image has \(28, 28\)"),
        ({"img": [right, right[:50]], "label": [1, 2]}, "row 1' cannot be decoded"),
        ({"img": [right], "label": [10]}, "labels reach 10"),
        ({"img": [right], "label": [None]}, "labels are object"),
        ({"img": ["a.png"], "label": [1]}, "does not hold the bytes"),
        ({"picture": [right], "label": [1]}, "expected img or image"),
    ):
        write("test", **columns)
        refused(tmp_path, words)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 half a file")
    refused(tmp_path, "not a readable parquet file")
