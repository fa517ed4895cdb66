"""CLARID: inversion, singular directions of a Jacobian, projection (arXiv 2506.09955)."""

import math

import pytest
import torch
from torch import Tensor, nn

from dra_ray.config import Canonical, UNet
from dra_ray.errors import ConfigError
from dra_ray.teachers import canonical
from dra_ray.teachers.dit import DiTSizes, LightningDiT
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.sampling import seeded_noise

SHAPE = (1, 4, 5)
TIGHT = {"iterations": 300, "tolerance": 1e-9}


def linear(rows: int, seed: int = 0) -> tuple[Tensor, canonical.Feature]:
    """(matrices [3,rows,20], the map that each row of a batch has its own of)."""
    draws = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, rows, 20, generator=draws) * torch.logspace(0, -1.5, 20)
    return matrices, lambda x: (matrices @ x.flatten(1)[:, :, None])[:, :, 0]


def noise(count: int, shape: tuple[int, ...] = SHAPE, rows: int = 3) -> Tensor:
    return seeded_noise(range(rows), (count, *shape))


def trained(classes: int = 3, **fields: object) -> EDM:
    """A small network whose output is not near zero, as an untrained one's is."""
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=8, channel_mult=(1, 2), **fields), 8, 1, classes)
    for parameter in net.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.05)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [7, 20, 33])
def test_directions_of_a_linear_map_are_its_singular_vectors(rows: int) -> None:
    matrices, feature = linear(rows)
    found = canonical.directions(feature, torch.randn(3, *SHAPE), noise(9), 5, **TIGHT)
    _, gains, vectors = torch.linalg.svd(matrices.double())
    assert torch.allclose(found.gains.double(), gains[:, :5], atol=1e-4)
    cosines = (found.vectors.flatten(2).double() * vectors[:, :5]).sum(2).abs()
    assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-4)
    products = found.vectors.flatten(2) @ found.vectors.flatten(2).transpose(1, 2)
    assert torch.allclose(products, torch.eye(5).expand(3, 5, 5), atol=1e-5)


def test_bottom_directions_have_the_smallest_gains() -> None:
    matrices, feature = linear(33)
    found = canonical.directions(
        feature, torch.randn(3, *SHAPE), noise(12), 4, kind="bottom", iterations=2000,
        tolerance=1e-10,
    )  # fmt: skip
    gains = torch.linalg.svdvals(matrices.double()).flip(1)[:, :4]
    assert torch.allclose(
        (matrices.double() @ found.vectors.flatten(2).double().transpose(1, 2)).norm(dim=1),
        gains,
        atol=1e-3,
    )


def test_a_map_of_low_rank_has_bottom_directions_without_effect() -> None:
    _, feature = linear(7)
    found = canonical.directions(
        feature, torch.randn(3, *SHAPE), noise(8), 4, kind="bottom", iterations=400, tolerance=1e-9
    )
    assert float(found.gains.max()) < 1e-2


def test_random_directions_are_orthonormal_and_their_gains_those_of_the_map() -> None:
    matrices, feature = linear(20)
    found = canonical.directions(feature, torch.randn(3, *SHAPE), noise(4), 4, kind="random")
    flat = found.vectors.flatten(2)
    assert torch.allclose(flat @ flat.transpose(1, 2), torch.eye(4).expand(3, 4, 4), atol=1e-5)
    assert torch.allclose(found.gains, (matrices @ flat.transpose(1, 2)).norm(dim=1), atol=1e-5)
    assert found.iterations == 0


def test_directions_of_a_network_are_those_of_its_jacobian() -> None:
    net = trained()
    x, sigma = torch.randn(2, 1, 8, 8), torch.full((2,), 0.8)
    labels = net.one_hot(torch.tensor([0, 2]))

    def feature(x: Tensor) -> Tensor:
        return net.features(x, sigma[: len(x)], labels[: len(x)], None, pooled=False)

    found = canonical.directions(feature, x, noise(10, (1, 8, 8), 2), 4, **TIGHT)
    for row in range(2):
        whole = torch.autograd.functional.jacobian(
            lambda one, row=row: net.features(
                one, sigma[:1], labels[row : row + 1], None, pooled=False
            ),
            x[row : row + 1],
        ).reshape(-1, 64)
        _, gains, vectors = torch.linalg.svd(whole.double())
        assert torch.allclose(found.gains[row].double(), gains[:4], rtol=1e-3)
        subspace = vectors[:4] @ found.vectors[row].flatten(1).double().T
        assert torch.linalg.svdvals(subspace).min() > 1 - 1e-4


def test_a_row_s_directions_do_not_depend_on_the_others() -> None:
    _, feature = linear(20)
    x = torch.randn(3, *SHAPE)
    whole = canonical.directions(feature, x, noise(6), 2, iterations=5, tolerance=1e-30)
    matrices, _ = linear(20)

    def second(x: Tensor) -> Tensor:
        return (matrices[1:2] @ x.flatten(1)[:, :, None])[:, :, 0]

    alone = canonical.directions(second, x[1:2], noise(6)[1:2], 2, iterations=5, tolerance=1e-30)
    assert torch.allclose(whole.vectors[1], alone.vectors[0], atol=1e-5)


def test_more_directions_than_numbers_are_refused() -> None:
    _, feature = linear(20)
    with pytest.raises(ConfigError, match="count=21 directions, but the latent has 20"):
        canonical.directions(feature, torch.randn(3, *SHAPE), noise(21), 21)


def test_a_feature_that_is_constant_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not change with its input"):
        canonical.directions(lambda x: x.flatten(1) * 0 + 1, torch.randn(3, *SHAPE), noise(4), 2)


