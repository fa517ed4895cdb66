"""Atomic, weights-only, and the same on a local path, a memory file system and S3."""

from __future__ import annotations

import fractions
import io
import json
import math
import os
import pickle
import subprocess
import tarfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dra_ray import runs, storage
from dra_ray.errors import ConfigError, DataError, StorageError
from dra_ray.storage import Store, unpickle


@pytest.fixture(params=["local", "file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path, s3_bucket) -> Store:
    return Store(
        {
            "local": str(tmp_path / "a"),
            "file": f"file://{tmp_path}/b",
            "memory": f"memory://{tmp_path.name}",
            "s3": f"{s3_bucket}/c",
        }[request.param]
    )


def test_what_is_written_is_read(store: Store) -> None:
    store.probe()
    (store / "x.json").write_json({"a": [1, 2.5, None]})
    (store / "x.jsonl").write_jsonl([{"a": 1}, {"a": 2}])
    (store / "x.npz").write_npz(image=np.arange(6, dtype=np.uint8))
    (store / "x.safetensors").write_tensors({"w": torch.arange(4.0)})
    (store / "x.pt").write_torch({"w": torch.ones(2), "n": [1, "a"]})
    assert (store / "x.json").read_json() == {"a": [1, 2.5, None]}
    assert (store / "x.jsonl").read_jsonl() == [{"a": 1}, {"a": 2}]
    assert (store / "x.npz").read_npz()["image"].tolist() == list(range(6))
    assert (store / "x.safetensors").read_tensors()["w"].tolist() == [0, 1, 2, 3]
    assert (store / "x.pt").read_torch()["n"] == [1, "a"]
    assert store.names() == [
        "x.json",
        "x.jsonl",
        "x.npz",
        "x.pt",
        "x.safetensors",
    ]  # the probe left nothing behind
    assert (store / "x.json").exists()
    assert not (store / "y.json").exists()
    with pytest.raises(StorageError, match="does not exist"):
        (store / "y.json").read_bytes()


class Hostile:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def test_nothing_from_outside_is_unpickled(tmp_path) -> None:
    canary, store = tmp_path / "canary", Store(str(tmp_path))
    (store / "a.pt").write_bytes(pickle.dumps(Hostile(str(canary))))
    torch.save({"w": Hostile(str(canary))}, buffer := io.BytesIO())
    (store / "b.pt").write_bytes(buffer.getvalue())
    np.savez(buffer := io.BytesIO(), image=np.array([Hostile(str(canary))], dtype=object))
    (store / "c.npz").write_bytes(buffer.getvalue())
    for name in ("a.pt", "b.pt"):
        with pytest.raises(DataError, match=name):
            (store / name).read_torch()
    with pytest.raises(DataError, match="c.npz"):
        (store / "c.npz").read_npz()
    assert not canary.exists()


def test_damaged_files_are_named(tmp_path) -> None:
    store = Store(str(tmp_path))
    for name, read in (
        ("a.npz", Store.read_npz),
        ("a.safetensors", Store.read_tensors),
        ("a.pt", Store.read_torch),
        ("a.json", Store.read_json),
    ):
        (store / name).write_bytes(b"half a fi")
        with pytest.raises(DataError, match=name):
            read(store / name)


@pytest.mark.parametrize("uri", ["/proc/nothing/here", "nosuch://bucket/x"])
def test_storage_that_cannot_be_written_is_one_line(uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        Store(uri).probe()
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/runs?versionId=secret", "what follows '\\?'"),
        ("gs://bucket/runs?generation=1", "what follows '\\?'"),
        ("s3://bucket//runs", "between two slashes"),
        ("s3://bucket/runs//a", "between two slashes"),
        ("s3:///runs", "names no bucket"),
        ("s3://", "names no bucket|write s3://"),
        ("s3:/bucket/runs", "write s3://"),
        ("file:/tmp/x", "write file://"),
    ],
)
def test_uris_that_would_name_something_else_are_refused(uri: str, words: str) -> None:
    for use in (
        Store.probe,
        Store.names,
        Store.exists,
        Store.files,
        Store.read_bytes,
        lambda store: (store / "a.json").write_json({}),
    ):
        if use is Store.files and ":///" not in uri and "://" not in uri:
            continue  # a local listing, of a folder that is not there
        with pytest.raises(StorageError, match=words) as caught:
            use(Store(uri))
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["a//b", "a?b", "a b#c", "memory://x?y", "x:y"])
def test_other_paths_may_hold_what_they_like(tmp_path, monkeypatch, uri: str) -> None:
    monkeypatch.chdir(tmp_path)
    (Store(uri) / "x").write_bytes(b"1")
    assert (Store(uri) / "x").read_bytes() == b"1"
    assert Store(uri).names() == ["x"]


