"""CLAReps: an image's latent without the directions that change its appearance most but not its
class (Xu et al., arXiv 2506.09955). No code and no values of the authors were to be had: the method
is theirs, every number here a default to be swept (UNVERIFIED).

    x = invert(net, clean, labels, levels)                      # up the probability flow, to s_e
    found = directions(feature, x, noise, count)                # of the feature map's Jacobian
    latent = project(x, found.vectors)                          # the canonical latent
    images = net.to_images(decode(net, latent, labels, levels)) # the canonical sample

The Jacobian is never formed: its products with vectors are forward-mode derivatives, those of its
transpose backward-mode ones. Rows of a batch do not see each other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dra_ray.config import Canonical, Synthesis
from dra_ray.errors import ConfigError
from dra_ray.teachers.network import ImageSampler, Network, image_sampler
from dra_ray.teachers.sampling import heun_step, noise_levels, seeded_noise, slope_of

GAIN = 1e-6  # of the largest: directions below have no effect on the feature

Feature = Callable[[Tensor], Tensor]
"""x float32 [B,*shape] -> features [B,...], row by row."""


# -- along the probability flow --------------------------------------------------------------------
def ladder(config: Canonical) -> Tensor:
    """Noise levels float64 [steps], ascending from `sigma_min` to `sigma`, on EDM's grid (arXiv
    2206.00364, equation 5).
    """
    return noise_levels(config.steps, config.sigma_min, config.sigma, config.rho)[:-1].flip(0)


@torch.no_grad()
def invert(net: Network, clean: Tensor, labels: Tensor | None, levels: Tensor) -> Tensor:
    """The state float64 [B,*noise_shape] at the last of the ascending `levels` whose flow leads to
    `clean` float32 [B,*noise_shape], which stands for the state at the first; `labels` one-hot
    [B,K].
    """
    slope = slope_of(lambda x, sigma: net(x, sigma, labels))
    x = clean.to(torch.float64)
    for now, after in itertools.pairwise(levels):
        x = heun_step(slope, x, now, after)
    return x


@torch.no_grad()
def decode(
    net: Network, state: Tensor, labels: Tensor | None, levels: Tensor, guidance: float = 1.0
) -> Tensor:
    """Where the flow leads from `state` [B,*noise_shape] at the last of the ascending `levels` down
    to 0, float64; classifier-free guidance acts where it is not 1.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        conditional: Tensor = net(x, sigma, labels)
        if guidance == 1 or labels is None:
            return conditional
        null = net(x, sigma, None)
        return null + guidance * (conditional - null)

    slope, x = slope_of(denoise), state.to(torch.float64)
    for now, after in itertools.pairwise([*levels.flip(0), levels.new_zeros(())]):
        x = heun_step(slope, x, now, after)
    return x


# -- singular vectors of a Jacobian ----------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Directions:
    """Orthonormal directions of each row, and what a feature gains along them.

    Attributes:
        vectors: float32 [B,k,*shape]: right singular vectors of the Jacobian, estimates of them, or
            random ones.
        gains: float32 [B,k], |J v|: singular values.
        change: float32 [B], 1 - cosine of the largest angle between the last two estimates of the
            subspace; 0 for random ones.
        iterations: that were made.
    """

    vectors: Tensor
    gains: Tensor
    change: Tensor
    iterations: int


class _Jacobian:
    """Products with a feature map's Jacobian at `x` [B,*shape], flat: [B,n] to [B,m] and back."""

    def __init__(self, feature: Feature, x: Tensor) -> None:
        self._feature = feature
        self._x = x.detach().to(torch.float32).requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._output = feature(self._x)

    def times(self, vectors: Tensor) -> Tensor:
        """J v float64 [q,B,m] for `vectors` [q,B,n]."""
        return torch.stack([self._along(vector) for vector in vectors])

    def transposed_times(self, vectors: Tensor) -> Tensor:
        """J^T u float64 [q,B,n] for `vectors` [q,B,m]."""
        rows = []
        for vector in vectors:
            seed = vector.to(self._output).reshape(self._output.shape)
            (row,) = torch.autograd.grad(self._output, self._x, seed, retain_graph=True)
            rows.append(row.flatten(1).double())
        return torch.stack(rows)

    @torch.no_grad()
    def _along(self, vector: Tensor) -> Tensor:
        x = self._x.detach()
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = forward_ad.make_dual(x, vector.to(x).reshape(x.shape))
            tangent = forward_ad.unpack_dual(self._feature(dual)).tangent
        if tangent is None:  # the feature does not depend on x
            return x.new_zeros(len(x), self._output[0].numel(), dtype=torch.float64)
        return tangent.flatten(1).double()


