"""A bundle: complete, reproducible, refused when a byte of it was changed; and its model card."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import pytest
import torch

from dra_ray import data
from dra_ray.errors import DataError
from dra_ray.report import bundle
from dra_ray.storage import Store, sha256
from dra_ray.students import checkpoint


def members(file: Store) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(file.read_bytes())) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def rewritten(file: Store, change: Callable[[dict[str, bytes]], None]) -> Store:
    """The same tar after a change to its files."""
    files = members(file)
    change(files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    file.write_bytes(buffer.getvalue())
    return file


@pytest.fixture
def packed(attacked: Store) -> Store:
    bundle.pack(attacked, attacked / "run.tar")
    return attacked / "run.tar"


def test_a_bundle_holds_what_an_evaluation_needs(attacked: Store, packed: Store) -> None:
    files = members(packed)
    assert next(iter(files)) == bundle.INDEX
    assert {
        "manifest.json",
        "model.safetensors",
        "config.yaml",
        "environment.txt",
        "MODEL_CARD.md",
        "report.html",
        "evaluation/autoattack.json",
        "evaluation/per_sample.npz",
    } <= files.keys()
    assert b"torch==" in files["environment.txt"]
    checked = bundle.check(packed)
    assert checked.files == {n: sha256(c) for n, c in files.items() if n != bundle.INDEX}


@torch.no_grad()
def test_an_unpacked_bundle_gives_the_same_logits_and_verdicts(
    attacked: Store, packed: Store
) -> None:
    folder = attacked / "elsewhere"
    bundle.check(packed, folder)
    (one, settings), (two, _) = checkpoint.load(attacked), checkpoint.load(folder)
    images = data.to_float(data.in_memory(data.load(settings.data).test).images[:8])
    assert torch.equal(one(images), two(images))
    verdicts = "evaluation/per_sample.npz"
    assert (folder / verdicts).read_bytes() == (attacked / verdicts).read_bytes()
    with pytest.raises(DataError, match="is not empty"):
        bundle.check(packed, folder)


def test_equal_runs_give_equal_bundles(attacked: Store, packed: Store) -> None:
    first = packed.read_bytes()
    bundle.pack(attacked, packed)
    assert packed.read_bytes() == first


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["model.safetensors", "evaluation/per_sample.npz", "report.html"])
def test_a_changed_file_is_named(packed: Store, name: str) -> None:
    def flip(files: dict[str, bytes]) -> None:
        content = bytearray(files[name])
        content[len(content) // 2] ^= 1
        files[name] = bytes(content)

    with pytest.raises(DataError, match=f"'{name}' was changed: its SHA-256 is"):
        bundle.check(rewritten(packed, flip), packed.resolved() / "nowhere")


def test_missing_added_and_foreign_files_are_refused(packed: Store, attacked: Store) -> None:
    whole = packed.read_bytes()
    changes: list[tuple[str, Callable[[dict[str, bytes]], None]]] = [
        ("lacks 'model.safetensors'", lambda files: files.pop("model.safetensors") and None),
        ("holds 'more.txt'", lambda files: files.update({"more.txt": b"x"})),
        ("'../evil', which no bundle does", lambda files: files.update({"../evil": b"x"})),
        ("'/evil', which no bundle does", lambda files: files.update({"/evil": b"x"})),
        ("has no index.json", lambda files: files.pop(bundle.INDEX) and None),
        ("index.json is damaged", lambda files: files.update({bundle.INDEX: b"[]"})),
        (
            "format 9",
            lambda files: files.update({bundle.INDEX: b'{"files": {}, "run": "", "format": 9}'}),
        ),
    ]
    for message, change in changes:
        packed.write_bytes(whole)
        with pytest.raises(DataError, match=message):
            bundle.check(rewritten(packed, change))
    packed.write_bytes(b"no tar")
    with pytest.raises(DataError, match="not a whole tar"):
        bundle.check(packed)


def test_an_unfinished_run_makes_no_bundle(make_train: Callable[..., Store]) -> None:
    run = make_train(status="running")
    with pytest.raises(DataError, match="a bundle is final"):
        bundle.pack(run, run / "run.tar")


def test_the_card_says_what_was_measured(packed: Store, attacked: Store) -> None:
    card = members(packed)["MODEL_CARD.md"].decode()
    result = (attacked / "evaluation" / "autoattack.json").read_json()
    assert f"| {100 * result['autoattack_accuracy']:.1f} |" in card
    assert "| model.name | wrn-10-1 |" in card
    assert "## Limits" in card


def test_a_sweep_takes_its_finalists_along(quickstart: Store) -> None:
    sweep = quickstart / "sweep"
    checked = bundle.check(_packed(sweep))
    finals = (sweep / "manifest.json").read_json()["finals"]
    assert {f"trials/{trial}/evaluation/autoattack.json" for trial in finals.values()} <= set(
        checked.files
    )
    assert "rungs.jsonl" in checked.files


def _packed(run: Store) -> Store:
    bundle.pack(run, run / "run.tar")
    return run / "run.tar"