def test_a_run_is_resumed_by_its_own_config_only(tmp_path) -> None:
    run = Store(str(tmp_path / "run"))
    config = {"optim": {"lr": 0.1}, "pool": {"kind": "pool"}}
    assert runs.begin_run(run, "train", config, "d1").status == "running"
    runs.update_manifest(run, runs.Facts(status="done"))
    assert runs.begin_run(run, "train", config, "d1").is_done
    with pytest.raises(
        ConfigError,
        match=r"another config \(optim.lr is 0.1 there and 0.2 now\); choose another --name",
    ):
        runs.begin_run(run, "train", {"optim": {"lr": 0.2}, "pool": {"kind": "local"}}, "d2")
    with pytest.raises(ConfigError, match="kind 'train'"):
        runs.begin_run(run, "sweep", config, "d1")


# -- files and arrays that stay where they are -----------------------------------------------------
@pytest.mark.seconds
def test_files_and_parts_of_files(store: Store) -> None:
    store = store / "below"
    assert store.files() == {}
    for name, content in (("b/x", b"12345"), ("a", b"1"), ("b/c/y", b"")):
        (store / name).write_bytes(content)
    assert store.files() == {"a": 1, "b/c/y": 0, "b/x": 5}
    assert list(store.files()) == [
        "a",
        "b/c/y",
        "b/x",
    ]
    assert (store / "b").files() == {"c/y": 0, "x": 5}
    assert (store / "b/x").size() == 5
    assert (store / "b/x").read_bytes(1, 3) == b"234"
    assert (store / "b/x").read_bytes(4, 3) == b"5"
    with pytest.raises(StorageError, match="does not exist"):
        (store / "none").size()


@pytest.mark.seconds
def test_a_copy_is_made_once_and_again_when_the_file_changed(
    store: Store, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    file = store / "x.npz"
    file.write_bytes(b"one")
    copy = file.local_copy()
    assert copy.is_local
    assert copy.read_bytes() == b"one"
    assert copy.name.endswith("x.npz")
    assert store.is_local == (copy == file.resolved())
    if store.is_local:
        assert not (tmp_path / "cache").exists()
        return
    (tmp_path / "cache" / copy.name).write_bytes(b"was not copied again")
    assert file.local_copy().read_bytes() == b"was not copied again"
    time.sleep(1.1)  # some stores keep the time of a change to the second
    file.write_bytes(b"another")
    assert file.local_copy().read_bytes() == b"another"
    assert not [
        name for name in Store(str(tmp_path / "cache")).names() if name.endswith(".partial")
    ]
    with pytest.raises(StorageError, match="does not exist"):
        (store / "none").local_copy()


def test_a_cache_that_cannot_be_used_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set DRA_CACHE"):
        storage.cache()


def test_arrays_of_an_npz_are_mapped(tmp_path) -> None:
    arrays = {
        "image": np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4),
        "label": np.arange(3),
        "empty": np.zeros((0, 2), np.float32),
    }
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    found = Store(str(tmp_path / "a.npz")).npz_arrays()
    assert found is not None
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert np.dtype(found[name].dtype) == array.dtype
        assert np.array_equal(found[name].read(), array)
        assert np.array_equal(found[name].map(), array)
    with pytest.raises(ValueError, match="read-only"):
        found["image"].map()[0] = 1
    os.truncate(tmp_path / "a.npz", 200)
    for read in (found["image"].map, found["image"].read):
        with pytest.raises(DataError, match=r"a\.npz' is gone or shorter"):
            read()


def test_arrays_that_cannot_be_mapped(tmp_path) -> None:
    file, canary = Store(str(tmp_path / "a.npz")), tmp_path / "canary"
    np.savez_compressed(tmp_path / "a.npz", image=np.zeros(1000))
    assert file.npz_arrays() is None
    for array in (
        np.array([Hostile(str(canary))], dtype=object),
        np.asfortranarray(np.zeros((3, 4))),
    ):
        np.savez(tmp_path / "a.npz", image=array)
        with pytest.raises(DataError, match=r"a\.npz.*(objects|Fortran order)"):
            file.npz_arrays()
    with pytest.raises(StorageError, match="does not exist"):
        (Store(str(tmp_path)) / "none").npz_arrays()
    assert not canary.exists()


def test_members_of_a_tar(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    long = "folder/" + "n" * 150 + ".jpg"  # longer than a plain header's field
    contents = {long: bytes(range(256)) * 5, "b.cls": b"7", "c.cls": b"8"}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    file = Store(str(tmp_path / "a.tar"))
    for _ in range(2):  # from the file, then from what was kept of it
        found = file.tar_members(".cls")
        assert [(member.name, member.text) for member in found] == [
            (long, None),
            ("b.cls", "7"),
            ("c.cls", "8"),
        ]
        assert [file.read_bytes(member.offset, member.size) for member in found] == list(
            contents.values()
        )
    os.truncate(tmp_path / "a.tar", found[1].offset - 600)
    with pytest.raises(DataError, match=r"a\.tar"):
        file.tar_members(".cls")


def test_names_and_texts_of_a_tar_in_other_encodings(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DRA_CACHE", str(tmp_path / "cache"))
    contents = {
        "caf\xe9.cls": b"\xef\xbb\xbf7\r\n",
        "b.cls": "8".encode("utf-16"),
        "c.cls": b"\xff9",
        "._b.cls": b"\0\5\x16\7",
        "__MACOSX/b.cls": b"\0\5\x16\7",
        "x/.DS_Store": b"",
        "./d.cls": b"10",
    }
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin1"
    ) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for _ in range(2):
        members = Store(str(tmp_path / "a.tar")).tar_members(".cls")
        assert [(member.name, (member.text or "").strip()) for member in members] == [
            ("caf\xe9.cls", "7"),
            ("b.cls", "8"),
            ("c.cls", "\ufffd9"),
            ("./d.cls", "10"),
        ]


def test_an_npy_is_read(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4))
    assert Store(str(tmp_path / "a.npy")).read_npy().tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "a.npy", np.array([Hostile(str(tmp_path / "canary"))], dtype=object))
    with pytest.raises(DataError, match=r"a\.npy"):
        Store(str(tmp_path / "a.npy")).read_npy()
    assert not (tmp_path / "canary").exists()


