"""A trained student for other programs, checked: what was written is loaded again, the way its
snippet says, and must give the run's logits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dra_ray import config, data, students
from dra_ray.config import networks
from dra_ray.errors import CheckpointError, ConfigError, nearest
from dra_ray.storage import Store
from dra_ray.students import checkpoint
from dra_ray.students.weights import load_into, read_weights

WEIGHTS, ONNX, CONFIG, SNIPPET = "model.safetensors", "model.onnx", "config.json", "load.py"
IMAGES = 8  # drawn, on which logits are compared
TOLERANCE = {"safetensors": 0.0, "timm": 1e-5, "onnx": 1e-3}
"""Largest difference of a logit, as a share of the largest logit (of 1 where that is smaller): none
where the same code runs, rounding where another does.
"""
NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Exported:
    """`snippet` are the lines that load it; `difference` is the largest one of a logit on `images`
    random images.
    """

    folder: Store
    snippet: str
    difference: float
    images: int


@dataclasses.dataclass(frozen=True)
class _Run:
    student: students.Student
    experiment: config.Experiment
    shape: data.Shape
    folder: Store


def export(run: Store, form: str, folder: Store | None = None) -> Exported:
    """Write a training run's weights in `form`: safetensors, timm or onnx, with a snippet.

    Raises `ConfigError` for an unknown form, one that needs packages that are not installed, or a
    network that timm does not have, and `CheckpointError` where the run has no weights or the copy
    gives other logits.
    """
    if form not in FORMS:
        raise ConfigError(f"--to {form}: {nearest(form, FORMS)}")
    folder = folder or run / "export" / form
    student, experiment = checkpoint.load(run)
    shape = data.outline(experiment.data).shape
    loaded = FORMS[form](_Run(student, experiment, shape, folder))
    images = torch.rand(
        IMAGES,
        shape.channels,
        shape.resolution,
        shape.resolution,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        expected = student(images)
        difference = float((loaded.logits(images) - expected).abs().max())
    if not difference <= TOLERANCE[form] * max(1.0, float(expected.abs().max())):
        raise CheckpointError(
            f"the exported model of '{run}' gives other logits, by up to {difference:.2g}; do not "
            f"use '{folder}'"
        )
    (folder / SNIPPET).write_text(loaded.snippet)
    return Exported(folder, loaded.snippet, difference, IMAGES)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    logits: Callable[[Tensor], Tensor]
    snippet: str


# -- safetensors -----------------------------------------------------------------------------------
def _safetensors(run: _Run) -> _Loaded:
    (run.folder / WEIGHTS).write_tensors(run.student.state_dict())
    (run.folder / CONFIG).write_json(
        {"model": run.experiment.model.model_dump(mode="json"), **_shape(run)}
    )
    again = students.build(run.experiment.model, run.shape)
    load_into(again, read_weights(run.folder / WEIGHTS), run.experiment.model.name, str(run.folder))
    return _Loaded(again.eval(), _SAFETENSORS)


def _shape(run: _Run) -> dict[str, Any]:
    return {"shape": dataclasses.asdict(run.shape)}


_SAFETENSORS = """\
# In the folder of this file. Images are float [B,C,H,W] in [0,1]; normalisation is inside.
import json, pathlib
from safetensors.torch import load_file
from dra_ray import config, students
from dra_ray.data import Shape

facts = json.loads(pathlib.Path("config.json").read_text())
model = students.build(config.Model(**facts["model"]), Shape(**facts["shape"])).eval()
model.load_state_dict(load_file("model.safetensors"))
"""


# -- timm ------------------------------------------------------------------------------------------
def _timm(run: _Run) -> _Loaded:
    name = run.experiment.model.name
    if not name.startswith(networks.TIMM):
        raise ConfigError(
            f"--to timm: model.name='{name}' is not a network of timm's; use --to safetensors"
        )
    import timm

    net = run.student.get_submodule("net")
    prefix = "net."
    weights = {
        key.removeprefix(prefix): value
        for key, value in run.student.state_dict().items()
        if key.startswith(prefix)
    }
    constants = run.student.normalise.constants
    arguments: dict[str, Any] = {
        "num_classes": run.shape.num_classes,
        "in_chans": run.shape.channels,
    }
    sized = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if sized is not None:
        arguments["img_size"] = run.shape.resolution
    file = run.folder / WEIGHTS
    file.write_tensors(weights)
    card = {
        "architecture": name.removeprefix("timm/"),
        "num_classes": run.shape.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [run.shape.channels, run.shape.resolution, run.shape.resolution],
            "mean": list(constants["mean"]),
            "std": list(constants["std"]),
            "num_classes": run.shape.num_classes,
        },
    }
    (run.folder / CONFIG).write_json(card)
    again = timm.create_model(name.removeprefix("timm/"), **arguments)
    again.load_state_dict(file.read_tensors())
    again = again.eval()
    mean, std = (torch.tensor(constants[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    snippet = _TIMM.format(
        name=name.removeprefix("timm/"), arguments=json.dumps(arguments), **constants
    )
    return _Loaded(lambda images: again((images - mean) / std), snippet)


_TIMM = """\
# In the folder of this file. Images are float [B,C,H,W] in [0,1], normalised before the model.
import timm, torch
from safetensors.torch import load_file

model = timm.create_model("{name}", **{arguments}).eval()
model.load_state_dict(load_file("model.safetensors"))
mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in ({mean}, {std}))
logits = lambda images: model((images - mean) / std)
"""


# -- ONNX ------------------------------------------------------------------------------------------
def _onnx(run: _Run) -> _Loaded:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--to onnx needs {' and '.join(missing)}; install them with "
            "pip install 'dra-ray[onnx]'"
        )
    import onnxruntime

    size = (2, run.shape.channels, run.shape.resolution, run.shape.resolution)
    program = torch.onnx.export(
        run.student,
        (torch.zeros(size),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    (run.folder / ONNX).write_bytes(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(
        (run.folder / ONNX).read_bytes(), providers=["CPUExecutionProvider"]
    )

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return _Loaded(logits, _ONNX)


_ONNX = """\
# In the folder of this file. Images are float32 [B,C,H,W] in [0,1]; normalisation is inside.
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = lambda images: session.run(["logits"], {"images": images})[0]
"""

FORMS: dict[str, Callable[[_Run], _Loaded]] = {
    "safetensors": _safetensors,
    "timm": _timm,
    "onnx": _onnx,
}
