"""Weights from elsewhere: wrappers, prefixes and normalisation are recognised, and what differs is
named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError, ConfigError, DataError, DraError
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
    assert same(fresh, trained)
    assert told == f"averaged weights (model_state_dict) of '{store}'"


@pytest.mark.seconds
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


PARTS = "weight", "bias"


def raw_and_average() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return student("resnet-18", 0).state_dict(), student("resnet-18", 1).state_dict()


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def files_with_averages() -> dict[str, object]:
    """As the field's trainers write them: raw weights and averaged ones in one file."""
    raw, average = raw_and_average()
    parameters = {key: tensor for key, tensor in average.items() if key.endswith(PARTS)}
    flat = {key.replace(".", ""): tensor for key, tensor in parameters.items()}
    underscored = {key.replace(".", "_"): tensor for key, tensor in average.items()}
    one = torch.tensor(1)
    return {
        "timm": {"state_dict": raw, "state_dict_ema": average, "epoch": 3},
        "timm args": {
            "state_dict": raw,
            "model_ema": average,
            "args": argparse.Namespace(lr=0.1),
            "metric": np.float64(1),
        },
        "dit": {"model": raw, "ema": average, "opt": {}},
        "deit": {"model": under("module.", raw), "model_ema": {"module": average, "decay": 0.9}},
        "ema-pytorch": {
            "model": raw,
            "ema": under("ema_model.", average)
            | under("online_model.", raw)
            | {"initted": one, "step": one},
        },
        "ema-pytorch alone": under("ema_model.", average)
        | under("online_model.", raw)
        | {"initted": one, "step": one},
        "lightning": {
            "state_dict": under("model.", raw) | under("ema_model.", average),
            "callbacks": {},
        },
        "lightning compiled": {
            "state_dict": under("net._orig_mod.", raw) | under("model_ema.module.", average)
        },
        "lit-ema": {
            "state_dict": under("model.", raw)
            | under("model_ema.", flat | {"decay": one, "num_updates": one})
        },
        "callback": {
            "state_dict": under("model.", raw),
            "callbacks": {"EMA": {"ema_state_dict": under("model.", average)}},
        },
        "swa callback": {
            "state_dict": raw,
            "callbacks": {"SWA": {"average_model_state": average, "n_averaged": one}},
        },
        "weight averaging": {
            "state_dict": under("model.", average),
            "current_model_state": under("model.", raw),
        },
        "swa": {
            "state_dict": raw,
            "swa_state_dict": under("module.", average) | {"n_averaged": one},
        },
        "averaged model": under("module.", average) | {"n_averaged": one},
        "shadow": {"model": raw, "ema": {"decay": 0.9, "shadow": under("module.", parameters)}},
        "ema state": {"model": raw, "ema_state": {"shadow": average, "decay": 0.9}},
        "capitals": {"model": raw, "model_EMA": average},
        "of a rate": {"model": raw, "ema_0.9999": average},
        "of two rates": {"model": raw, "ema_0.999": raw, "ema_0.9999": average},
        "of rates": {"model": raw, "ema": {"ema_9999": average, "ema_999": raw, "ema_99": raw}},
        "generator": {"g": raw, "g_ema": average},
        "underscored": {"model": under("module.", raw), "shadow": underscored},
        "underscored alone": {"ema": underscored},
        "swag": {"state_dict": raw, "swag_model": average},
        "torch_ema": {"model": raw, "ema": {"shadow_params": list(parameters.values())}},
        "nemo": {"state_dict": raw, "optimizer_states": [{"ema": tuple(parameters.values())}]},
        "ours": {"student": raw, "average": average, "sums": torch.zeros(4)},
        "nothing averaged yet": {"state_dict": average, "state_dict_ema": None, "model_ema": {}},
    }


def test_a_choice_among_averages_is_said(tmp_path) -> None:
    raw, average = raw_and_average()
    store = Store(str(tmp_path)) / "some.pt"
    settings = config.Model(name="resnet-18", weights=store.uri)
    for first, second, words in (
        ("ema_0.999", "ema_0.9999", "ema_0.9999, the slowest of ema_0.999, ema_0.9999"),
        ("ema", "swa_model", "ema, the first of ema, swa_model"),
    ):
        store.write_torch({"model": raw, first: raw, second: average})
        assert f"({words})" in students.initialise(student("resnet-18", 2), settings)


@pytest.mark.seconds
@pytest.mark.parametrize("kind", files_with_averages())
def test_of_raw_and_averaged_weights_the_averaged_are_taken(tmp_path, kind: str) -> None:
    fresh, (_, average) = student("resnet-18", 2), raw_and_average()
    store = Store(str(tmp_path)) / "some.ckpt"
    store.write_torch(files_with_averages()[kind])
    origin = students.initialise(fresh, config.Model(name="resnet-18", weights=store.uri))
    for key, tensor in fresh.state_dict().items():
        if key.endswith(PARTS):
            assert torch.equal(tensor, average[key]), key
    assert origin.startswith("averaged weights (") == (kind != "nothing averaged yet")