def test_more_directions_than_the_rank_are_refused() -> None:
    _, feature = linear(7)
    found = canonical.directions(feature, torch.randn(3, *SHAPE), noise(12), 10, **TIGHT)
    canonical.require_effect(found.gains, torch.tensor([7, 7, 7]))
    with pytest.raises(ConfigError, match="count=8 directions, but only 7"):
        canonical.require_effect(found.gains, torch.tensor([7, 8, 7]))


def test_projection_takes_out_what_lies_in_the_span() -> None:
    vectors = torch.linalg.qr(torch.randn(3, 20, 6))[0].transpose(1, 2).reshape(3, 6, *SHAPE)
    x = torch.randn(3, *SHAPE)
    once = canonical.project(x, vectors)
    assert (vectors.flatten(2) @ once.flatten(1)[:, :, None]).abs().max() < 1e-5
    assert torch.allclose(canonical.project(once, vectors), once, atol=1e-6)
    assert torch.equal(canonical.project(x, vectors * 0), x)
    removed = x - once
    assert torch.allclose((removed * once).flatten(1).sum(1), torch.zeros(3), atol=1e-5)


def test_the_energy_rule_takes_as_few_as_hold_the_share() -> None:
    gains = torch.tensor([[2.0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [9, 0, 0, 0, 0]])
    assert canonical.counts_by_energy(gains, 0.5, 5).tolist() == [1, 3, 1]
    assert canonical.counts_by_energy(gains, 0.6, 5).tolist() == [2, 3, 1]
    assert canonical.counts_by_energy(gains, 0.6, 2).tolist() == [2, 2, 1]
    assert canonical.counts_by_energy(gains, 1.0, 5).tolist() == [5, 5, 1]


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float((a.double() - b.double()).square().mean())))


@pytest.mark.parametrize("sigma", [0.5, 3.3])
def test_without_directions_the_samples_are_the_images(sigma: float) -> None:
    from dra_ray import config, data
    from dra_ray.storage import Store
    from dra_ray.teachers import checkpoint

    teacher = config.Synthesis(teacher="package:fashion-edm").teacher
    assert teacher
    net = checkpoint.load(Store(teacher))
    # noise-free pictures with structure: digits, in Fashion-MNIST's size and sign
    digits = data.load(config.Data()).test.images[:6, :1]
    images = torch.nn.functional.interpolate(digits.float(), 28).to(torch.uint8)
    asked = Canonical(teacher=teacher, sigma=sigma, count=0)
    made = canonical.canonicals(net, asked, images, torch.arange(6), list(range(6)))
    assert psnr(made.images, images) > 25
    assert torch.equal(made.features, made.raw_features)
    assert made.counts.tolist() == [0] * 6


def test_what_is_made_of_a_batch_is_what_its_parts_say() -> None:
    net = trained()
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    asked = Canonical(teacher="t", count=3, steps=4, sigma=1.0, guidance=2.0, rescale=True)
    labels, seeds = torch.tensor([0, 1, 2, 0]), [5, 6, 7, 8]
    made = canonical.canonicals(net, asked, images, labels, seeds)
    again = canonical.canonicals(net, asked, images, labels, seeds)
    assert all(torch.equal(getattr(made, n), getattr(again, n)) for n in ("images", "latents"))
    levels = canonical.ladder(asked)
    assert float(levels[-1]) == pytest.approx(1.0)
    one_hot = net.one_hot(labels)
    state = canonical.invert(net, net.clean(images), one_hot, levels)
    assert torch.allclose(
        made.latents.flatten(1).norm(dim=1), state.flatten(1).norm(dim=1).float(), rtol=1e-5
    )
    sigma = torch.ones(4)
    pooled = net.features(made.latents, sigma, one_hot)
    assert torch.allclose(made.features, pooled, atol=1e-5)
    assert torch.allclose(made.raw_features, net.features(state.float(), sigma, one_hot))
    assert made.images.shape == images.shape
    assert made.images.dtype == torch.uint8


def test_guidance_moves_along_what_the_class_adds() -> None:
    net = trained()
    x, one_hot = torch.randn(3, 1, 8, 8), net.one_hot(torch.tensor([0, 1, 2]))
    levels = canonical.ladder(Canonical(sigma=0.5, steps=2))
    plain, null, guided = (
        canonical.decode(net, x, labels, levels, guidance)
        for labels, guidance in ((one_hot, 1.0), (one_hot, 0.0), (one_hot, 3.0))
    )
    assert torch.allclose(null, canonical.decode(net, x, None, levels))
    assert (guided - plain).norm() > (plain - null).norm()


def test_a_transformer_has_canonical_samples_too() -> None:
    torch.manual_seed(0)
    sizes = DiTSizes(
        resolution=8, channels=1, patch=2, hidden=24, mlp_hidden=32, depth=2, heads=2, num_classes=3
    )
    net = LightningDiT(sizes)
    for parameter in net.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.05)
    asked = Canonical(teacher="t", count=2, steps=3, sigma=1.0)
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    made = canonical.canonicals(net, asked, images, torch.tensor([0, 1]), [1, 2])
    assert made.images.shape == images.shape
    assert bool((made.gains > 0).all())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer": "dec.4x4_in9"}, "dec.4x4_in1"),
        ({"count": 70}, "count=70 directions, but the teacher's latents have 64"),
    ],
)
def test_what_does_not_fit_a_teacher_is_refused(fields: dict[str, object], said: str) -> None:
    asked = Canonical.model_validate({"teacher": "t"} | fields)
    with pytest.raises(ConfigError, match=said):
        canonical.check(trained(), asked, "t")


def test_a_teacher_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="knows no classes"):
        canonical.check(trained(classes=0), Canonical(), "t")
