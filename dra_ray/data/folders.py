"""Sets of image files, decoded when a batch asks for them: class folders, as ImageNet has, and
shards as of webdataset.

    <uri>/train/<class>/*.JPEG   <uri>/val/<class>/*.JPEG      classes in the order of their
    folders' names <uri>/*train*.tar            <uri>/*val*.tar               pairs of KEY.jpg and
    KEY.cls, which holds the class number <uri>/classnames.txt         beside shards, optional: one
    line for every class

Which image files are read, and what becomes of their modes, is in `decode`. Shards have as many
classes as classnames.txt has lines, or one more than the largest number in their training part. The
test part is `test`, or `val` or `validation` where there is no `test` (ImageNet's test images have
no labels: its val comes first). Images are made square as is usual for evaluation: shorter side to
resolution * 256/224 (bicubic), then the centre.
"""

from __future__ import annotations

import abc
import dataclasses
import re

import numpy as np
import torch
from torch import Tensor

from dra_ray import config
from dra_ray.data import decode
from dra_ray.data.pictures import Digest, OnDisk, Parts, checked_labels
from dra_ray.errors import DataError
from dra_ray.storage import Store, decoded_text, is_clutter, readable_name

TESTS = {"imagenet": ("val", "validation", "test"), "folder": ("test", "val", "validation")}
IMAGENET_CLASSES, MOST_RESOLUTION = 1000, 4096
CLASS_NAMES, CLASS_NAMES_BYTES = "classnames.txt", 2**20
LAYOUT = (
    "train/<class>/ and val/<class>/ with image files, or *train*.tar and *val*.tar with KEY.jpg "
    "and KEY.cls"
)


def read(settings: config.Data) -> Parts:
    """List the images at `settings.uri`; none is decoded yet. Raises `DataError` naming what is
    missing or does not fit.
    """
    if not settings.uri:
        hint = (
            " (ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, unpacked and sorted by class)"
            if settings.name == "imagenet"
            else ""
        )
        raise DataError(
            f"data.uri is not set, but data.name='{settings.name}' is read from files; give a "
            f"folder with {LAYOUT}{hint}"
        )
    store, resolution = Store(settings.uri), settings.resolution or 224
    if resolution > MOST_RESOLUTION:
        raise DataError(
            f"data.resolution={resolution}: images are resized to at most {MOST_RESOLUTION} pixels "
            "a side; lower it"
        )
    names = [name for name in store.names() if not is_clutter(name)]
    if "train" in names:
        listing = _class_folders(store, _test_folder(settings, names), resolution)
    elif shards := [name for name in names if name.endswith(".tar") and "train" in name]:
        test = _test_shards(
            settings, [name for name in names if name.endswith(".tar") and "train" not in name]
        )
        listing = _shards(
            store,
            shards,
            test,
            resolution,
            IMAGENET_CLASSES if settings.name == "imagenet" else None,
        )
    else:
        raise DataError(
            f"data.uri='{settings.uri}' holds neither a folder train nor shards; it needs {LAYOUT}"
        )
    if listing.num_classes is not None and listing.num_classes < 2:
        raise DataError(
            f"data.uri='{settings.uri}' has images of one class alone; a classifier needs two"
        )
    if settings.name == "imagenet" and listing.num_classes != IMAGENET_CLASSES:
        raise DataError(
            f"data.uri='{settings.uri}' has {listing.num_classes} classes in train, but imagenet "
            f"has {IMAGENET_CLASSES}; "
            "set data.name=folder for another set"
        )
    return listing


def _test_folder(settings: config.Data, names: list[str]) -> str:
    found = next((name for name in TESTS[settings.name] if name in names), None)
    if found is None:
        raise DataError(
            f"data.uri='{settings.uri}' has no folder {' or '.join(TESTS[settings.name])}, so "
            "nothing to test on; move part of train/<class>/ there"
        )
    return found


