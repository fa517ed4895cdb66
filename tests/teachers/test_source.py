import dataclasses
import pickle

import pytest
import torch

from dra_ray.config import Teacher, UNet
from dra_ray.errors import ConfigError, DataError
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher, Request
from tests.support import requests

SEEDS = torch.tensor([5, 6])
DIGEST = "a687a8c77f84ed6489efe440e451c9902236f5f37bf38129d6c5db837cc0d53a"


def request(number: int, count: int) -> Request:
    return requests.request(number, count, resolution=8)


def teacher(**changes) -> LocalTeacher:
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, 0.7)
    return LocalTeacher(net, Teacher(micro_batch=16, **changes), threads=1)


def test_submit_is_encode():
    source = teacher()
    pending = source.submit(request(1, 20))
    assert pending.result(timeout_s=1).shape == (20, source.feature_dim)
    assert pending.result().dtype == torch.float32
    assert torch.equal(pending.result(), source.encode(request(1, 20)))
    assert source.encode(request(1, 0)).shape == (0, source.feature_dim)


@pytest.mark.parametrize("tokens", [False, True])
def test_features_in_float16_are_those_in_float32_rounded(tokens):
    whole, halved = (teacher(wire=wire, tokens=tokens) for wire in ("float32", "float16"))
    assert whole.config.digest() != halved.config.digest()
    answer = halved.submit(request(1, 20)).result()
    assert answer.dtype == torch.float32
    assert torch.equal(answer, whole.encode(request(1, 20)).half().float())
    assert halved.encode(request(1, 20)).dtype == torch.float16
    assert halved.encode(request(1, 0)).dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "off"),
    [({"channels_last": True}, 1e-4), ({"precision": "bf16", "channels_last": True}, 5e-2)],
    ids=["channels-last", "bf16"],
)
def test_other_arithmetic_is_another_teacher_whose_rows_stand_alone(changes, off):
    plain, other = teacher(), teacher(**changes)
    assert plain.config.digest() != other.config.digest()
    whole = request(1, 20)
    features = other.encode(whole)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, plain.encode(whole), rtol=off, atol=off)
    assert torch.equal(torch.cat(list(map(other.encode, whole.split(7)))), features)
    assert teacher(**changes).config == other.config
    assert (
        Teacher(precision="fp32", channels_last=False, compile=False).digest() == Teacher().digest()
    )


def test_features_beyond_float16_are_refused_and_not_sent_as_infinite():
    source = teacher(wire="float16")
    with torch.no_grad():
        for name, weight in source.net.named_parameters():
            if name.endswith("in1.conv1.bias"):
                weight.fill_(3e5)
    with pytest.raises(DataError, match="float16 cannot hold; set teacher.wire=float32"):
        source.encode(request(1, 4))


@pytest.mark.parametrize("cut", [16, 5, 39, 40])
def test_a_request_cut_in_parts_gives_the_same_features(cut):
    source, whole = teacher(), request(2, 40)
    parts = whole.split(cut)
    assert [len(part) for part in parts] == [min(cut, 40 - at) for at in range(0, 40, cut)]
    features = torch.cat([source.encode(part) for part in parts])
    assert torch.equal(source.encode(whole), features)
    assert torch.equal(source.encode(Request.joined(parts)), features)
    one = Request.seeded(whole.images[:cut], whole.labels[:cut], whole.sigma[:cut], 20_000)
    assert torch.equal(source.encode(one), features[:cut])


def test_noise_depends_on_seed_and_position():
    source, one = teacher(), request(0, 1)
    twice = Request(one.images.repeat(2, 1, 1, 1), one.labels.repeat(2), torch.ones(2), SEEDS)
    first, second = source.encode(twice)
    assert not torch.equal(first, second)
    later = dataclasses.replace(twice, noise_seeds=SEEDS + 1)
    assert torch.equal(source.encode(later)[0], second)
    same = dataclasses.replace(twice, noise_seeds=SEEDS[1].repeat(2))
    assert torch.equal(source.encode(same), torch.stack([second, second]))


def test_labels_reach_the_teacher_unless_null():
    first = request(0, 4)
    other = dataclasses.replace(first, labels=(first.labels + 1) % 10)
    unknown = dataclasses.replace(first, labels=first.labels + 90)
    assert not torch.equal(teacher().encode(first), teacher().encode(other))
    null = teacher(label="null")
    assert torch.equal(null.encode(first), null.encode(other))
    assert torch.equal(null.encode(first), null.encode(unknown))


def test_threads_and_gradients_are_restored():
    source = teacher()
    before = torch.get_num_threads()
    features = source.encode(request(0, 3))
    assert torch.get_num_threads() == before
    assert not features.requires_grad
    weight = torch.zeros_like(features, requires_grad=True)
    (weight * features).sum().backward()  # usable as a target inside autograd
    assert torch.equal(weight.grad, features)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda good: {"images": good.images.float()},
            DataError,
            r"the teacher encodes torch.uint8 \[B, 1, 8, 8\]",
        ),
        (lambda good: {"images": good.images[..., :7]}, DataError, r"torch.uint8 \[4, 1, 8, 7\]"),
        (lambda good: {"labels": good.labels + 10}, DataError, "classes 0 to 9"),
        (lambda good: {"labels": good.labels - 10}, DataError, "classes 0 to 9"),
        (lambda good: {"labels": good.labels[:3]}, DataError, "3 labels"),
        (lambda good: {"sigma": good.sigma[:1]}, DataError, "1 sigmas"),
        (lambda good: {"noise_seeds": SEEDS}, DataError, "2 noise seeds"),
        (
            lambda good: {"sigma": torch.zeros(4)},
            ConfigError,
            "sigma=0 is outside of what the teacher knows",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words):
    good = request(0, 4)
    with pytest.raises(error, match=words):
        teacher().encode(dataclasses.replace(good, **change(good)))


def test_an_unknown_layer_is_refused():
    with pytest.raises(ConfigError, match=r"teacher.layer='mid'"):
        teacher(layer="mid")


def test_a_digest_knows_every_part_of_a_request():
    first = request(0, 2)
    assert first.digest() == request(0, 2).digest()
    others = [
        {"images": first.images + 1},
        {"images": first.images.reshape(2, 2, 8, 4)},
        {"labels": first.labels + 1},
        {"labels": first.labels.int()},
        {"sigma": first.sigma * 2},
        {"noise_seeds": first.noise_seeds + 1},
        {"noise_seeds": first.noise_seeds.flip(0)},
        {"noise_seeds": first.noise_seeds * 2},
    ]
    keys = {first.digest(), *(dataclasses.replace(first, **other).digest() for other in others)}
    assert len(keys) == 1 + len(others)
    assert first[:1].digest() != first[1:].digest()
    assert first[:0].digest() != first.digest()


def test_the_digest_of_a_request_stays_what_it_was():
    """Replicas of two versions of this package may serve one pool while it is replaced."""
    images = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4)
    first = Request.seeded(images, torch.arange(2), torch.ones(2), 7)
    assert first.digest().hex() == DIGEST


def test_a_request_travels_and_can_be_written_to_on_arrival():
    first = request(0, 5)
    again = pickle.loads(pickle.dumps(first[1:]))
    assert again.digest() == first[1:].digest()
    # as out of Ray's object store: by reference to memory that is read-only
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(first, protocol=5, buffer_callback=buffers.append)
    arrived = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
    assert buffers
    assert arrived.digest() == first.digest()
    arrived.images.zero_()
    assert first.images.any()
    assert not arrived.images.any()
