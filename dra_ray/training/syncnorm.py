"""BatchNorm over the images of all workers, on any device and backend (torch's own SyncBatchNorm
refuses the CPU).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dra_ray.errors import ConfigError
from dra_ray.training import workers

Net = TypeVar("Net", bound=nn.Module)
IMAGE = (0, 2, 3)


def synchronised(net: Net) -> Net:
    """`net` itself, its BatchNorm layers replaced by synchronised ones with the same parameters,
    buffers and names.

    With one worker nothing changes. Raises `ConfigError` where a layer is of a kind that cannot be
    replaced.
    """
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _synchronised(child))
            elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(
                child, SynchronisedBatchNorm2d
            ):
                kind = type(child).__name__
                raise ConfigError(
                    f"compute.sync_batchnorm=true: this student has {kind}, which cannot be "
                    "synchronised; set it to false"
                )
    return net


class SynchronisedBatchNorm2d(nn.SyncBatchNorm, nn.BatchNorm2d):
    """In train mode: mean and variance over the images of all workers, whose numbers may differ.
    Otherwise `nn.BatchNorm2d`.

    All workers must call it, and differentiate it, in the same order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or workers.count() == 1:
            return nn.BatchNorm2d.forward(self, x)
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)
        out, mean, var, count = _OverAllWorkers.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, var * count / (count - 1))
        return out

    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


def _synchronised(norm: nn.BatchNorm2d) -> SynchronisedBatchNorm2d:
    made = SynchronisedBatchNorm2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        device="meta",
    )
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var, made.num_batches_tracked = (
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
    )
    return made.train(norm.training)


class _OverAllWorkers(torch.autograd.Function):
    """(x [B,C,H,W], weight, bias, eps) -> (normalised x, mean [C], biased variance [C], values per
    channel [1]), of all workers.

    Its gradient of x is that of the sum of all workers' losses; those of weight and bias are this
    worker's share of it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(exact, IMAGE, correction=0)
        means, variances, counts = _gather(mean, var, mean.new_tensor([x.numel() // x.shape[1]]))
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        # the mean of the variances plus the variance of the means: no difference of large squares
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, total)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        exact, grad = x.to(mean.dtype), grad.to(mean.dtype)
        normalised = F.batch_norm(exact, mean, var, None, None, False, 0.0, ctx.eps)
        grad_bias, grad_weight = grad.sum(IMAGE), (grad * normalised).sum(IMAGE)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = workers.total(torch.cat([grad_bias, grad_weight]))
            mean_grad, mean_product = (sums / total).view(2, 1, -1, 1, 1)
            scale = (var + ctx.eps).rsqrt() if weight is None else weight * (var + ctx.eps).rsqrt()
            grad_x = ((grad - mean_grad - normalised * mean_product) * scale.view(1, -1, 1, 1)).to(
                x.dtype
            )
        return (
            grad_x,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def _gather(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    """Every worker's mean [W,C], variance [W,C] and count [W,1], in one message."""
    return workers.gathered(torch.cat([mean, var, count])).split([len(mean), len(var), 1], 1)
