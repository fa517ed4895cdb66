"""Every mode and format that Pillow writes: read as what was drawn, or refused by the file's name
and mode."""

from __future__ import annotations

import io
import shutil
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dra_ray import config, data
from dra_ray.data import decode
from dra_ray.errors import DataError

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))  # black at the left, white at the right
GREY = Image.fromarray((RAMP * 255).round().astype(np.uint8))
RGB = Image.merge("RGB", [GREY] * 3)
GREY_16 = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
LAB = ImageCms.profileToProfile(
    RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
)
IMAGES = {
    mode: RGB.convert(mode)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX")
}
IMAGES |= {"PA": GREY.convert("PA"), "I;16": GREY_16, "LAB": LAB}
IMAGES |= {
    "I": Image.fromarray(np.asarray(GREY_16).astype(np.int32)),
    "F": Image.fromarray(RAMP.astype(np.float32)),
}
REFUSED = {("TIFF", "I"), ("TIFF", "F"), ("TIFF", "LAB"), ("PPM", "F")}
# of which Pillow's own writer makes 8 bits by cutting off, before a file exists
CUT_OFF = {(kind, mode) for kind in ("GIF", "WEBP", "AVIF") for mode in ("I;16", "I", "F")}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def cases() -> list[tuple[str, str]]:
    """(format, mode) of all that Pillow writes."""
    found = []
    for kind in decode.FORMATS:
        for mode, image in IMAGES.items():
            try:
                saved(image, kind)
            except (OSError, KeyError, ValueError):
                continue
            found.append((kind, mode))
    return [case for case in found if case not in CUT_OFF]


def is_the_ramp(image: Image.Image, tolerance: float) -> bool:
    return bool(
        np.abs(np.asarray(image).astype(float).mean((0, 2)) - RAMP[0] * 255).mean() < tolerance
    )


@pytest.mark.parametrize(("kind", "mode"), cases())
def test_every_mode_and_format(kind: str, mode: str) -> None:
    content = saved(IMAGES[mode], kind)
    if (kind, mode) in REFUSED:
        with pytest.raises(DataError, match=rf"'x/a\.img' has pixels of mode {mode} "):
            decode.picture(content, "x/a.img")
        return
    image = decode.picture(content, "x/a.img")
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert is_the_ramp(
        image, 40 if mode in ("1", "P") else 6 if kind == "GIF" else 3
    )  # dithered, or few colours


def tiff_16(largest: int, photometric: int) -> bytes:
    """Uncompressed 16-bit grey, whose BitsPerSample is that of `largest`."""
    values = (RAMP * largest).round() if photometric else largest - (RAMP * largest).round()
    bits = largest.bit_length()
    if bits == 12:  # two pixels in three bytes
        pairs = values.astype(np.uint32).reshape(-1, 2)
        body = b"".join(
            struct.pack(">I", int(first) << 12 | int(second))[1:] for first, second in pairs
        )
    else:
        body = values.astype("<u2").tobytes()
    sizes = ((256, 3, 64), (257, 3, 64), (258, 3, bits), (259, 3, 1), (262, 3, photometric))
    tags = (*sizes, (273, 4, 126), (277, 3, 1), (278, 3, 64), (279, 4, len(body)))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(
        126, b"\0"
    ) + body


@pytest.mark.parametrize(
    "content",
    [
        tiff_16(65535, 1),
        tiff_16(65535, 0),
        tiff_16(4095, 1),
        b"P5 64 64 1023\n" + (RAMP * 1023).round().astype(">u2").tobytes(),
        b"P5 64 64 65535\n" + np.asarray(GREY_16).astype(">u2").tobytes(),
        b"P5 64 64 100\n" + (RAMP * 100).round().astype(np.uint8).tobytes(),
        b"P2 64 64 65535\n" + " ".join(map(str, np.asarray(GREY_16).ravel())).encode(),
        b"P6 64 64 65535\n"
        + np.repeat(np.asarray(GREY_16).astype(">u2")[..., None], 3, 2).tobytes(),
        saved(GREY_16, "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray((RAMP * 15).round().astype(np.uint8)), "PNG", bits=4),
        saved(RGB, "JPEG", progressive=True, quality=95),
        saved(RGB, "MPO", save_all=True, append_images=[GREY.transpose(Image.Transpose.ROTATE_90)]),
    ],
)
def test_other_ranges_and_writers(content: bytes) -> None:
    assert is_the_ramp(decode.picture(content, "a"), 5)


def test_signed_pixels_are_refused() -> None:
    """Pillow reads them as unsigned, so that the darkest half becomes the brightest."""
    entries = ((256, 3, 64), (257, 3, 64), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 138))
    entries += ((277, 3, 1), (278, 3, 64), (279, 4, 64 * 64), (339, 3, 2))
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)
    content = head.ljust(138, b"\0") + (RAMP * 255 - 128).round().astype(np.int8).tobytes()
    with pytest.raises(DataError, match="'a' has pixels of mode L .signed integers."):
        decode.picture(content, "a")


def test_a_kind_of_a_known_format_that_is_not_read_is_called_that() -> None:
    """16-bit floating point, as scientific cameras write it."""
    entries = ((256, 3, 64), (257, 3, 64), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 138))
    entries += ((277, 3, 1), (278, 3, 64), (279, 4, 2 * 64 * 64), (339, 3, 3))
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)
    with pytest.raises(DataError, match="begins as TIFF, but is damaged or of a kind that is not"):
        decode.picture(head.ljust(138, b"\0") + RAMP.astype("<f2").tobytes(), "a")


