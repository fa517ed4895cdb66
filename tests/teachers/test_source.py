import pytest
import torch

from dra_ray.config import Teacher, UNet
from dra_ray.errors import ConfigError, DataError
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher


def teacher(**changes) -> LocalTeacher:
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, 0.7)
    return LocalTeacher(net, Teacher(micro_batch=16, **changes), threads=1)


def request(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 10, torch.linspace(0.02, 1, count)


def test_submit_is_encode():
    source = teacher()
    images, labels, sigma = request(20)
    pending = source.submit(images, labels, sigma, 7)
    assert pending.result(timeout_s=1).shape == (20, source.feature_dim)
    assert pending.result().dtype == torch.float32
    assert torch.equal(pending.result(), source.encode(images, labels, sigma, 7))


@pytest.mark.parametrize("cut", [16, 5, 39])
def test_a_request_cut_in_slices_gives_the_same_features(cut):
    source = teacher()
    images, labels, sigma = request(40)
    whole = source.encode(images, labels, sigma, 100)
    parts = [
        source.encode(images[i : i + cut], labels[i : i + cut], sigma[i : i + cut], 100 + i)
        for i in range(0, 40, cut)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_depends_on_seed_and_position():
    source = teacher()
    images, labels, _ = request(1)
    twice = images.repeat(2, 1, 1, 1), labels.repeat(2), torch.ones(2)
    first, second = source.encode(*twice, 5)
    assert not torch.equal(first, second)
    assert torch.equal(source.encode(*twice, 6)[0], second)
    assert torch.equal(
        source.encode_each(*twice, torch.tensor([6, 6])), torch.stack([second, second])
    )


def test_labels_reach_the_teacher_unless_null():
    images, labels, sigma = request(4)
    other = (labels + 1) % 10
    assert not torch.equal(
        teacher().encode(images, labels, sigma, 0), teacher().encode(images, other, sigma, 0)
    )
    assert torch.equal(
        teacher(label="null").encode(images, labels, sigma, 0),
        teacher(label="null").encode(images, other, sigma, 0),
    )
    assert torch.equal(
        teacher(label="null").encode(images, labels, sigma, 0),
        teacher(label="null").encode(images, labels + 90, sigma, 0),
    )


def test_threads_and_gradients_are_restored():
    source = teacher()
    before = torch.get_num_threads()
    features = source.encode(*request(3), 0)
    assert torch.get_num_threads() == before
    assert not features.requires_grad
    weight = torch.zeros_like(features, requires_grad=True)
    (weight * features).sum().backward()  # usable as a target inside autograd
    assert torch.equal(weight.grad, features)


def test_what_does_not_fit_is_refused():
    source = teacher()
    images, labels, sigma = request(4)
    with pytest.raises(DataError, match=r"the teacher encodes torch.uint8 \[B, 1, 8, 8\]"):
        source.encode(images.float(), labels, sigma, 0)
    with pytest.raises(DataError, match="classes 0 to 9"):
        source.encode(images, labels + 8, sigma, 0)
    with pytest.raises(DataError, match="3 labels"):
        source.encode(images, labels[:3], sigma, 0)
    with pytest.raises(ConfigError, match=r"sigma=0 is outside of what the teacher knows"):
        source.encode(images, labels, torch.zeros(4), 0)
    with pytest.raises(ConfigError, match=r"teacher.layer='mid'"):
        teacher(layer="mid")
