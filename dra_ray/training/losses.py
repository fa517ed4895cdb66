"""Losses over logits and features; each is one short callable over tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray.training import workers


def trades(
    clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """TRADES (Zhang et al. 2019, equation 5) in DM-AT's form: returns (cross-entropy, beta *
    KL(clean || adversarial)).

    clean, adversarial: logits [B,K], both receive gradient; smoothing applies to the cross-entropy
    only.
    """
    cross_entropy = F.cross_entropy(clean, labels, label_smoothing=label_smoothing)
    divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
    return cross_entropy, beta * divergence


def ikl(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    alpha: float,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Improved KL (Cui et al., arXiv 2305.13948, the first version's form): returns (cross-entropy
    of the clean logits, robust part).

    The robust part is alpha * H(softmax z_n, softmax z_a), whose target is a constant, plus
    beta/(4B) * sum_i sum_jk w_ij w_ik ((z_nj - z_nk) - (z_aj - z_ak))^2, whose gradient reaches
    both logits.

    Args:
        clean, adversarial: logits z_n, z_a [B,K]. weights: w [B,K], the row of each label in the
        class means of the previous epoch (`ClassMeans.weights`).
    """
    cross_entropy = F.cross_entropy(clean, labels, label_smoothing=label_smoothing)
    soft = -(F.softmax(clean, 1).detach() * F.log_softmax(adversarial, 1)).sum(1).mean()
    # the sum over pairs is twice the weighted variance of z_n - z_a times (sum w)^2: K terms
    # instead of K^2
    total = weights.sum(1, keepdim=True)
    difference = clean - adversarial
    centred = difference - (weights * difference).sum(1, keepdim=True) / total
    pairs = 2 * (total * weights * centred**2).sum(1)
    return cross_entropy, alpha * soft + beta / 4 * pairs.mean()


class ClassMeans(nn.Module):
    """Mean distribution of every class over an epoch; the means of the epoch before weight IKL's
    pairs.

    Sums go over all workers at every step, so the state of any worker is that of all.
    """

    means: Tensor
    totals: Tensor

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.register_buffer(
            "means", torch.full((num_classes, num_classes), 1 / num_classes, device=device)
        )
        self.register_buffer(
            "totals", torch.zeros((num_classes, num_classes + 1), device=device)
        )  # sums, and counts in the last column

    def weights(self, labels: Tensor) -> Tensor:
        """Rows of the means, float32 [B,K], for labels int64 [B]; 1/K in the first epoch."""
        return self.means[labels]

    @torch.no_grad()
    def add(self, distributions: Tensor, labels: Tensor) -> None:
        """Count a batch in: distributions [B,K], softmax(z_n/T), and their labels int64 [B]."""
        members = F.one_hot(labels, len(self.means)).to(self.totals)
        # a product, since scattered additions on a GPU have no fixed order
        part = members.T @ torch.cat(
            [distributions.to(self.totals), members.new_ones(len(labels), 1)], 1
        )
        self.totals += workers.total(part)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """The sums become the means, and start anew; a class that was not seen keeps its row."""
        sums, counts = self.totals[:, :-1], self.totals[:, -1:]
        self.means.copy_(torch.where(counts > 0, sums / counts, self.means))
        self.totals.zero_()