def test_levels_that_leave_most_of_their_range_are_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """12 bits in files of 16, which do not say it."""
    decode._warned.clear()
    dark = Image.fromarray((RAMP * 4094).round().astype(np.uint16))
    for name in ("a", "b"):
        decode.picture(saved(dark, "PNG"), name)
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "'a' uses grey levels up to 4,094 of 65,5"
    ]
    decode.picture(saved(GREY_16, "PNG"), "c")
    assert len(caplog.records) == 1


def test_what_is_no_image_says_what_is_read() -> None:
    with pytest.raises(DataError, match=r"'a' cannot be decoded.*JPEG, PNG.*save it as") as caught:
        decode.picture(b"P7\nWIDTH 8\n", "a")
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_animations_and_pages_the_first_counts(kind: str) -> None:
    content = saved(RGB, kind, save_all=True, append_images=[RGB.rotate(90), RGB.rotate(180)])
    assert is_the_ramp(decode.picture(content, "a"), 3)


def test_the_orientation_and_transparency_are_left_as_torchvision_leaves_them(tmp_path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    clear = RGB.convert("RGBA")
    clear.putalpha(0)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(saved(RGB, "JPEG", exif=exif))
    (tmp_path / "train" / "a" / "1.png").write_bytes(saved(clear, "PNG"))
    reference = ImageFolder(str(tmp_path / "train"), transforms.PILToTensor())
    for index, name in enumerate(("0.jpg", "1.png")):
        ours = np.asarray(decode.picture((tmp_path / "train" / "a" / name).read_bytes(), name))
        assert torch.equal(torch.from_numpy(ours.copy()).permute(2, 0, 1), reference[index][0])


# -- class folders ---------------------------------------------------------------------------------
def folder(root: Any, **names: tuple[str, ...]) -> config.Data:
    """A set of class folders whose training part holds files of these names, and two classes a and
    z."""
    for part in ("train", "val"):
        for label in ("a", "z"):
            (root / part / label).mkdir(parents=True)
            (root / part / label / "0.png").write_bytes(saved(RGB, "PNG"))
    for label, files in names.items():
        (root / "train" / label).mkdir(exist_ok=True)
        for name in files:
            kind = Image.registered_extensions().get("." + name.rpartition(".")[2].lower(), "JPEG")
            (root / "train" / label / name).parent.mkdir(exist_ok=True, parents=True)
            (root / "train" / label / name).write_bytes(
                saved(GREY if kind in ("PPM",) else RGB, kind)
            )
    return config.Data(name="folder", uri=str(root), resolution=16, validation_images=1)


def test_every_suffix_is_read(tmp_path) -> None:
    names = tuple(
        f"{index}{suffix.upper() if index % 2 else suffix}"
        for index, suffix in enumerate(decode.SUFFIXES)
    )
    images = data.load(folder(tmp_path, m=names))
    assert (images.num_classes, len(images.train)) == (3, 2 + len(names) - 1)
    data.in_memory(images.train), data.in_memory(images.validation)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "train/m' is a class folder without images"),
        (("readme.txt",), "train/m' is a class folder without images"),
        (("._0.jpg", ".hidden/0.jpg"), "train/m' is a class folder without images"),
        (
            ("0.jpg", "1.tga"),
            r"train/m/1\.tga' is of an image format that is not read; convert it to one of \.jpg",
        ),
        (("0.PSD",), r"train/m/0\.PSD' is of an image format"),
        (("below/0.heic",), r"train/m/below/0\.heic' is of an image format"),
    ],
)
def test_a_class_that_would_vanish_is_named(tmp_path, files: tuple[str, ...], words: str) -> None:
    settings = folder(tmp_path)
    (tmp_path / "train" / "m").mkdir()
    for name in files:
        (tmp_path / "train" / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / "m" / name).write_bytes(saved(RGB, "PNG"))
    with pytest.raises(DataError, match=words) as caught:
        data.load(settings)
    assert "\n" not in str(caught.value)


def test_a_class_that_would_not_be_tested_is_named(tmp_path) -> None:
    settings = folder(tmp_path)
    part = next(path for path in (tmp_path / "val", tmp_path / "test") if path.exists())
    (part / "m").mkdir()
    with pytest.raises(DataError, match=f"{part.name}/m' is a class folder without images"):
        data.load(settings)


def test_an_image_of_0_bytes_is_named_before_it_is_decoded(tmp_path) -> None:
    settings = folder(tmp_path, m=("0.png", "1.png"))
    (tmp_path / "train" / "m" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/m/1\.png' is empty \(0 bytes\)"):
        data.load(settings)


def test_one_class_alone_is_refused(tmp_path) -> None:
    settings = folder(tmp_path)
    for classes in (tmp_path / part for part in ("train", "val", "test")):
        for extra in sorted(classes.iterdir())[1:] if classes.exists() else ():
            shutil.rmtree(extra)
    with pytest.raises(DataError, match="images of one class alone"):
        data.load(settings)


def test_what_macos_adds_is_no_class(tmp_path) -> None:
    settings = folder(tmp_path)
    before = data.load(settings)
    for name in (
        "__MACOSX/a/._0.png",
        "a/._0.png",
        ".ipynb_checkpoints/0.png",
        ".DS_Store",
        "a/.DS_Store",
    ):
        for part in ("train", "val"):
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).write_bytes(b"\0\5\x16\7")
    assert data.load(settings).sha256 == before.sha256


def test_names_that_are_not_utf_8(tmp_path) -> None:
    settings = folder(tmp_path)
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    (tmp_path / "train" / "a" / name).write_bytes(saved(RGB, "PNG"))
    images = data.load(settings)
    assert len(images.train) == 2
    assert len(images.sha256) == 64
    (tmp_path / "train" / "a" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"caf\xe9\.png' cannot be decoded"):
        [
            data.in_memory(part)
            for part in (data.load(settings).train, data.load(settings).validation)
        ]
