"""How a student is made cheaper to attack: folded, rearranged, in bfloat16; and rows of a batch
computed without the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

LEVELS = ("reference", "fast", "screen")  # of config.Evaluation.level
LEAST_ROWS = 2  # one row takes other kernels: a matrix-vector product
PARTS = 16  # sizes of part batches are multiples of a sixteenth of the batch


def prepare(student: nn.Module, level: str, device: torch.device | str) -> nn.Module:
    """A frozen copy of `student` in eval mode on `device`, which computes the same function faster.

    `fast` and `screen`: a BatchNorm that follows a convolution with nothing between is folded into
    it, and weights are channels_last. `screen` also computes in bfloat16 where the device has it.
    `reference`: frozen only, the same bits.
    """
    device = torch.device(device)
    ours = copy.deepcopy(student)
    # what `training.arithmetic` sets there is bound to the original
    for name in ("with_features", "with_map"):
        ours.__dict__.pop(name, None)
    ours = ours.eval().requires_grad_(False).to(device)
    if level == "reference":
        return ours
    fold(ours)
    ours = ours.to(memory_format=torch.channels_last)
    return InBfloat16(ours, device) if level == "screen" and has_bfloat16(device) else ours


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; a CPU without such instructions emulates it,
    very slowly.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class InBfloat16(nn.Module):
    """Convolutions and matrix products in bfloat16; the logits are float32."""

    def __init__(self, inner: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner, self.kind = inner, device.type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.kind, torch.bfloat16):
            logits: Tensor = self.inner(x)
        return logits.float()


# -- folding ---------------------------------------------------------------------------------------
class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(
            m, module_qualified_name
        )


def fold(model: nn.Module) -> int:
    """Fold BatchNorms of `model`, in eval mode, into the convolutions right before them, in place;
    returns how many.

    Only where that is exact: the convolution's output goes nowhere else, and either module is
    called once. A model whose graph cannot be traced (its flow depends on data) stays as it is.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the model's own code does with a symbol
        return 0
    modules = {node: str(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = list(modules.values())
    folded = 0
    for node, after in modules.items():
        source = node.args[0] if node.args else None
        before = (
            modules.get(source) if isinstance(source, fx.Node) and len(source.users) == 1 else None
        )
        if before is None or calls.count(before) + calls.count(after) != 2:
            continue
        convolution, norm = model.get_submodule(before), model.get_submodule(after)
        if (
            isinstance(norm, nn.BatchNorm2d)
            and norm.track_running_stats
            and type(convolution) is nn.Conv2d
        ):
            _replace(model, before, fuse_conv_bn_eval(convolution, norm).requires_grad_(False))
            _replace(model, after, nn.Identity())
            folded += 1
    return folded


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# -- rows without their batch ----------------------------------------------------------------------
class Rows:
    """Logits of some rows of a batch without computing the others; with `exact`, to the bit what
    the whole batch gives.

    That a row's logits do not depend on the rest of its batch is a property of the kernels. So with
    `exact`, the first time that a batch size comes up, both ways are computed and compared; sizes
    that disagree are not used together again.
    """

    def __init__(self, student: Callable[[Tensor], Tensor], exact: bool) -> None:
        self.student, self.exact = student, exact
        self.computed = 0  # rows given to the student
        self._agreeing: set[int] = set()
        self._refused: set[tuple[int, int]] = set()

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Logits [m,K] of rows `chosen` int64 [m], m > 0, of x [n,...]."""
        if len(chosen) == len(x):
            return self._compute(x)
        if not self.exact:
            return self._compute(x[chosen])
        whole, part = len(x), _size(len(chosen), len(x))
        if part >= whole or (whole, part) in self._refused:
            return self._compute(x)[chosen]
        padded = torch.cat([chosen, chosen[:1].expand(part - len(chosen))])
        logits = self._compute(x[padded])
        if {whole, part} <= self._agreeing:
            return logits[: len(chosen)]
        return self._compared(x, padded, logits)[: len(chosen)]

    def _compared(self, x: Tensor, padded: Tensor, logits: Tensor) -> Tensor:
        whole, sizes = self._compute(x)[padded], {len(x), len(padded)}
        if not torch.equal(whole, logits):
            self._refused.add((len(x), len(padded)))
        elif not self._agreeing or sizes & self._agreeing:
            self._agreeing |= sizes
        return whole

    def _compute(self, x: Tensor) -> Tensor:
        self.computed += len(x)
        return self.student(x)


def _size(rows: int, batch: int) -> int:
    """`rows` rounded up to a multiple of a sixteenth of the batch: few sizes, each checked once."""
    step = max(batch // PARTS, 1)
    return max(-(-rows // step) * step, LEAST_ROWS)