def directions(
    feature: Feature,
    x: Tensor,
    noise: Tensor,
    count: int,
    *,
    kind: str = "top",
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> Directions:
    """`count` directions of each row of `x` [B,*shape], by subspace iteration on J^T J of
    `feature`'s Jacobian with Rayleigh and Ritz's rotation (Halko et al., arXiv 0909.4061, section
    4.5; for diffusion models Park et al. 2023).

    `noise` [B,q,*shape], standard normal, is where it starts: q - `count` vectors above the wanted
    ones speed it up. It ends once every row's subspace moved by less than `tolerance` (1 - cosine
    of the largest principal angle). `kind`: "top" for those of the largest gains; "bottom" for the
    smallest, by the iteration on s^2 - J^T J with the largest gain s: where many directions have
    next to no effect, some of them; "random" for random ones.

    Raises `ConfigError` where fewer than `count` directions exist, or where the feature does not
    change with `x`.
    """
    shape, size = x.shape[1:], x[0].numel()
    if count > size:
        raise ConfigError(
            f"count={count} directions, but the latent has {size} numbers; lower count"
        )
    basis = _orthonormal(noise.flatten(2).double().transpose(1, 2)[:, :, :size])
    jacobian = _Jacobian(feature, x)
    if kind == "random":
        vectors = basis[:, :, :count]
        gains = jacobian.times(vectors.permute(2, 0, 1)).norm(dim=2).T
        return _found(vectors, gains, gains.new_zeros(len(x)), 0, shape)
    shift = None
    if kind == "bottom":
        top = directions(
            feature, x, noise, 1, kind="top", iterations=iterations, tolerance=tolerance
        )
        shift = 1.1 * top.gains.double()[:, 0, None].square()  # the largest may be underestimated
    last, change, done = None, torch.ones(len(x), dtype=torch.float64), 0
    while True:
        images = jacobian.times(basis.permute(2, 0, 1)).permute(1, 2, 0)  # [B,m,q]
        squares, rotation = torch.linalg.eigh(images.transpose(1, 2) @ images)  # ascending
        if shift is None:
            squares, rotation = squares.flip(1), rotation.flip(2)
        vectors = basis @ rotation[:, :, :count]
        if last is not None:
            cosines = torch.linalg.svdvals(last.transpose(1, 2) @ vectors)
            change = (1 - cosines.min(1).values).clamp_min(0)
        done += 1
        if done > iterations or bool((change < tolerance).all()):
            break
        last = vectors
        back = jacobian.transposed_times(images.permute(2, 0, 1)).permute(1, 2, 0)  # [B,n,q]
        basis = _orthonormal(back if shift is None else shift[:, :, None] * basis - back)
    gains = squares[:, :count].clamp_min(0).sqrt()
    if not bool(gains.isfinite().all()) or (kind == "top" and bool((gains[:, 0] <= 0).any())):
        raise ConfigError(
            "the feature does not change with its input, so it has no directions; choose another "
            "layer or noise level"
        )
    return _found(vectors, gains, change, done - 1, shape)


def require_effect(gains: Tensor, counts: Tensor) -> None:
    """`ConfigError` unless each row's first `counts` [B] directions, of the largest `gains` [B,n],
    have an effect on the feature.
    """
    able = (gains > GAIN * gains[:, :1]).sum(1)
    if bool((able < counts.to(able)).any()):
        raise ConfigError(
            f"count={int(counts.max())} directions, but only {int(able.min())} of an image have an "
            "effect on the feature; lower count"
        )


def _orthonormal(vectors: Tensor) -> Tensor:
    """[B,n,q] with orthonormal columns that span the same."""
    return torch.linalg.qr(vectors)[0]


def _found(
    vectors: Tensor, gains: Tensor, change: Tensor, iterations: int, shape: torch.Size
) -> Directions:
    rows = vectors.transpose(1, 2).unflatten(2, shape)
    return Directions(rows.float(), gains.float(), change.float(), iterations)


# -- canonical latents -----------------------------------------------------------------------------
def project(x: Tensor, vectors: Tensor) -> Tensor:
    """`x` [B,*shape] without its part in the span of `vectors` [B,k,*shape], which are orthonormal
    or zero; of the type of `x`.
    """
    flat, v = x.flatten(1).double(), vectors.flatten(2).double()
    inside = (v @ flat[:, :, None]).transpose(1, 2) @ v
    return (flat - inside[:, 0]).reshape(x.shape).to(x.dtype)


def counts_by_energy(gains: Tensor, share: float, most: int) -> Tensor:
    """Of each row the smallest number of directions, int64 [B], that hold `share` of the squared
    `gains` [B,n], at most `most`.
    """
    squares = gains.double().square()
    shares = squares.cumsum(1) / squares.sum(1, keepdim=True)
    return ((shares < share * (1 - 1e-12)).sum(1) + 1).clamp_max(most)


@dataclasses.dataclass(frozen=True)
class Canonicals:
    """Of a batch, on the CPU.

    Attributes:
        images: canonical samples uint8 [B,C,R,R].
        latents: canonical latents float32 [B,*noise_shape].
        features: of them, float32 [B,D], pooled.
        raw_features: of the latents before projection, float32 [B,D].
        counts: directions taken out, int64 [B].
        gains: float32 [B,n], along the directions that were looked at.
        change: float32 [B], as in `Directions`.
    """

    images: Tensor
    latents: Tensor
    features: Tensor
    raw_features: Tensor
    counts: Tensor
    gains: Tensor
    change: Tensor


def check(net: Network, config: Canonical, teacher: str) -> ImageSampler:
    """`net` as what makes images; `ConfigError` naming `teacher`, its URI, where it cannot make
    canonical samples as `config` says.
    """
    sampler = image_sampler(net, teacher)
    if not net.num_classes:
        raise ConfigError(
            f"teacher='{teacher}' knows no classes; canonical samples keep an image's class, so "
            "train it with classes"
        )
    net.check_layer(config.layer)
    sampler.check_sampling(
        Synthesis(teacher=teacher, sigma_min=config.sigma_min, sigma_max=config.sigma)
    )
    size = int(torch.tensor(net.noise_shape).prod())
    if config.vectors > size:
        raise ConfigError(
            f"count={config.vectors} directions, but the teacher's latents have {size} numbers; "
            "lower count"
        )
    return sampler


def canonicals(
    net: Network, config: Canonical, images: Tensor, labels: Tensor, seeds: list[int]
) -> Canonicals:
    """Of `images` uint8 [B,C,R,R] with class indices `labels` int64 [B]; each with a seed of its
    own. Equal for equal batches.
    """
    sampler = check(net, config, str(config.teacher))
    net = net.eval().requires_grad_(False)
    device = next(net.parameters()).device
    levels, layer = ladder(config), net.check_layer(config.layer)
    one_hot = net.one_hot(labels).to(device)
    sigma = levels[-1].to(device, torch.float32).expand(len(images))

    def features(x: Tensor, pooled: bool) -> Tensor:
        return net.features(x.to(torch.float32), sigma, one_hot, layer, pooled)

    with torch.no_grad():
        clean = net.clean(images).to(device)
    state = invert(net, clean, one_hot, levels)
    latent, counts = state, torch.zeros(len(images), dtype=torch.int64)
    gains, change = torch.zeros(len(images), 0), torch.zeros(len(images))
    if config.vectors:
        wide = config.vectors + config.oversample
        noise = seeded_noise(seeds, (wide, *net.noise_shape)).to(device)
        found = directions(
            lambda x: features(x, pooled=False),
            state,
            noise,
            config.vectors,
            kind=config.directions,
            iterations=config.iterations,
            tolerance=config.tolerance,
        )
        counts = torch.full((len(images),), config.vectors)
        if config.count == "energy":
            counts = counts_by_energy(found.gains, config.energy, config.energy_most).cpu()
        if config.directions == "top":
            require_effect(found.gains.cpu(), counts)
        used = torch.arange(config.vectors) < counts[:, None]
        mask = used.reshape(*used.shape, 1, 1, 1).to(device)
        latent = project(state, found.vectors * mask)
        gains, change = found.gains.cpu(), found.change.cpu()
    if config.rescale:
        norms = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (state, latent)]
        latent = latent * (norms[0] / norms[1].clamp_min(1e-12))
    with torch.no_grad():
        pooled = [features(x, pooled=True).cpu() for x in (latent, state)]
        ended = decode(net, latent, one_hot, levels, config.guidance)
        samples = sampler.to_images(ended).cpu()
    return Canonicals(samples, latent.float().cpu(), pooled[0], pooled[1], counts, gains, change)
