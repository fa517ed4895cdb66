"""Students against plain implementations of their papers' formulas, in float64, with weights that a
formula gives.

The golden logits were computed once by the plain implementations, and hold them in turn.
"""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dra_ray import config, students
from dra_ray.data import Shape
from dra_ray.storage import Store
from dra_ray.students.wrn import PreActivationNet

SHAPE = Shape(10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
SMALL = Shape(5, 3, 8, SHAPE.mean, SHAPE.std)
State = dict[str, Tensor]
GOLDEN = {  # logits 0 to 2 of image 0
    "wrn-10-1": [-0.2306393, -0.2195868, -0.5368926],
    "rawrn": [0.4747711, -0.3756790, -0.8254085],
    "relu-wrn-10-1": [0.4409211, -0.7053435, -1.0984993],
    "vit-patches": [-1.9228209, -0.5817997, -0.5432269],
    "vit-all-tokens": [0.5644325, 1.1242384, 0.7571638],
}


def wave(number: int, shape: torch.Size) -> Tensor:
    """sin(0.1 k^2 + number) for k = 0, 1, ...: a chirp, as good as noise and the same
    everywhere.
    """
    k = torch.arange(shape.numel(), dtype=torch.float64)
    return torch.sin(0.1 * k * k + number).view(shape)


def formula_weights(student: students.Student) -> State:
    """Every tensor of a state dict in float64, from its place in the sorted names."""
    state: State = {}
    for number, (key, old) in enumerate(sorted(student.state_dict().items())):
        values = wave(number, old.shape)
        if not old.is_floating_point():
            state[key] = old
        elif old.ndim > 1:
            state[key] = values * (2 / old[0].numel()) ** 0.5
        elif key.endswith((".weight", "running_var", "gamma")):
            state[key] = 1 + 0.4 * values
        else:
            state[key] = 0.3 * values
    return state


def pixels(shape: Shape) -> Tensor:
    return 0.5 + 0.5 * wave(
        100, torch.Size((4, shape.channels, shape.resolution, shape.resolution))
    )


def check(student: students.Student, plain, golden: list[float] | None = None) -> None:
    """`plain(state, x, training)` gives (logits, features); the student must agree in eval and in
    train mode.
    """
    state, x = formula_weights(student), pixels(SMALL)
    student.load_state_dict(state)
    for training in (False, True):
        expected = plain(state, x, training)
        found = student.train(training).with_features(x.float())
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    if golden:
        torch.testing.assert_close(
            plain(state, x, False)[0][0, : len(golden)],
            torch.tensor(golden).double(),
            rtol=1e-5,
            atol=1e-6,
        )


# -- plain implementations -------------------------------------------------------------------------
def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(SHAPE.mean).double().view(3, 1, 1)) / torch.tensor(
        SHAPE.std
    ).double().view(3, 1, 1)


def batchnorm(s: State, name: str, x: Tensor, training: bool) -> Tensor:
    mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
    column = [t.view(1, -1, 1, 1) for t in (mean, var, s[f"{name}.weight"], s[f"{name}.bias"])]
    return (x - column[0]) / torch.sqrt(column[1] + 1e-5) * column[2] + column[3]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def wide_resnet(
    s: State, x: Tensor, training: bool, squeeze: bool = False
) -> tuple[Tensor, Tensor]:
    """DM-AT's network (arXiv 2302.04638), with squeeze-and-excitation after the second convolution
    for RaWRN (arXiv 2308.16258).
    """
    x = F.conv2d(normalised(x), s["init_conv.weight"], padding=1)
    for group in range(3):
        block = 0
        while (name := f"layer.{group}.block.{block}") + ".conv_0.weight" in s:
            active = silu(batchnorm(s, f"{name}.batchnorm_0", x, training))
            stride = 2 if group and not block else 1
            size = active.shape[-1]
            room = torch.zeros(*active.shape[:2], size + 3 - stride, size + 3 - stride).double()
            corner = 2 - stride  # a stride of 2 pads right and bottom only
            room[:, :, corner : corner + size, corner : corner + size] = active
            out = F.conv2d(room, s[f"{name}.conv_0.weight"], stride=stride)
            out = F.conv2d(
                silu(batchnorm(s, f"{name}.batchnorm_1", out, training)),
                s[f"{name}.conv_1.weight"],
                padding=1,
            )
            if squeeze:
                gate = torch.relu(
                    out.mean((2, 3)) @ s[f"{name}.se.fc1.weight"].flatten(1).T
                    + s[f"{name}.se.fc1.bias"]
                )
                gate = 1 / (
                    1
                    + torch.exp(
                        -(gate @ s[f"{name}.se.fc2.weight"].flatten(1).T + s[f"{name}.se.fc2.bias"])
                    )
                )
                out = out * gate[:, :, None, None]
            if f"{name}.shortcut.weight" in s:
                x = torch.einsum(
                    "bchw,oc->bohw",
                    active[:, :, ::stride, ::stride],
                    s[f"{name}.shortcut.weight"][:, :, 0, 0],
                )
            x, block = x + out, block + 1
    features = silu(batchnorm(s, "batchnorm", x, training)).mean((2, 3))
    return features @ s["logits.weight"].T + s["logits.bias"], features