@pytest.mark.parametrize(
    ("first", "second"), [("student", "teacher"), ("model", "best_model"), ("net", "0.999")]
)
def test_of_two_networks_without_a_word_for_the_average_none_is_taken(
    tmp_path, first: str, second: str
) -> None:
    raw, other = raw_and_average()
    store = Store(str(tmp_path)) / "some.pth"
    moments = {"optimizer": {"exp_avg": raw}, "epoch": 3}
    store.write_torch({first: raw, second: under("module.", other), **moments})
    with pytest.raises(CheckpointError, match=f"2 networks of the same shape .{first}, {second}"):
        weights.read_weights(store)
    store.write_torch({first: raw, **moments})
    assert weights.read_weights(store).tensors.keys() == raw.keys()


def in_circles() -> dict[str, object]:
    """Each of these would be read in more than 2^40 steps if it were read name by name."""
    names = (*weights.AVERAGED, *weights.WRAPPERS)
    circle: dict[str, object] = {}
    circle.update(dict.fromkeys(names, circle))
    nested: dict[str, object] = {"a": torch.zeros(0)}
    module: dict[str, object] = {}
    for _ in range(weights.MODULES_DEEP):
        module = {"_modules": {"a": module, "b": module}}
    for _ in range(weights.DEEP):
        nested = dict.fromkeys(names, nested)
    lists: object = [torch.zeros(1)]
    for _ in range(weights.DEEP):
        lists = [lists] * 50
    return {"circle": circle, "nested": nested, "modules": module, "lists": {"model": lists}}


@pytest.mark.parametrize("kind", in_circles())
def test_files_that_hold_one_thing_under_many_names_are_read_once(tmp_path, kind: str) -> None:
    store = Store(str(tmp_path)) / "some.pth"
    store.write_torch(in_circles()[kind])
    began_s = time.monotonic()
    with contextlib.suppress(CheckpointError):
        weights.read_weights(store)
    assert time.monotonic() - began_s < 3


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.module.", "net.backbone.", "classifier_of_mine.", "model.model.model."],
)
@pytest.mark.parametrize(
    "foreign", ["criterion.weight", "train_acc.total", "n_averaged", "module.step"]
)
def test_a_foreign_key_does_not_hide_the_prefix(prefix: str, foreign: str) -> None:
    trained, fresh = student("wrn-10-1", 0), student("wrn-10-1", 1)
    origin = weights.load_into(
        fresh, prefixed(prefix, trained) | {foreign: torch.tensor(3)}, "wrn-10-1", "there.pt"
    )
    assert same(fresh, trained)
    assert foreign in origin


def test_two_networks_that_fit_alike_are_not_chosen_between() -> None:
    both = prefixed("left.", student("wrn-10-1", 0)) | prefixed("right.", student("wrn-10-1", 1))
    with pytest.raises(
        CheckpointError,
        match="'there.pt': two networks fit, under the prefixes 'left.' and 'right.'",
    ):
        weights.load_into(student("wrn-10-1", 2), both, "wrn-10-1", "there.pt")


class Settings(dict):
    """A dict with attributes, as yacs, addict and OmegaConf have it."""


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_are_read_inertly(tmp_path, zipped: bool) -> None:
    trained, fresh = student("wrn-10-1", 0), student("wrn-10-1", 1)
    settings = Settings(lr=0.1)
    settings.extra = [np.float32(1), np.arange(3)]
    beside = {
        "args": argparse.Namespace(a=1),
        "best": np.float64(0.5),
        "cfg": settings,
        "path": Path("a"),
        "net_class": Settings,
    }
    torch.save(
        {"state_dict": trained.state_dict(), **beside},
        buffer := io.BytesIO(),
        _use_new_zipfile_serialization=zipped,
    )
    store = Store(str(tmp_path)) / "some.pt"
    store.write_bytes(buffer.getvalue())
    weights.load_into(fresh, weights.read_weights(store), "wrn-10-1", store.uri)
    assert same(fresh, trained)


def test_a_whole_network_gives_its_tensors(tmp_path) -> None:
    trained, fresh = student("wrn-10-1", 0), student("wrn-10-1", 1)
    store = Store(str(tmp_path)) / "some.pt"
    store.write_torch({"model": trained, "epoch": 3})
    weights.load_into(fresh, weights.read_weights(store), "wrn-10-1", store.uri)
    assert all(
        torch.equal(p, q) for p, q in zip(fresh.parameters(), trained.parameters(), strict=True)
    )


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"text")
    return buffer.getvalue()


def saved(value: object, zipped: bool = True) -> bytes:
    torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b'<?xml version="1.0"?><Error/>', "an XML document"),
        (b'{"error": "not found"}', "JSON text"),
        (b"\x1f\x8b\x08 and so on", "compressed with gzip"),
        (zip_of("notes/readme.md"), "a zip archive of other files"),
        (saved({"a": torch.ones(100)})[:600], "cut short"),
        (saved({"a": torch.ones(100)}, zipped=False)[:300], "cut short"),
        (b"not a file of torch's", "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_is_no_checkpoint_is_called_what_it_is(
    tmp_path, content: bytes, words: str, name: str
) -> None:
    store = Store(str(tmp_path)) / name
    store.write_bytes(content)
    with pytest.raises(DataError) as caught:
        weights.read_weights(store)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert name == "x.safetensors" or words in str(caught.value)