def test_a_pickle_gets_stand_ins_and_nothing_else(tmp_path) -> None:
    file, canary = Store(str(tmp_path / "a.pkl")), tmp_path / "canary"
    plain = {"a": [1, 2.5, None, True], "b": ("x", {"y"}), 3: 2**80}

    def read(stand_ins: dict[str, Callable[..., Any]]) -> Any:
        return unpickle(file.read_bytes(), file.uri, stand_ins)

    for protocol in range(2, 6):
        file.write_bytes(pickle.dumps(plain, protocol=protocol))
        assert read({"__builtin__.set": set, "builtins.set": set}) == plain
    file.write_bytes(pickle.dumps({"when": fractions.Fraction(1, 3)}))
    assert read({"fractions.Fraction": lambda *parts: ["kept", *parts]}) == {"when": ["kept", 1, 3]}
    for hostile in (
        Hostile(str(canary)),
        [Hostile(str(canary))],
        fractions.Fraction(1, 3),
        os.system,
    ):
        file.write_bytes(pickle.dumps(hostile))
        with pytest.raises(
            DataError, match=r"a\.pkl.*it asks for (posix.system|fractions.Fraction)"
        ):
            read({"fractions.Decimal": str, "system": os.system})
    assert not canary.exists()


@pytest.mark.parametrize(
    ("value", "text", "back"),
    [
        (math.nan, "null", None),
        (math.inf, "1e999", math.inf),
        (-math.inf, "-1e999", -math.inf),
        (
            {"a": [1, (math.nan, {"b": -math.inf})]},
            '{"a": [1, [null, {"b": -1e999}]]}',
            {"a": [1, [None, {"b": -math.inf}]]},
        ),
        (
            {"Infinity": "NaN", "x": np.float64("nan")},
            '{"Infinity": "NaN", "x": null}',
            {"Infinity": "NaN", "x": None},
        ),
        ([1.5, "1e999", True, None], '[1.5, "1e999", true, null]', [1.5, "1e999", True, None]),
    ],
)
def test_json_holds_no_constants_that_json_lacks(tmp_path, value, text, back) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    file = Store(str(tmp_path)) / "a.json"
    file.write_json(value)
    assert file.read_json() == back
    assert json.loads(file.read_text(), parse_constant=refuse) == back
    file.write_jsonl([{"row": value}])
    assert file.read_text() == f'{{"row": {text}}}\n'
    assert file.read_jsonl() == [{"row": back}]


def test_files_of_earlier_versions_may_hold_pythons_constants(tmp_path) -> None:
    file = Store(str(tmp_path)) / "a.json"
    file.write_text('{"a": NaN, "b": [Infinity, -Infinity]}\n')
    assert file.read_json() == {"a": None, "b": [math.inf, -math.inf]}
    assert file.read_jsonl() == [{"a": None, "b": [math.inf, -math.inf]}]


def test_a_manifest_names_the_commit_of_a_checkout(tmp_path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    package, environment = tmp_path / "package", tmp_path / "env"
    for folder in (package, environment):
        folder.mkdir()
        (folder / "a.py").write_text("1")
    assert runs.commit(str(package)) == {}  # no checkout
    git("init", "-q")
    (tmp_path / ".gitignore").write_text("env\n")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert runs.commit(str(package)) == {"commit": head}
    (package / "a.py").write_text("2")
    assert runs.commit(str(package)) == {"commit": f"{head}-dirty"}
    assert runs.commit(str(environment)) == {}, "an environment inside another project"
    run = Store(str(tmp_path / "run"))
    manifest = runs.begin_run(run, "train", {}, "d")
    assert manifest.versions == runs.versions() | runs.commit()


def test_what_is_no_file_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    for name in ("pipe.npz", "zero.npz"):
        store = Store(str(tmp_path)) / name
        reads = (store.read_bytes, store.read_npz, store.npz_arrays, store.read_torch)
        for read in (
            *reads,
            lambda s=store: s.tar_members("x"),
            lambda s=store: s.read_bytes(0, 9),
        ):
            with pytest.raises(StorageError, match=f"{name}' is a pipe, a socket or a device"):
                read()
