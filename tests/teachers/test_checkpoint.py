import pytest
import torch

from dra_ray.config import UNet
from dra_ray.errors import CheckpointError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.noisy import NoisyClassifier


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16, attn_resolutions=(4,)), 8, 1, 10, 0.7)
    store = Store(str(tmp_path / "teacher"))
    checkpoint.save(store, net, {"images_seen": 5})
    return store, net


def test_round_trip(saved):
    store, net = saved
    loaded = checkpoint.load(store)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    assert torch.equal(loaded(x, sigma), net.eval()(x, sigma))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert checkpoint.read_card(store)["images_seen"] == 5


def test_digest_follows_weights_and_architecture(saved, tmp_path):
    store, net = saved
    assert checkpoint.save(
        Store(str(tmp_path / "same")), net, {"images_seen": 6}
    ) == checkpoint.digest(store)
    net.sigma_data = 0.6
    other = checkpoint.save(Store(str(tmp_path / "sigma")), net, {})
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-3
    assert (
        len(
            {
                checkpoint.digest(store),
                other,
                checkpoint.save(Store(str(tmp_path / "weights")), net, {}),
            }
        )
        == 3
    )


def test_missing(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"no teacher at .*dra teacher train"):
        checkpoint.load(Store(str(tmp_path / "nowhere")))


def test_keys_and_shapes_that_do_not_fit_are_named(saved):
    store, _ = saved
    weights = (store / "teacher.safetensors").read_tensors()
    weights["model.map_label.weight"] = torch.zeros(16, 9)
    weights["model.enc.odd"] = weights.pop("model.map_layer0.bias")
    (store / "teacher.safetensors").write_tensors(weights)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(store)
    for part in (
        "missing model.map_layer0.bias",
        "unknown model.enc.odd",
        "model.map_label.weight is [16, 9] instead of [16, 10]",
    ):
        assert part in str(caught.value)


def test_changed_weights_are_noticed(saved):
    store, _ = saved
    weights = (store / "teacher.safetensors").read_tensors()
    weights["model.map_layer0.bias"][0] += 1
    (store / "teacher.safetensors").write_tensors(weights)
    with pytest.raises(CheckpointError, match="digests differ"):
        checkpoint.load(store)


def test_a_card_of_something_else(saved):
    store, _ = saved
    card = (store / "card.json").read_json()
    del card["architecture"]["channels"]
    (store / "card.json").write_json(card)
    with pytest.raises(CheckpointError, match="does not describe a network"):
        checkpoint.load(store)


def test_kinds_of_network(saved, tmp_path):
    store, _ = saved
    assert (
        "kind" not in checkpoint.read_card(store)["architecture"]
    )  # as in teachers that were made before there were kinds
    assert isinstance(checkpoint.load(store, EDM), EDM)
    with pytest.raises(
        CheckpointError,
        match="holds a network of kind 'edm', but this needs kind 'noisy-classifier'",
    ):
        checkpoint.load(store, NoisyClassifier)
    control = Store(str(tmp_path / "control"))
    checkpoint.save(control, NoisyClassifier(UNet(model_channels=16), 8, 1, 10), {})
    assert isinstance(checkpoint.load(control), NoisyClassifier)
    card = (control / "card.json").read_json()
    card["architecture"]["kind"] = "noisy-clasifier"
    (control / "card.json").write_json(card)
    with pytest.raises(CheckpointError, match="did you mean 'noisy-classifier'"):
        checkpoint.load(control)


def test_other_networks_round_trip(tmp_path):
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, precondition="ve", style="ncsnpp").eval()
    store = Store(str(tmp_path / "teacher"))
    checkpoint.save(store, net, {})
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    assert torch.equal(checkpoint.load(store)(x, sigma), net(x, sigma))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_blocks", 10**9, r"\(num_blocks=1000000000: input should be"),
        ("channel_mult", [1] * 100_000, r"\(channel_mult=\[1, 1"),
        ("channels", 10**9, "does not fit the architecture"),
        ("num_classes", 10**12, "does not fit the architecture"),
        ("resolution", 2**40, "does not fit the architecture"),
    ],
)
def test_a_card_of_absurd_sizes_is_refused_before_anything_is_allocated(
    saved, field: str, value: object, words: str
):
    store, _ = saved
    card = checkpoint.read_card(store)
    (store / checkpoint.CARD).write_json(
        card | {"architecture": card["architecture"] | {field: value}}
    )
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(store)
    assert len(str(caught.value)) < 1500
