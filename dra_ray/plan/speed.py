"""What a device sustains: measured here in a second, or a share of a published peak.

Both are estimates: a training step is not one matrix product.
"""

from __future__ import annotations

import dataclasses
import re
import time
from importlib import resources

import torch
from pydantic import Field, model_validator

from dra_ray.config import Frozen, validate
from dra_ray.config.text import parse
from dra_ray.errors import ConfigError, nearest
from dra_ray.storage import Store

_OTHER_CARDS = frozenset({"pcie", "nvl", "mig"})  # slower than the card of the same number


class Gpu(Frozen):
    """A card: dense peaks in TFLOP/s, memory in GB (10^9 bytes), price of an hour."""

    fp32: float = Field(gt=0)
    bf16: float = Field(gt=0)
    tf32: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    price: float = Field(ge=0)


class Instance(Frozen):
    """What a cloud rents: the list price of an hour, the share of it that it costs on spot
    (default: the table's), and its GPUs' name in the table.
    """

    price: float = Field(ge=0)
    spot: float | None = Field(None, gt=0, le=1)
    gpu: str | None = None


class Table(Frozen):
    """`gpus.yaml`: cards and instances by name, and what is guessed and priced."""

    utilisation: float = Field(gt=0, le=1)
    currency: str
    cpu_hour: float = Field(ge=0)
    spot: float = Field(0.5, gt=0, le=1)
    gpus: dict[str, Gpu]
    instances: dict[str, Instance] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _knows_the_gpus(self) -> Table:
        for name, instance in self.instances.items():
            if instance.gpu is not None and instance.gpu not in self.gpus:
                raise ValueError(
                    f"instances.{name}.gpu={instance.gpu!r} is not in gpus; "
                    f"{nearest(instance.gpu, self.gpus)}"
                )
        return self

    def gpu(self, name: str) -> Gpu:
        """By its name in the table, also within a longer one, such as 'NVIDIA A100-SXM4-80GB'.

        A card for a PCIe slot or of another edition is slower than the one in the table.
        """
        words = re.split(r"[^a-z0-9]+", name.lower())
        known = [word for word in words if word in self.gpus]
        if name.lower() in self.gpus:
            known = [name.lower()]
        elif len(known) != 1 or not _OTHER_CARDS.isdisjoint(words):
            raise ConfigError(f"--gpu {name}: unknown; {nearest(name.lower(), self.gpus)}")
        return self.gpus[known[0]]


@dataclasses.dataclass(frozen=True)
class Speed:
    """TFLOP/s that one GPU, or one CPU thread, sustains, and where the number comes from."""

    tflops: float
    source: str


def table(file: str | None = None) -> Table:
    """The packaged table, or a user's; `ConfigError` names the field that is wrong."""
    if file is None:
        text = (resources.files("dra_ray.plan") / "gpus.yaml").read_text()
    else:
        text = Store(file).read_text()
    source = file or "gpus.yaml"
    tree = parse(text, source).value
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected fields such as 'gpus'; start from the packaged file")
    return validate(Table, tree, source)


def of_gpu(name: str, known: Table, precision: str = "fp32") -> Speed:
    """The stated share of a card's published peak at a `compute.precision`."""
    peak = getattr(known.gpu(name), precision)
    return Speed(
        known.utilisation * peak,
        f"{known.utilisation:.0%} (a guess) of the {peak:g} TFLOP/s that {name.upper()} has in "
        f"{precision}",
    )


def measured(device: str = "cpu", seconds: float = 0.7, side: int = 768) -> Speed:
    """A float32 matrix product, again and again, on one GPU, or on one CPU thread, by the time that
    it computes: others on the machine are not part of it.
    """
    clock = time.thread_time if device == "cpu" else time.monotonic
    side = side if device == "cpu" else 8 * side
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end or not best:
            start = clock()
            (a @ b).sum().item()
            best = max(best, 2 * side**3 / max(clock() - start, 1e-9))
    finally:
        torch.set_num_threads(threads)
    what = "one CPU thread" if device == "cpu" else "the GPU"
    return Speed(best / 1e12, f"measured on this machine: a float32 matrix product on {what}")