def _test_shards(settings: config.Data, names: list[str]) -> list[str]:
    for part in TESTS[settings.name]:
        if found := [name for name in names if part in name]:
            return found
    raise DataError(
        f"data.uri='{settings.uri}' has no shards named "
        f"{' or '.join(f'*{p}*.tar' for p in TESTS[settings.name])}; add them to test on"
    )


class Squares(abc.ABC):
    """`Records` of image files, made square when they are read."""

    resolution: int

    @property
    def picture_shape(self) -> tuple[int, ...]:
        return 3, self.resolution, self.resolution

    def read(self, positions: list[int]) -> Tensor:
        return decode.batch(self._decoded, positions, self.picture_shape)

    @abc.abstractmethod
    def _decoded(self, position: int) -> np.ndarray: ...


# -- class folders ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Files(Squares):
    """`Records` in one file each."""

    folder: Store
    names: list[str]
    file_bytes: list[int]
    resolution: int

    def _decoded(self, position: int) -> np.ndarray:
        file = self.folder / self.names[position]
        return decode.centre(file.read_bytes(), readable_name(file.uri), self.resolution)

    def hash_into(self, digest: Digest) -> None:
        for name, size in zip(self.names, self.file_bytes, strict=True):
            digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))


def _class_folders(store: Store, test: str, resolution: int) -> Parts:
    train_files, test_files = (_image_files(store / part) for part in ("train", test))
    classes = sorted({name.split("/", 1)[0] for name in train_files})
    number = {name: index for index, name in enumerate(classes)}
    strangers = {name.split("/", 1)[0] for name in test_files} - number.keys()
    if strangers:
        raise DataError(
            f"'{store / test}' has a class folder '{readable_name(min(strangers))}' that "
            f"'{store / 'train'}' lacks; both need the same classes"
        )
    parts = []
    for part, files in (("train", train_files), (test, test_files)):
        labels = torch.tensor([number[name.split("/", 1)[0]] for name in files], dtype=torch.int64)
        parts.append(
            OnDisk(
                Files(store / part, list(files), list(files.values()), resolution),
                labels,
                range(len(labels)),
            )
        )
    return Parts(parts[0], parts[1], len(classes))


def _image_files(folder: Store) -> dict[str, int]:
    """Bytes of each image file by its path, below a class folder; none of these is empty."""
    every = {name: size for name, size in folder.files().items() if not is_clutter(name)}
    files = {name: size for name, size in every.items() if name.lower().endswith(decode.SUFFIXES)}
    other = next((name for name in every if name.lower().endswith(decode.OTHER_SUFFIXES)), None)
    if other:
        raise DataError(
            f"'{readable_name(f'{folder}/{other}')}' is of an image format that is not read; "
            f"convert it to one of {', '.join(decode.SUFFIXES)}, or remove it"
        )
    if not files:
        raise DataError(
            f"'{folder}' holds no images ({', '.join(decode.SUFFIXES)}); it needs one folder per "
            "class"
        )
    flat = next((name for name in files if "/" not in name), None)
    if flat:
        raise DataError(
            f"'{readable_name(f'{folder}/{flat}')}' lies in no class folder; move the images of "
            f"each class to '{folder}/<class>/'"
        )
    large = next((name for name, size in files.items() if size > decode.MOST_FILE_BYTES), None)
    if large:
        raise DataError(
            f"'{readable_name(f'{folder}/{large}')}' has {files[large]:,} bytes, more than an "
            "image has; make it smaller or remove it"
        )
    if cut := next((name for name, size in files.items() if not size), None):
        raise DataError(
            f"'{readable_name(f'{folder}/{cut}')}' is empty (0 bytes); fetch it again or remove it"
        )
    folders = {name for name in folder.names() if not is_clutter(name)} - every.keys()
    if empty := folders - {name.split("/", 1)[0] for name in files}:
        raise DataError(
            f"'{readable_name(f'{folder}/{min(empty)}')}' is a class folder without images; "
            "classes are numbered in the order of their folders, "
            "so add its images or remove it"
        )
    return files


