import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dra_ray.config import Teacher, UNet
from dra_ray.data.pictures import Split
from dra_ray.errors import ConfigError, DataError
from dra_ray.inspection.probe import encode, probe
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.source import LocalTeacher


def blobs(count: int, seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three corners, in features of very different sizes, one of which is
    constant.
    """
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])[labels]
    noise = spread * torch.randn(count, 2, generator=draws)
    return torch.cat(
        [(corners + noise) * torch.tensor([1e-3, 1e3]), torch.full((count, 1), 7.0)], dim=1
    ), labels


def test_classes_that_lie_apart_are_found():
    train, labels = blobs(90, 0, 0.3)
    test, wanted = blobs(60, 1, 0.3)
    assert probe(train, labels, test, wanted) == 1.0
    assert probe(train, labels, test, (wanted + 1) % 3) == 0.0


def test_a_feature_without_the_class_gives_chance():
    draws = torch.Generator().manual_seed(0)
    train, test = torch.randn(300, 4, generator=draws), torch.randn(3000, 4, generator=draws)
    labels, wanted = torch.arange(300) % 3, torch.arange(3000) % 3
    assert probe(train, labels, test, wanted) == pytest.approx(1 / 3, abs=0.05)


def test_it_is_a_pure_function_of_the_features_up_to_their_scale():
    train, labels = blobs(90, 0, 2.0)
    test, wanted = blobs(600, 1, 2.0)
    accuracy = probe(train, labels, test, wanted)
    assert 0.5 < accuracy < 1
    assert probe(train, labels, test, wanted) == accuracy
    assert probe(100 * train + 5, labels, 100 * test + 5, wanted) == pytest.approx(
        accuracy, abs=0.005
    )
    x, y = train.double().numpy()[:, :2], test.double().numpy()[:, :2]
    plain = LogisticRegression().fit((x - x.mean(0)) / x.std(0), labels.numpy())
    assert accuracy == float(np.mean(plain.predict((y - x.mean(0)) / x.std(0)) == wanted.numpy()))


def test_what_does_not_fit_is_refused():
    train, labels = blobs(9, 0, 1.0)
    with pytest.raises(DataError, match=r"test features are \[9, 3\] and labels \[8\]"):
        probe(train, labels, train, labels[:8])
    with pytest.raises(DataError, match="train features are not all finite"):
        probe(train * float("inf"), labels, train, labels)
    with pytest.raises(DataError, match="3 wide for training and 2"):
        probe(train, labels, train[:, :2], labels)
    with pytest.raises(DataError, match="all training labels are equal"):
        probe(train, labels * 0, train, labels)


def net(**options) -> EDM:
    torch.manual_seed(0)
    return EDM(UNet(model_channels=16), 8, 1, 10, 0.7, **options).eval()


def split(count: int) -> Split:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    return Split(images, torch.arange(count) % 10)


def source(layer: str = "dec.4x4_in1", **options) -> LocalTeacher:
    return LocalTeacher(net(**options), Teacher(micro_batch=4, label="null", layer=layer))


def test_an_image_is_encoded_with_its_own_noise_whatever_is_beside_it():
    images = split(5)
    whole = encode(source(), images, 0.6, noise_seed=3)
    assert whole.shape == (5, 32)
    assert torch.equal(whole[2:], encode(source(), images[2:], 0.6, noise_seed=5))
    assert not torch.equal(whole, encode(source(), images, 0.06, noise_seed=3))
    assert encode(source("enc.8x8_conv"), images, 0.6).shape == (5, 16)


def test_the_null_label_says_nothing_of_the_class():
    teacher, images = source(), split(4)
    features = encode(teacher, images, 1.0)
    with torch.no_grad():  # whatever the label's weights are
        teacher.net.model.map_label.weight.normal_(std=10.0)
    assert torch.equal(features, encode(teacher, images, 1.0))


def test_unknown_layers_and_noise_levels():
    with pytest.raises(ConfigError, match="teacher.layer='mid'"):
        source("mid")
    with pytest.raises(ConfigError, match="sigma=0.01 is outside"):
        encode(source(precondition="ve"), split(2), 0.01)
