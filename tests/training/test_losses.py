"""Losses against formulas by hand and sums written out, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray.attacks import pgd
from dra_ray.data import batches
from dra_ray.training import losses
from tests.training.two_workers import on_two


def logits(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(2)
    ]


def test_trades_loss_and_gradients_from_its_formula() -> None:
    """L = (1-s) nll + s mean_k(-log p_k) + beta KL(p || q), with gradient through both logits."""
    torch.manual_seed(0)
    y = torch.tensor([0, 2, 1])
    clean, adversarial = logits(3, 4)
    ce, kl = losses.trades(clean, adversarial, y, beta=5.0, label_smoothing=0.1)
    log_p, log_q = (
        clean - clean.logsumexp(1, keepdim=True),
        adversarial - adversarial.logsumexp(1, keepdim=True),
    )
    plain_ce = (-0.9 * log_p[range(3), y] - 0.1 * log_p.mean(1)).mean()
    plain_kl = 5 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    torch.testing.assert_close(ce, plain_ce)
    torch.testing.assert_close(kl, plain_kl)
    ours = torch.autograd.grad(ce + kl, (clean, adversarial), retain_graph=True)
    for mine, plain in zip(
        ours, torch.autograd.grad(plain_ce + plain_kl, (clean, adversarial)), strict=True
    ):
        torch.testing.assert_close(mine, plain)
        assert plain.abs().max() > 0


def test_smoothed_targets_sum_to_one() -> None:
    """The gradient of the smoothed cross-entropy is softmax minus target; both sum to 1 over the
    classes.
    """
    z = logits(5, 7)[0]
    y = torch.tensor([0, 6, 3, 3, 1])
    ce, _ = losses.trades(z, z.detach(), y, beta=0.0, label_smoothing=0.1)
    target = F.softmax(z, 1) - 5 * torch.autograd.grad(ce, z)[0]
    torch.testing.assert_close(target.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(target, 0.9 * F.one_hot(y, 7).double() + 0.1 / 7)


def plain_ikl(
    clean: Tensor, adversarial: Tensor, labels: Tensor, weights: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Every pair of classes, one by one."""
    batch, classes = clean.shape
    pairs = clean.new_zeros(())
    for i in range(batch):
        for j in range(classes):
            for k in range(classes):
                gap = (clean[i, j] - clean[i, k]) - (adversarial[i, j] - adversarial[i, k])
                pairs = pairs + weights[i, j] * weights[i, k] * gap**2
    soft = -(F.softmax(clean, 1).detach() * F.log_softmax(adversarial, 1)).sum() / batch
    ce = -F.log_softmax(clean, 1)[range(batch), labels].mean()
    return ce, alpha * soft + beta / (4 * batch) * pairs


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_ikl_is_its_double_sum(scale: float) -> None:
    """Value and gradients; the identity holds for weights of any sum, and far from 0, where squares
    would cancel.
    """
    clean, adversarial = logits(3, 5)
    y = torch.tensor([4, 0, 2])
    weights = scale * F.softmax(
        torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 1
    )
    for shift in (0.0, 1000.0):
        ours = losses.ikl(clean + shift, adversarial, y, weights, alpha=4.0, beta=20.0)
        plain = plain_ikl(clean + shift, adversarial, y, weights, alpha=4.0, beta=20.0)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)
        for mine, theirs in zip(
            torch.autograd.grad(sum(ours), (clean, adversarial)),
            torch.autograd.grad(sum(plain), (clean, adversarial)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_ikl_sends_gradient_where_it_should() -> None:
    clean, adversarial = logits(4, 6)
    y, weights = torch.tensor([0, 1, 2, 3]), torch.full((4, 6), 1 / 6, dtype=torch.float64)
    _, soft = losses.ikl(clean, adversarial, y, weights, alpha=1.0, beta=0.0)
    to_clean, to_adversarial = torch.autograd.grad(
        soft, (clean, adversarial), allow_unused=True, materialize_grads=True
    )
    assert to_clean.abs().max() == 0, "the target of the soft cross-entropy is a constant"
    torch.testing.assert_close(
        to_adversarial, (F.softmax(adversarial, 1) - F.softmax(clean, 1)) / 4
    )
    _, pairs = losses.ikl(clean, adversarial, y, weights, alpha=0.0, beta=1.0)
    to_clean, to_adversarial = torch.autograd.grad(pairs, (clean, adversarial))
    torch.testing.assert_close(to_clean, -to_adversarial)
    assert to_clean.abs().max() > 0


def test_class_means_are_those_of_the_epoch_before() -> None:
    means = losses.ClassMeans(4)
    generator = torch.Generator().manual_seed(0)
    probabilities, y = (
        F.softmax(torch.randn(30, 4, generator=generator), 1),
        torch.randint(3, (30,), generator=generator),
    )
    assert torch.equal(means.weights(y), torch.full((30, 4), 0.25))
    for part in torch.arange(30).split(8):
        means.add(probabilities[part], y[part])
        assert torch.equal(means.weights(y), torch.full((30, 4), 0.25)), (
            "means change at the end of an epoch only"
        )
    means.end_epoch()
    for label in range(3):
        torch.testing.assert_close(
            means.weights(torch.tensor([label]))[0], probabilities[y == label].mean(0)
        )
    assert torch.equal(means.means[3], torch.full((4,), 0.25)), (
        "a class that was not seen keeps its row"
    )
    means.add(probabilities[y == 1], y[y == 1])
    kept = means.means[0].clone()
    means.end_epoch()
    assert torch.equal(means.means[0], kept)
    torch.testing.assert_close(means.means[1], probabilities[y == 1].mean(0))


def test_class_means_resume_in_mid_epoch() -> None:
    probabilities, y = (
        F.softmax(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), 1),
        torch.arange(12) % 5,
    )
    whole, first, second = (losses.ClassMeans(5) for _ in range(3))
    for means in (whole, first):
        means.add(probabilities[:7], y[:7])
    second.load_state_dict(first.state_dict())
    for means in (whole, second):
        means.add(probabilities[7:], y[7:])
        means.end_epoch()
    assert torch.equal(whole.means, second.means)
    assert not whole.totals.any()


STEPS, BATCH, PARTS = 100, 7, 4  # slices of unequal lengths


def mean_losses(rank: int) -> Tensor:
    """[11,P]: a worker's means of the same steps, saved after none of them or after every k-th."""
    mine = batches.part_of(BATCH, rank, 2)
    steps = torch.randn(STEPS, PARTS, generator=torch.Generator().manual_seed(rank)) + 2
    means = []
    for every in (STEPS + 1, *range(1, 11)):
        sums = losses.LossSums(PARTS)
        for number, parts in enumerate(steps, 1):
            sums.add(parts)
            if number % every == 0:
                sums.agree(mine, BATCH)
        means.append(sums.mean(STEPS, mine, BATCH))
    return torch.stack(means)


def test_a_mean_loss_does_not_tell_when_checkpoints_were_written() -> None:
    first, second = on_two(mean_losses)
    assert torch.equal(first, second)
    assert torch.equal(first, first[:1].expand_as(first))


def test_the_margin_is_that_of_the_runner_up() -> None:
    z = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0], [1.0, 2.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 2, 1])
    loss = pgd.margin(z, y)
    assert loss.item() == -1.5, "2.5 - 3 and 1 - 2; the second is misclassified"
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.tolist() == [[-1, 0, 1], [0, 0, 0], [1, -1, 0]]


def test_alignment_is_one_minus_the_cosine() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    torch.testing.assert_close(losses.alignment(a, b), torch.tensor((0.0 + 1.0) / 2))