# -- shards ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Shards(Squares):
    """`Records` inside tar files: (shard, first byte, bytes) of each, int64 [N,3]. `names` are the
    shards' own, whatever those of their copies.
    """

    shards: list[Store]
    names: list[str]
    places: Tensor
    resolution: int

    def _decoded(self, position: int) -> np.ndarray:
        shard, start, size = self.places[position].tolist()
        return decode.centre(
            self.shards[shard].read_bytes(start, size),
            f"{self.shards[shard]}, byte {start}",
            self.resolution,
        )

    def hash_into(self, digest: Digest) -> None:
        digest.update("\n".join(self.names).encode())
        digest.update(self.places.numpy().data)


def _shards(
    store: Store, train: list[str], test: list[str], resolution: int, official: int | None
) -> Parts:
    """`official` is the number of classes where the set has one."""
    shards = [[store / name for name in names] for names in (train, test)]
    listed = [_places(files) for files in shards]
    num_classes = _class_count(store, listed[0][1], official)
    parts = []
    for files, (places, numbers) in zip(shards, listed, strict=True):
        labels = checked_labels(numbers, len(numbers), files[0], num_classes)
        records = Shards(
            [shard.local_copy() for shard in files],
            [shard.name for shard in files],
            places,
            resolution,
        )
        parts.append(OnDisk(records, labels, range(len(labels))))
    return Parts(parts[0], parts[1], num_classes)


def _class_count(store: Store, numbers: list[int], official: int | None) -> int:
    """How many classes the training shards with these class numbers have; `DataError` where that
    cannot be.

    A number in one file decides how many outputs the student gets, so at least half of the classes
    must be in use.
    """
    listed, present = store / CLASS_NAMES, len(set(numbers))
    if official:
        count, source = official, "data.name"
    elif listed.exists():
        if listed.size() > CLASS_NAMES_BYTES:
            raise DataError(
                f"'{listed}' has {listed.size():,} bytes; it needs one line for every class"
            )
        count, source = len(decoded_text(listed.read_bytes()).strip().splitlines()), CLASS_NAMES
    else:
        count, source = max(numbers) + 1, "the largest class number in train"
    if count > 2 * present:
        raise DataError(
            f"data.uri='{store}' has {count:,} classes by {source}, but only {present:,} of them "
            "have images in train; "
            "number the classes from 0 on without gaps, and check data.name"
        )
    return count


def _places(shards: list[Store]) -> tuple[Tensor, list[int]]:
    """Where the images lie, int64 [N,3], and their class numbers; shards that are elsewhere are
    first copied to this node.
    """
    places: list[tuple[int, int, int]] = []
    numbers: list[int] = []
    for index, shard in enumerate(shards):
        pictures: dict[str, tuple[int, int, int]] = {}
        classes: dict[str, int] = {}
        for member in shard.local_copy().tar_members(".cls"):
            folder, _, base = member.name.rpartition("/")
            key, _, kind = base.partition(".")  # a sample's key ends at the first dot (webdataset)
            if member.text is not None:
                classes[f"{folder}/{key}"] = _class_number(member.text, shard, member.name)
            elif f".{kind.lower()}" in decode.SUFFIXES:
                if member.size > decode.MOST_FILE_BYTES:
                    raise DataError(
                        f"'{shard}': '{member.name}' has {member.size:,} bytes, more than an image "
                        "has; make the shard again"
                    )
                pictures[f"{folder}/{key}"] = (index, member.offset, member.size)
        if lone := pictures.keys() ^ classes.keys():
            raise DataError(
                f"'{shard}': '{min(lone).lstrip('/')}' has not both an image and a .cls file; "
                "fetch or make the shard again"
            )
        places += pictures.values()
        numbers += [classes[key] for key in pictures]
    if not numbers:
        raise DataError(
            f"'{shards[0]}' and the shards beside it hold no pairs of KEY.jpg and KEY.cls; fetch "
            "or make them again"
        )
    return torch.tensor(places, dtype=torch.int64), numbers


def _class_number(text: str, shard: Store, name: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
        raise DataError(
            f"'{shard}': '{name}' holds '{text.strip()[:20]}', not a class number; make the shard "
            "again"
        )
    return int(text)
