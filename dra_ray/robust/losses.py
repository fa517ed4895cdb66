"""Losses over logits and features; each is one short callable over tensors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """TRADES (Zhang et al. 2019, equation 5) in DM-AT's form: returns (cross-entropy, beta * KL(clean || adversarial)).

    clean, adversarial: logits [B,K], both receive gradient; smoothing applies to the cross-entropy only.
    """
    cross_entropy = F.cross_entropy(clean, labels, label_smoothing=label_smoothing)
    divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
    return cross_entropy, beta * divergence


def alignment(projected: Tensor, teacher: Tensor) -> Tensor:
    """DRA (arXiv 2602.19931, equation 3): mean over the batch of 1 - cos(projected, teacher), both [B,D]."""
    return (1 - F.cosine_similarity(projected, teacher, dim=1)).mean()
