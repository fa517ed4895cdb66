"""Sparse autoencoders: what is known of features made of few directions, and each part by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import optimize

from dra_ray.errors import DataError
from dra_ray.inspection import sae

SMALL = sae.Settings(k=3, width=24, steps=400, batch=128, lr=3e-3, dead_images=10_000, revived=8)


def sparse(count: int, seed: int = 1) -> torch.Tensor:
    """Features [N,12] of 3 of 16 unit directions each, around a mean."""
    draws = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(16, 12, generator=draws), dim=1)
    draws = torch.Generator().manual_seed(seed)
    latents = 1 + torch.rand(count, 16, generator=draws)
    chosen = torch.rand(count, 16, generator=draws).topk(3, dim=1).indices
    return torch.zeros(count, 16).scatter(1, chosen, latents.gather(1, chosen)) @ directions + 2


def test_more_latents_rebuild_more_of_what_they_have_not_seen() -> None:
    train, held_out = sparse(2000), sparse(500, seed=2)
    found = [
        sae.quality(sae.train(train, dataclasses.replace(SMALL, k=k)), held_out) for k in (1, 3, 6)
    ]
    assert found[0].error > found[1].error > found[2].error
    assert found[0].error < 1
    assert found[2].error < 0.2
    assert all(each.used <= k for each, k in zip(found, (1, 3, 6), strict=True))
    assert all(each.relative_error < each.error for each in found)  # the mean is far from zero


def test_equal_arguments_give_equal_weights() -> None:
    train = sparse(300)
    few = dataclasses.replace(SMALL, steps=20)
    one, two, other = (sae.train(train, few, seed) for seed in (0, 0, 1))
    assert torch.equal(one.decoder, two.decoder)
    assert not torch.equal(one.decoder, other.decoder)


def test_columns_keep_their_length_and_a_step_does_not_pull_along_them() -> None:
    net = sae.train(sparse(300), dataclasses.replace(SMALL, steps=20))
    assert torch.allclose(net.decoder.norm(dim=1), torch.ones(24), atol=1e-6)
    net.decoder.requires_grad_(True)
    net(sparse(50)).square().sum().backward()
    assert net.decoder.grad is not None
    assert (net.decoder.grad * net.decoder).sum(1).abs().max() > 1e-3
    net.project()
    assert (net.decoder.grad * net.decoder).sum(1).abs().max() < 1e-3


def test_a_reconstruction_is_the_k_largest_latents_directions() -> None:
    net, x = sae.train(sparse(300), dataclasses.replace(SMALL, steps=20)), sparse(7, seed=3)
    weights = {name: p.double().numpy() for name, p in net.named_parameters()}
    for row, rebuilt in zip(x.double().numpy(), net(x).double().numpy(), strict=True):
        latents = weights["encoder"] @ (row - weights["centre"]) + weights["bias"]
        largest = np.argsort(-latents)[:3]
        by_hand = weights["centre"] + sum(
            max(latents[i], 0) * weights["decoder"][i] for i in largest
        )
        assert np.allclose(rebuilt, by_hand, atol=1e-4)


def test_errors_are_shares_of_the_variance_and_of_the_length() -> None:
    net, x = sae.train(sparse(300), dataclasses.replace(SMALL, steps=20)), sparse(60, seed=3)
    found, rows, rebuilt = sae.quality(net, x), x.double().numpy(), net(x).double().numpy()
    rest = ((rebuilt - rows) ** 2).sum(1)
    assert found.error == pytest.approx(rest.mean() / rows.var(0).sum(), rel=1e-4)
    assert found.relative_error == pytest.approx((rest / (rows**2).sum(1)).mean(), rel=1e-4)


def test_the_centre_is_the_geometric_median() -> None:
    rows = torch.cat([sparse(40), sparse(3) + 50])  # a mean would follow the three
    found = sae.median(rows).double().numpy()
    x = rows.double().numpy()
    best = optimize.minimize(lambda c: np.linalg.norm(x - c, axis=1).sum(), x.mean(0))
    assert np.linalg.norm(x - found, axis=1).sum() == pytest.approx(best.fun, rel=1e-4)


def test_what_is_left_over_teaches_the_dead_latents_alone() -> None:
    net, x = sae.train(sparse(300), dataclasses.replace(SMALL, steps=5)), sparse(50, seed=3)
    net.requires_grad_(True)
    dead = torch.arange(24) < 10
    latents, rest = net.before(x), (x - net(x)).detach()
    loss = sae._left_over(net, latents, rest, dead, SMALL)
    weights, values = net.decoder.detach().double().numpy(), latents.detach().double().numpy()
    left = rest.double().numpy()
    rebuilt = np.zeros_like(left)
    for row in range(50):
        for latent in np.argsort(-values[row, :10])[: SMALL.revived]:
            rebuilt[row] += max(values[row, latent], 0) * weights[latent]
    spread = ((left - left.mean(0)) ** 2).mean()
    assert loss.item() == pytest.approx(((rebuilt - left) ** 2).mean() / spread, rel=1e-4)
    loss.backward()
    for learnt in (net.decoder.grad, net.encoder.grad, net.bias.grad[:, None]):
        assert not learnt[~dead].any()
        assert learnt[dead].any()
    assert sae._left_over(net, latents, rest, torch.zeros(24, dtype=torch.bool), SMALL) == 0


def test_what_cannot_be_learnt_is_refused() -> None:
    x = sparse(20)
    with pytest.raises(DataError, match="k=25 must be between 1 and width=24"):
        sae.train(x, dataclasses.replace(SMALL, k=25))
    with pytest.raises(DataError, match="the same for all images"):
        sae.train(torch.ones(20, 4), SMALL)
    with pytest.raises(DataError, match=r"\[20\]; give finite ones"):
        sae.train(x[:, 0], SMALL)
    with pytest.raises(DataError, match="give finite ones"):
        sae.train(x / 0, SMALL)
