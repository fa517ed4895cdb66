import pytest
import torch

from dra_ray.config import UNet
from dra_ray.errors import ConfigError
from dra_ray.teachers import diffusion, pixels, sampling
from dra_ray.teachers.edm import EDM


class Gaussian(torch.nn.Module):
    """The exact denoiser of data ~ N(mean, deviation^2), so that sampling has a known answer."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, deviation**2

    def forward(self, x, sigma, labels=None):
        level = sigma.reshape(-1, 1, 1, 1) ** 2
        return (self.variance * x + level * self.mean) / (self.variance + level)


def test_bytes_round_trip():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(pixels.to_uint8(pixels.to_signed(images)), images)
    assert pixels.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_noise_levels_are_the_published_grid():
    """EDM with 18 steps, from 80 down to 0.002."""
    levels = sampling.noise_levels(18, 0.002, 80, 7)
    wanted = [
        80,
        57.6,
        40.8,
        28.4,
        19.4,
        12.9,
        8.40,
        5.32,
        3.26,
        1.92,
        1.088,
        0.585,
        0.296,
        0.1395,
        0.0600,
        0.0229,
        0.0075,
        0.002,
        0,
    ]
    assert levels.tolist() == pytest.approx(wanted, rel=6e-3)


def test_heun_transports_the_noise_exactly():
    """For Gaussian data the probability flow is x(s) - mean = (x(S) - mean) sqrt((s^2 + v) / (S^2 +
    v)); Heun's error falls with steps^-2.
    """
    noise = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (32, 64, 128):
        got = sampling.heun(
            Gaussian(0.3, 0.5), noise, None, sampling.noise_levels(steps, 0.002, 80, 7)
        )
        start = 80 * noise - 0.3
        errors.append(float((got - (0.3 + 0.5 * start / (80**2 + 0.5**2) ** 0.5)).abs().max()))
    assert errors[2] < 0.002
    assert errors[2] < errors[1] / 3.5 < errors[0] / 12.25


def test_loss_of_the_exact_denoiser():
    """E|D-y|^2 = s^2 v / (s^2 + v) per pixel, so EDM's weighting makes it 1 per pixel when
    sigma_data is the data's deviation.
    """
    generator = torch.Generator().manual_seed(1)
    clean = 0.5 * torch.randn(4000, 1, 4, 4, generator=generator)
    sigma, noise = (
        diffusion.draw_sigma(4000, generator),
        torch.randn(clean.shape, generator=generator),
    )
    loss = diffusion.edm_loss(Gaussian(0, 0.5), clean, sigma, noise, None, sigma_data=0.5)
    assert loss.shape == (4000,)
    assert float(loss.mean()) == pytest.approx(16, rel=0.02)


def test_sigma_is_log_normal():
    sigma = diffusion.draw_sigma(20_000, torch.Generator().manual_seed(0)).log()
    assert float(sigma.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(sigma.std()) == pytest.approx(1.2, abs=0.03)


def test_ema_decay():
    assert diffusion.ema_decay(100, 10**9, 100) == pytest.approx(0.5)
    assert diffusion.ema_decay(100, 2000, 10**9) == pytest.approx(
        0.5
    )  # the ramp: 5 % of 2000 images
    assert diffusion.ema_decay(100, 0, 1000) == 0.0


def test_an_image_depends_on_its_seed_only():
    torch.manual_seed(0)
    net = EDM(UNet(model_channels=16), 8, 1, 10, 0.7).eval()
    levels = sampling.noise_levels(3, 0.01, 20, 7)
    labels = torch.tensor([0, 1, 2, 3])
    images = sampling.sample(net, [5, 6, 7, 8], labels, levels)
    again = sampling.sample(net, [9, 6, 7, 10], torch.tensor([9, 1, 2, 9]), levels)
    assert images.dtype == torch.uint8
    assert torch.equal(images[1:3], again[1:3])
    assert not torch.equal(images[0], again[0])


def test_levels_must_be_known_to_the_network():
    net = EDM(UNet(model_channels=16), 8, 1, 0, precondition="ve").eval()
    with pytest.raises(
        ConfigError, match=r"sigma=0.002 is outside of what the teacher knows, 0.02 to 100"
    ):
        sampling.sample(net, [0], None, sampling.noise_levels(3, 0.002, 80, 7))
    assert sampling.sample(net, [0], None, sampling.noise_levels(3, 0.02, 80, 7)).shape == (
        1,
        1,
        8,
        8,
    )
