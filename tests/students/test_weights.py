"""Weights from elsewhere: wrappers, prefixes and normalisation are recognised, and what differs is
named.
"""

from __future__ import annotations

import pytest
import torch

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError, DataError
from dra_ray.storage import Store
from dra_ray.students import weights

SHAPE = Shape(10, 3, 8, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def student(name: str, seed: int, shape: Shape = SHAPE, **settings) -> students.Student:
    torch.manual_seed(seed)
    return students.build(config.Model(name=name, **settings), shape).eval()


def same(one: students.Student, other: students.Student) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in one.state_dict().items())


def prefixed(prefix: str, net: students.Student) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in net.state_dict().items()}


def test_without_weights_the_start_is_random() -> None:
    assert (
        students.initialise(student("wrn-10-1", 0), config.Model(name="wrn-10-1"))
        == "random initialisation"
    )


def test_a_file_as_dm_at_releases_them_loads(tmp_path) -> None:
    """DM-AT: DataParallel's prefix, under model_state_dict, beside other state."""
    trained, fresh = student("wrn-10-1", 0), student("wrn-10-1", 1)
    store = Store(str(tmp_path)) / "weights-best.pt"
    store.write_torch(
        {
            "model_state_dict": prefixed("module.", trained),
            "unaveraged_model_state_dict": prefixed("module.", fresh),
            "epoch": 3,
        }
    )
    told = students.initialise(fresh, config.Model(name="wrn-10-1", weights=store.uri))
    assert same(fresh, trained) and told == f"weights of '{store}'"


@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("model",), ("net",), ("ema", "module")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module.model."])
def test_wrappers_and_prefixes(tmp_path, wrapper: tuple[str, ...], prefix: str) -> None:
    trained, fresh = student("wrn-10-1", 0), student("wrn-10-1", 1)
    value: dict = prefixed(prefix, trained)
    for name in reversed(wrapper):
        value = {name: value, "step": 7}
    store = Store(str(tmp_path)) / "some.pth"
    store.write_torch(value)
    weights.load_into(fresh, weights.read_weights(store), "wrn-10-1", store.uri)
    assert same(fresh, trained)


def test_safetensors_and_old_files_without_batch_counts(tmp_path) -> None:
    trained, fresh = student("resnet-18", 0), student("resnet-18", 1)
    store = Store(str(tmp_path)) / "some.safetensors"
    store.write_tensors(
        {
            key: tensor
            for key, tensor in trained.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
    )
    students.initialise(fresh, config.Model(name="resnet-18", weights=store.uri))
    assert same(fresh, trained)


def test_a_trades_checkpoint_loads_without_the_group_that_is_never_used() -> None:
    trained, fresh = student("relu-wrn-10-1", 0), student("relu-wrn-10-1", 1)
    theirs = prefixed("module.", trained)
    theirs |= {
        key.replace("block1", "sub_block1"): tensor
        for key, tensor in theirs.items()
        if ".block1." in key
    }
    told = weights.load_into(fresh, theirs, "relu-wrn-10-1", "model_cifar_wrn.pt")
    assert same(fresh, trained)
    assert "without 12 keys that the network never uses (module.sub_block1.layer.0." in told
    with pytest.raises(
        CheckpointError, match="unexpected: 58 "
    ):  # another network's are not left out in silence
        weights.load_into(student("wrn-10-1", 0), theirs, "wrn-10-1", "model_cifar_wrn.pt")


@pytest.mark.parametrize(
    "names", [("normalize.mean", "normalize.std"), ("module.mu", "module.sigma")]
)
def test_normalisation_among_the_weights_must_be_the_models(names: tuple[str, str]) -> None:
    trained, fresh = student("wrn-10-1", 0), student("wrn-10-1", 1)
    theirs = prefixed("module.", trained)
    theirs |= {
        names[0]: torch.tensor(SHAPE.mean).view(1, 3, 1, 1),
        names[1]: torch.tensor(SHAPE.std).view(3, 1, 1),
    }
    weights.load_into(fresh, theirs, "wrn-10-1", "there.pt")
    assert same(fresh, trained)
    raw = student("wrn-10-1", 2, normalise=False)
    with pytest.raises(
        CheckpointError,
        match=r"another normalisation.*model.mean=\[0.4914, 0.4822, 0.4465\] and "
        r"model.std=\[0.2471",
    ):
        weights.load_into(raw, theirs, "wrn-10-1", "there.pt")
    assert not same(raw, trained)


def test_what_differs_is_named_and_nothing_is_loaded() -> None:
    fresh = student("wrn-10-1", 1)
    theirs = student("wrn-10-1", 0).state_dict()
    theirs["logits.weight"] = torch.zeros(100, 64)
    theirs["extra"] = theirs.pop("init_conv.weight")
    with pytest.raises(CheckpointError) as caught:
        weights.load_into(fresh, theirs, "wrn-10-1", "there.pt")
    assert str(caught.value) == (
        "'there.pt' does not fit model.name='wrn-10-1': keys missing: 1 (init_conv.weight), "
        "unexpected: 1 (extra), "
        "of another shape: 1 (logits.weight [100, 64] for [10, 64]); set model.name to what these "
        "weights are of"
    )
    assert same(fresh, student("wrn-10-1", 1))


def test_a_timm_backbone_may_come_without_its_classifier_or_with_another(tmp_path) -> None:
    name, shape = "timm/convnext_atto", Shape(10, 3, 32, (0.5,) * 3, (0.25,) * 3)
    trained = student(name, 0, shape)
    theirs = {key.removeprefix("net."): tensor for key, tensor in trained.state_dict().items()}
    headless = {key: tensor for key, tensor in theirs.items() if not key.startswith("head.fc.")}
    for number, file in enumerate(
        (
            headless,
            headless
            | {"head.fc.weight": torch.zeros(1000, 320), "head.fc.bias": torch.zeros(1000)},
        )
    ):
        store = Store(str(tmp_path)) / f"{number}.safetensors"
        store.write_tensors(file)
        fresh = student(name, 1, shape)
        told = students.initialise(fresh, config.Model(name=name, weights=store.uri))
        assert (
            told == f"weights of '{store}', but a newly initialised classifier (net.head.fc.bias, "
            "net.head.fc.weight)"
        )
        fresh.net.head.fc.load_state_dict(trained.net.head.fc.state_dict())
        assert same(fresh, trained)
    with pytest.raises(
        CheckpointError, match=r"missing: 2 \(net.head.fc.weight, net.head.fc.bias\)"
    ):  # to be judged, a model must be whole
        weights.load_into(student(name, 1, shape), headless, name, "there.pt")
    store.write_tensors({key: tensor for key, tensor in headless.items() if key != "stem.0.weight"})
    with pytest.raises(CheckpointError, match=r"keys missing: 1 \(net.stem.0.weight\);"):
        students.initialise(student(name, 1, shape), config.Model(name=name, weights=store.uri))


def test_a_file_without_weights_says_so(tmp_path) -> None:
    store = Store(str(tmp_path)) / "empty.pt"
    store.write_torch({"epoch": 3})
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        weights.read_weights(store)
    with pytest.raises(CheckpointError, match=r"give a .safetensors, .pt or .pth file"):
        weights.read_weights(Store(str(tmp_path)) / "weights.npz")
    store.write_bytes(b"not a file of torch's")
    with pytest.raises(DataError, match="not a weights-only torch file"):
        weights.read_weights(store)
