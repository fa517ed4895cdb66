"""Atomic, weights-only, and the same on a local path, a memory file system and S3."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dra_ray import storage
from dra_ray.errors import ConfigError, DataError, StorageError
from dra_ray.storage import Store


@pytest.fixture(params=["local", "file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path, s3_bucket) -> Store:
    return Store(
        {"local": str(tmp_path / "a"), "file": f"file://{tmp_path}/b", "memory": f"memory://{tmp_path.name}", "s3": f"{s3_bucket}/c"}[request.param]
    )


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """A bucket of a real S3 server on the loopback interface; the environment says where, as a user's would."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    server.stop()


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
    assert store.names() == ["x.json", "x.jsonl", "x.npz", "x.pt", "x.safetensors"]  # the probe left nothing behind
    assert (store / "x.json").exists() and not (store / "y.json").exists()
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
    for name, read in (("a.npz", Store.read_npz), ("a.safetensors", Store.read_tensors), ("a.pt", Store.read_torch), ("a.json", Store.read_json)):
        (store / name).write_bytes(b"half a fi")
        with pytest.raises(DataError, match=name):
            read(store / name)


@pytest.mark.parametrize("uri", ["/proc/nothing/here", "nosuch://bucket/x"])
def test_storage_that_cannot_be_written_is_one_line(uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        Store(uri).probe()
    assert uri in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_run_is_resumed_by_its_own_config_only(tmp_path) -> None:
    run = Store(str(tmp_path / "run"))
    config = {"optim": {"lr": 0.1}, "pool": {"kind": "pool"}}
    assert storage.begin_run(run, "train", config, "d1")["status"] == "running"
    storage.update_manifest(run, status="done")
    assert storage.begin_run(run, "train", config, "d1")["status"] == "done"
    with pytest.raises(ConfigError, match=r"another config \(optim.lr is 0.1 there and 0.2 now\); choose another --name"):
        storage.begin_run(run, "train", {"optim": {"lr": 0.2}, "pool": {"kind": "local"}}, "d2")
    with pytest.raises(ConfigError, match="kind 'train'"):
        storage.begin_run(run, "sweep", config, "d1")