@pytest.mark.seconds
def test_facebooks_names_and_other_position_embeddings_load_as_timm_converts_them(tmp_path) -> None:
    shape = Shape(10, 3, 64, (0.5,) * 3, (0.25,) * 3)
    trained, fresh = (student("timm/convnext_atto", seed, shape) for seed in (0, 1))
    theirs = {}
    for key, tensor in trained.net.state_dict().items():
        name = (
            key.replace("head.norm.", "norm.")
            .replace("head.fc.", "head.")
            .replace("stem.", "downsample_layers.0.")
        )
        name = (
            name.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        )
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        theirs[name] = tensor.flatten(1) if "pwconv" in name and name.endswith("weight") else tensor
    store = Store(str(tmp_path)) / "facebook.pth"
    store.write_torch({"model": theirs})
    origin = students.initialise(fresh, config.Model(name="timm/convnext_atto", weights=store.uri))
    assert same(fresh, trained)
    assert "as timm does" in origin
    larger = Shape(10, 3, 96, (0.5,) * 3, (0.25,) * 3)
    small, large = (
        student("timm/vit_tiny_patch16_224", 0, shape),
        student("timm/vit_tiny_patch16_224", 1, larger),
    )
    store.write_torch(small.net.state_dict())
    origin = students.initialise(
        large, config.Model(name="timm/vit_tiny_patch16_224", weights=store.uri)
    )
    assert large.net.pos_embed.shape[1] == 37
    assert "as timm does" in origin
    torch.testing.assert_close(large.net.pos_embed[:, 0], small.net.pos_embed[:, 0])
    assert torch.equal(large.net.blocks[3].mlp.fc1.weight, small.net.blocks[3].mlp.fc1.weight)


@pytest.mark.seconds
def test_facebooks_dinov3_loads(tmp_path) -> None:
    shape = Shape(10, 3, 64, (0.5,) * 3, (0.25,) * 3)
    name = "timm/vit_small_patch16_dinov3"
    trained, fresh = student(name, 0, shape), student(name, 1, shape)
    theirs = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for key, tensor in trained.net.state_dict().items():
        if not key.startswith("head."):
            name_there = (
                key.replace("reg_token", "storage_tokens")
                .replace("gamma_1", "ls1.gamma")
                .replace("gamma_2", "ls2.gamma")
            )
            theirs[name_there] = tensor
    theirs |= {
        f"blocks.{n}.attn.qkv.{part}": torch.zeros(1152)
        for n in range(12)
        for part in ("bias", "bias_mask")
    }
    store = Store(str(tmp_path)) / "dinov3.pth"
    store.write_torch(theirs)
    origin = students.initialise(fresh, config.Model(name=name, weights=store.uri))
    fresh.net.head.load_state_dict(trained.net.head.state_dict())
    assert same(fresh, trained)
    assert "newly initialised classifier" in origin


@pytest.mark.seconds
@pytest.mark.parametrize(
    "name",
    [
        "vit-b-99999999",
        "timm/" + "a" * 9999,
    ],
)
def test_absurd_networks_are_refused_before_they_are_built(name: str) -> None:
    start = time.monotonic()
    for device in ("cpu", "meta"):
        with torch.device(device), pytest.raises(ConfigError, match="model.name="):
            students.build(config.Model(name=name), SHAPE)
    assert time.monotonic() - start < 30  # timm's import included


def test_a_check_raises_what_a_worker_would(tmp_path) -> None:
    store = Store(str(tmp_path)) / "some.pt"
    store.write_torch(student("wrn-10-1", 0).state_dict())
    assert next(
        students.check(config.Model(name="wrn-10-1", weights=store.uri), SHAPE).parameters()
    ).is_meta
    for settings in (
        config.Model(name="wrn-10-2", weights=store.uri),
        config.Model(name="resnet-18", weights=store.uri),
        config.Model(name="vit-t-7"),
        config.Model(name="wrn-10-1", weights=f"{tmp_path}/none.pt"),
    ):
        with pytest.raises(DraError) as checked:
            students.check(settings, SHAPE)
        with pytest.raises(DraError) as started:
            students.initialise(students.build(settings, SHAPE), settings)
        assert str(checked.value) == str(started.value)
        assert type(checked.value) is type(started.value)


def test_a_part_that_is_named_like_a_wrapper_loses_no_other_part() -> None:
    """A student whose parts are `net` and `head`: the first is no wrapper of the whole."""
    wanted = {f"net.model.{number}.weight": torch.zeros(2) for number in range(9)}
    wanted |= {"head.weight": torch.zeros(3)}
    fit = weights.fit_keys({key: tensor + 1 for key, tensor in wanted.items()}, wanted)
    assert set(fit.weights) == set(wanted)
    assert not fit.ignored
