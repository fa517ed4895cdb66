"""Students made of timm networks: any timm model by its name, and the ViT for small images of Wu et
al. (AAAI 2025).

Importing this module imports timm, which takes seconds; `models.build` does so only where a name
asks for it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.students.student import Normalise, Student

# width, depth and heads of the usual sizes (Touvron et al., arXiv 2012.12877; Dosovitskiy et al.,
# arXiv 2010.11929)
VIT_SIZES = {"t": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12)}


class Backbone(Student):
    """`net` is any timm model whose classifier is one linear layer; its state-dict keys get the
    prefix `net.`.
    """

    def __init__(self, net: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.net = net
        last = net.get_classifier()
        self.feature_dim = last.in_features
        self.classifier = next(
            f"net.{name}." for name, module in net.named_modules() if module is last
        )

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.forward_head(
            self.net.forward_features(self.normalise(x)), pre_logits=True
        )
        return self.net.get_classifier()(features), features

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of any student; patch tokens where they lie in the image, without prefix tokens."""
        tokens = self.net.forward_features(self.normalise(x))
        logits = self.net.get_classifier()(self.net.forward_head(tokens, pre_logits=True))
        return logits, self._as_map(tokens)

    def _as_map(self, tokens: Tensor) -> Tensor:
        if tokens.ndim == 3:
            patches = tokens[:, getattr(self.net, "num_prefix_tokens", 0) :]
            side = math.isqrt(patches.shape[1])
            if patches.shape[2] == self.feature_dim and side * side == patches.shape[1]:
                return patches.transpose(1, 2).unflatten(2, (side, side))
        elif tokens.ndim == 4 and tokens.shape[1] == self.feature_dim:
            return tokens
        elif tokens.ndim == 4 and tokens.shape[3] == self.feature_dim:
            return tokens.permute(0, 3, 1, 2)
        return self.feature_map(tokens)  # it has none, which this says


class Named(Backbone):
    """A network that timm knows by its name, so that it can convert weights for it."""

    def converted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under other projects' names (Facebook's ConvNeXt and DINOv3, say) or with
        position embeddings of another size, as timm converts them for this network; as they are
        where timm cannot.
        """
        module = sys.modules[type(self.net).__module__]
        filters = (getattr(module, name, None) for name in ("checkpoint_filter_fn", "_filter_fn"))
        convert = next((each for each in filters if each), None)
        if convert is None:
            return weights
        arguments = (weights, self.net)[: len(inspect.signature(convert).parameters)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it tries
                return dict(convert(*arguments))
        except Exception:  # weights of another network, which the caller names by their keys
            return weights


def named(name: str, shape: Shape, mean: Sequence[float], std: Sequence[float]) -> Backbone:
    """The timm model `name`, such as `vit_base_patch16_dinov3` or `convnext_base`, never with
    weights: nothing is downloaded.

    It is built for the images' size where it depends on one. Raises `ConfigError` where it is
    unknown or does not fit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(
            f"model.name='timm/{name}' is not known to timm {timm.__version__}; "
            + (
                f"did you mean {' or '.join(f'timm/{other}' for other in close)}?"
                if close
                else "timm.list_models() lists its names"
            )
        )
    net: Any
    settings: dict[str, Any] = {
        "pretrained": False,
        "num_classes": shape.num_classes,
        "in_chans": shape.channels,
    }
    try:
        try:
            net = timm.create_model(name, img_size=shape.resolution, **settings)
        except TypeError:  # a convolutional net takes any size and no such argument
            net = timm.create_model(name, **settings)
        if not isinstance(net.get_classifier(), nn.Linear):
            raise ValueError(
                f"it ends in {type(net.get_classifier()).__name__}, not in one linear layer over "
                "features"
            )
        student = Named(net, mean, std)
        with (
            torch.no_grad()
        ):  # a net may shrink images by more than they have pixels; only running it shows that
            student.eval().with_features(
                torch.zeros(1, shape.channels, shape.resolution, shape.resolution)
            )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        size = f"{shape.channels}x{shape.resolution}x{shape.resolution}"
        raise ConfigError(
            f"model.name='timm/{name}' cannot take {size} images ({reason}); choose another model "
            "or data.resolution"
        ) from None
    return student.train()


def vit(
    size: str,
    patch: int,
    pooling: Literal["patches", "all-tokens"],
    shape: Shape,
    mean: Sequence[float],
    std: Sequence[float],
) -> Backbone:
    """vit-size-patch: pre-LN blocks with LayerScale and tanh-GELU; a class token, which has no
    position, goes along.

    The feature is the LayerNorm of the mean of the patch tokens ("patches"), or the mean, class
    token included, of the LayerNorms of all tokens ("all-tokens"). With "b" and patch 2 at 32x32 it
    is the network of Wu et al. (AAAI 2025), as public code that matches their paper has it
    (reference weights are not published).
    """
    width, depth, heads = VIT_SIZES[size]
    if shape.resolution % patch:
        raise ConfigError(
            f"model.name='vit-{size}-{patch}': images of {shape.resolution} pixels do not divide "
            f"into patches of {patch}; change either"
        )
    net = VisionTransformer(
        img_size=shape.resolution,
        patch_size=patch,
        in_chans=shape.channels,
        num_classes=shape.num_classes,
        global_pool="avg",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        init_values=1e-4,
        no_embed_class=True,
        fc_norm=pooling == "patches",
        pool_include_prefix=pooling == "all-tokens",
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),
    )
    _spread(net)
    return Backbone(net, mean, std)


def _spread(net: VisionTransformer) -> None:
    """Weights, class token and positions from N(0, 0.02^2) cut at two deviations, as JAX's
    initialiser does; biases 0.
    """
    draw = functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    assert net.cls_token is not None
    assert net.pos_embed is not None
    draw(net.cls_token)
    draw(net.pos_embed)