class LossSums:
    """A loss and its parts, summed over the steps since the last row that shows them.

    A checkpoint is worker 0's, so at one all workers take over the mean of their sums. In float64,
    since a run's rows may not tell after which steps that was: rounded to float32 they are equal.
    """

    def __init__(self, parts: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(parts, dtype=torch.float64, device=device)

    def add(self, parts: Tensor) -> None:
        """Count in what a step gave, [P], of this worker's slice."""
        self.sums += parts

    def agree(self, mine: slice, batch: int) -> None:
        """Every worker's sums become those of the whole batches."""
        self.sums.copy_(of_batch(self.sums, mine, batch))

    def mean(self, steps: int, mine: slice, batch: int) -> Tensor:
        """Means of whole batches over so many steps, float32 [P], the same for all workers."""
        return (of_batch(self.sums, mine, batch) / steps).float()

    def clear(self) -> None:
        self.sums.zero_()


def of_batch(parts: Tensor, mine: slice, batch: int) -> Tensor:
    """The batch's mean of what each worker has for its slice, the same for all workers."""
    return workers.total(parts * ((mine.stop - mine.start) / batch))


def alignment(projected: Tensor, teacher: Tensor) -> Tensor:
    """DRA (arXiv 2602.19931, equation 3): mean over the batch of 1 - cos(projected, teacher), both
    [B,D]; with tokens [B,N,D] over batch and positions, as in REPA (arXiv 2410.06940).
    """
    return (1 - F.cosine_similarity(projected, teacher, dim=-1)).mean()


def info_nce(projected: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748) of cosines over a temperature: cross-entropy
    of finding each row's own target among the targets of the whole batch, [b,D] each.

    The mean over workers' slices is that of one worker: others' targets need no gradient.
    """
    among, first = workers.joined(F.normalize(teacher, dim=1))
    scores = F.normalize(projected, dim=1) @ among.T / temperature
    own = torch.arange(first, first + len(projected), device=scores.device)
    return F.cross_entropy(scores, own)


def supervised_contrast(
    anchors: Tensor, labels: Tensor, targets: Tensor, target_labels: Tensor, temperature: float
) -> Tensor:
    """Supervised contrast (Khosla et al., arXiv 2004.11362, equation 2) of unit rows: for each
    anchor [b,D] the mean over the targets [c,D] of its class, of all workers, of -log softmax of
    their cosines over a temperature; the mean over the anchors that have any, 0 where none has.

    Targets get no gradient. The mean over workers' slices is that of one worker.
    """
    everyone, classes = (workers.joined(each)[0] for each in (targets.detach(), target_labels))
    total, able = _contrasted(
        anchors @ everyone.T / temperature, labels[:, None] == classes[None], None
    )
    able, rows = workers.total(torch.stack([able, able.new_tensor(len(labels))])).tolist()
    return total * (rows / max(able, 1) / len(labels))


def clustering(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrast of unit rows [b,D] of all workers with each other, the same value for all
    workers; gradients reach all rows.
    """
    everyone, first = workers.joined(rows.detach())
    classes, _ = workers.joined(labels)
    whole = torch.cat([everyone[:first], rows, everyone[first + len(rows) :]])
    itself = torch.eye(len(whole), dtype=torch.bool, device=rows.device)
    same = (classes[:, None] == classes[None]) & ~itself
    total, able = _contrasted(whole @ whole.T / temperature, same, itself)
    loss = total / able.clamp_min(1)
    # gradients are means over workers by the size of their slices
    return loss.detach() + len(whole) / len(rows) * (loss - loss.detach())


def _contrasted(scores: Tensor, same: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the sum over anchors with positives, how many these are); scores and `same`, which says what
    is positive, are [anchors,targets]. Hidden pairs do not take part.
    """
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    positives = same.sum(1)
    chances = scores.log_softmax(1).masked_fill(~same, 0)
    return -(chances.sum(1) / positives.clamp_min(1)).sum(), (positives > 0).sum()


def cka(projected: Tensor, teacher: Tensor) -> Tensor:
    """1 - linear CKA (Kornblith et al., arXiv 1905.00414) of projected [b,k] and teacher [b,D] over
    the whole batch, the same value for all workers.
    """
    images = workers.total(projected.new_tensor(float(len(projected))))
    weight = images / len(projected)  # gradients are means over workers by the size of their slices

    def centred(rows: Tensor) -> Tensor:
        return rows - workers.total(rows.detach().sum(0)) / images

    x, y = centred(projected), centred(teacher)
    # the centres need no gradient: it cancels, since the rows of x and y sum to zero
    across, own, theirs = (_summed(a.T @ b, weight).norm() for a, b in ((x, y), (x, x), (y, y)))
    return 1 - across**2 / (own * theirs).clamp_min(1e-12)


def _summed(local: Tensor, weight: Tensor) -> Tensor:
    """The sum over all workers, whose gradient reaches this worker's part."""
    return workers.total(local.detach()) + weight * (local - local.detach())
