"""A diffusion encoder as a student, trained end to end (arXiv 2602.19931, section 5.6): the
teacher's network up to its feature layer without a class, the mean over positions, and a linear
layer. That it sees images without noise, at one noise level, is a guess (UNVERIFIED).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.students.student import Normalise, Student
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import UNetEncoder
from dra_ray.teachers.network import Network


class DiffusionStudent(Student):
    """`net` at noise level `sigma`; what it computes after `layer` is dropped where it can be.

    Raises `ConfigError` for a network that sees latents or images of another shape, and for an
    unknown layer or noise level.
    """

    classifier = "head."

    def __init__(self, net: Network, shape: Shape, sigma: float, layer: str | None) -> None:
        super().__init__()
        theirs, ours = ((of.channels, of.resolution, of.resolution) for of in (net, shape))
        if theirs != ours or net.noise_shape != theirs:
            seen = f"images of {theirs}" if net.noise_shape == theirs else "latents"
            raise ConfigError(
                f"model.name: the teacher is of kind '{net.kind}' and sees {seen}, but the data "
                f"has images of {ours} (channels, height, width); give a teacher of such pixels"
            )
        net.check_sigma(torch.tensor([sigma], device="cpu"))
        self.sigma = sigma
        try:
            self.layer = net.check_layer(layer)
        except ConfigError as error:
            raise ConfigError(str(error).replace("teacher.layer", "model.layer")) from None
        if isinstance(net, UNetEncoder):
            net.model.cut_after(self.layer)
        self.net = net
        self.feature_dim = net.feature_dim(self.layer)
        half = (0.5,) * shape.channels
        self.normalise = Normalise(half, half)  # to the [-1,1] that diffusion networks see
        self.head = nn.Linear(self.feature_dim, shape.num_classes)

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self._features(x, pooled=True)
        return self.head(features), features

    def feature_map(self, x: Tensor) -> Tensor:
        return self._features(x, pooled=False)

    def _features(self, x: Tensor, pooled: bool) -> Tensor:
        levels = torch.full((len(x),), self.sigma, device=x.device)
        return self.net.features(self.normalise(x), levels, None, self.layer, pooled)


def of_teacher(uri: str, shape: Shape, sigma: float, layer: str | None) -> DiffusionStudent:
    """The network of the teacher at `uri` with fresh weights; reads its card alone. Raises
    `CheckpointError` where there is none.
    """
    net = checkpoint.build(checkpoint.read_card(Store(uri)), uri)
    return DiffusionStudent(net, shape, sigma, layer)


def load_teacher(student: DiffusionStudent, uri: str) -> str:
    """Give the student the teacher's weights; a sentence that says so."""
    weights = checkpoint.load(Store(uri)).state_dict()
    student.net.load_state_dict({name: weights[name] for name in student.net.state_dict()})
    return f"the diffusion encoder at '{uri}', with a new last layer"