def trades_resnet(s: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """TRADES' network (arXiv 1901.08573): ReLU, even padding."""
    x = F.conv2d(x, s["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        block = 0
        while (name := f"block{group}.layer.{block}") + ".conv1.weight" in s:
            stride = 2 if group > 1 and not block else 1
            active = torch.relu(batchnorm(s, f"{name}.bn1", x, training))
            out = F.conv2d(active, s[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(
                torch.relu(batchnorm(s, f"{name}.bn2", out, training)),
                s[f"{name}.conv2.weight"],
                padding=1,
            )
            if f"{name}.convShortcut.weight" in s:
                x = torch.einsum(
                    "bchw,oc->bohw",
                    active[:, :, ::stride, ::stride],
                    s[f"{name}.convShortcut.weight"][:, :, 0, 0],
                )
            x, block = x + out, block + 1
    features = torch.relu(batchnorm(s, "bn1", x, training)).mean((2, 3))
    return features @ s["fc.weight"].T + s["fc.bias"], features


def layernorm(s: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * s[f"{name}.weight"]
        + s[f"{name}.bias"]
    )


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def vision_transformer(
    s: State, x: Tensor, patch: int, heads: int, all_tokens: bool
) -> tuple[Tensor, Tensor]:
    """The ViT of Wu et al. (AAAI 2025): positions for patches only, LayerScale, tanh-GELU, either
    pooling.
    """
    s = {key.removeprefix("net."): tensor for key, tensor in s.items()}
    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // patch
    cut = (
        x.view(batch, channels, side, patch, side, patch)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, side * side, -1)
    )
    tokens = (
        cut @ s["patch_embed.proj.weight"].flatten(1).T
        + s["patch_embed.proj.bias"]
        + s["pos_embed"]
    )
    tokens = torch.cat([s["cls_token"].expand(batch, 1, -1), tokens], 1)
    width, depth = tokens.shape[-1], 0
    while (name := f"blocks.{depth}") + ".ls1.gamma" in s:
        q, k, v = (
            linear(s, f"{name}.attn.qkv", layernorm(s, f"{name}.norm1", tokens))
            .view(batch, -1, 3, heads, width // heads)
            .unbind(2)
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (width // heads) ** 0.5
        scores = torch.exp(scores - scores.amax(-1, keepdim=True))
        mixed = torch.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdim=True), v).reshape(
            tokens.shape
        )
        tokens = tokens + s[f"{name}.ls1.gamma"] * linear(s, f"{name}.attn.proj", mixed)
        wide = linear(s, f"{name}.mlp.fc1", layernorm(s, f"{name}.norm2", tokens))
        wide = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
        tokens = tokens + s[f"{name}.ls2.gamma"] * linear(s, f"{name}.mlp.fc2", wide)
        depth += 1
    features = (
        layernorm(s, "norm", tokens).mean(1)
        if all_tokens
        else layernorm(s, "fc_norm", tokens[:, 1:].mean(1))
    )
    return linear(s, "head", features), features


# -- forward values --------------------------------------------------------------------------------
def test_the_wide_resnet_is_dm_ats() -> None:
    check(students.build(config.Model(name="wrn-10-1"), SMALL), wide_resnet, GOLDEN["wrn-10-1"])
    check(students.build(config.Model(name="wrn-16-2"), SMALL), wide_resnet)


def test_rawrn_adds_squeeze_and_excitation() -> None:
    small = PreActivationNet((6, 8, 12, 16), (2, 3, 1), 5, SHAPE.mean, SHAPE.std, squeeze=0.25)
    check(small, lambda s, x, training: wide_resnet(s, x, training, squeeze=True), GOLDEN["rawrn"])


def test_the_relu_wide_resnet_is_that_of_trades() -> None:
    check(
        students.build(config.Model(name="relu-wrn-10-1", normalise=False), SMALL),
        trades_resnet,
        GOLDEN["relu-wrn-10-1"],
    )


@pytest.mark.parametrize("pooling", ["patches", "all-tokens"])
def test_the_vit_is_its_formula(pooling) -> None:
    student = students.build(config.Model(name="vit-t-2", normalise=False, pooling=pooling), SMALL)
    check(
        student,
        lambda s, x, training: vision_transformer(s, x, 2, 3, pooling == "all-tokens"),
        GOLDEN[f"vit-{pooling}"],
    )


def test_rawrn_has_the_published_widths() -> None:
    """poloclub/robust-principles, the CIFAR configuration: stem 96, depths 30/31/10, widths
    216/432/864, squeeze 1/4.
    """
    with torch.device("meta"):
        state = students.build(config.Model(name="rawrn-70-16"), SHAPE).state_dict()
    assert [
        len({key.split(".")[3] for key in state if key.startswith(f"layer.{group}.")})
        for group in range(3)
    ] == [30, 31, 10]
    for key, shape in {
        "init_conv.weight": (96, 3, 3, 3),
        "layer.0.block.0.shortcut.weight": (216, 96, 1, 1),
        "layer.1.block.30.se.fc1.weight": (108, 432, 1, 1),
        "layer.2.block.0.se.fc2.bias": (864,),
        "logits.weight": (10, 864),
    }.items():
        assert state[key].shape == shape


# -- published sizes -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "millions", "gmacs", "features"),
    [
        ("wrn-28-10", 36.48, 5.24, 640),
        ("wrn-34-10", 46.16, 6.66, 640),
        ("relu-wrn-34-10", 46.16, 6.66, 640),
        ("wrn-70-16", 266.80, 38.76, 1024),
        ("wrn-94-16", 365.9, 53.3, 1024),
        ("rawrn-70-16", 267.24, 60.5, 864),
        ("vit-b-2", 85.29, 23.05, 768),  # of which the class token 0.10
    ],
)
def test_students_have_the_published_size_and_cost(
    name: str, millions: float, gmacs: float, features: int
) -> None:
    with torch.device("meta"):
        student = students.build(config.Model(name=name), SHAPE).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            found = student.with_features(torch.empty(1, 3, 32, 32))[1]
    rounding = 0.05 if millions in (365.9,) else 0.005
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(
        millions, abs=rounding
    )
    assert counter.get_total_flops() / 2e9 == pytest.approx(
        gmacs, abs=0.05 if gmacs in (53.3, 60.5) else 0.005
    )
    assert found.shape == (1, features) == (1, student.feature_dim)


def test_a_vits_cost_by_hand() -> None:
    """12 blocks of 12 d^2 N for linear layers and 2 N^2 d for attention; 22.95 GMAC for patches
    alone, 23.05 with the class token.
    """

    def macs(tokens: int) -> int:
        return 12 * (12 * 768**2 * tokens + 2 * tokens**2 * 768) + 256 * 12 * 768 + 768 * 10

    assert macs(256) / 1e9 == pytest.approx(22.95, abs=0.005)
    assert macs(257) / 1e9 == pytest.approx(23.05, abs=0.005)


@pytest.mark.parametrize(
    ("name", "millions", "features"),
    [("vit_base_patch16_dinov3", 85.64, 768), ("convnext_base.dinov3_lvd1689m", 87.57, 1024)],
)
def test_imagenet_backbones(name: str, millions: float, features: int) -> None:
    """timm's published counts, without the classifier."""
    shape = Shape(1000, 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.device("meta"):
        student = students.build(config.Model(name=f"timm/{name}"), shape).eval()
        logits, found = student.with_features(torch.empty(1, 3, 224, 224))
    body = sum(
        p.numel() for key, p in student.named_parameters() if not key.startswith(student.classifier)
    )
    assert body / 1e6 == pytest.approx(millions, abs=0.005)
    assert logits.shape == (1, 1000)
    assert found.shape == (1, features) == (1, student.feature_dim)


# -- weights and images that others publish --------------------------------------------------------
def folder_of(package: str) -> Store | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    return (
        Store(spec.submodule_search_locations[0])
        if spec and spec.submodule_search_locations
        else None
    )


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    """The 20 CIFAR-10 images inside foolbox, named cifar10_NUMBER_CLASS.png: float [20,3,32,32] in
    [0,1] and classes.
    """
    package = folder_of("foolbox")
    assert package, "foolbox is not installed; it is part of the test extra"
    names = [name for name in (package / "data").names() if name.startswith("cifar10_")]
    assert len(names) == 20
    images = [
        np.array(Image.open(io.BytesIO((package / "data" / name).read_bytes()))) for name in names
    ]
    labels = [int(name.removesuffix(".png").rsplit("_", 1)[1]) for name in names]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, torch.tensor(
        labels
    )


def test_the_cifar_resnet_18_in_pyautoattack_loads_and_recognises_photographs(photographs) -> None:
    """Strictly, and with the logits of the class that pyautoattack shows beside the weights."""
    from pyautoattack.examples.resnet import ResNet18

    images, labels = photographs
    package = folder_of("pyautoattack")
    assert package
    weights = package / "examples" / "model_test.pt"
    settings = config.Model(name="resnet-18", normalise=False, weights=weights.uri)
    student = students.build(settings, SHAPE).eval()
    assert students.initialise(student, settings) == f"weights of '{weights}'"
    assert student.state_dict().keys() == weights.read_torch().keys()
    reference = ResNet18().eval()
    reference.load_state_dict(weights.read_torch())
    with torch.no_grad():
        logits, theirs = student(images), reference(images)
    assert (logits.argmax(1) == labels).sum() == 20
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
