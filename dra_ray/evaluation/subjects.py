"""What is evaluated: a student, test images, a threat and settings, from whatever a user names.

| WHAT | student | settings and images |
|---|---|---|
| a run's folder | its best weights | as trained, but for what is overridden |
| a weights file, or a folder with `state.pt` | of the run around it, or `model.name` | the run's |
| timm/NAME | the timm model with `weights` | given |
| module:function | what the function returns, logits of images in [0,1] | given |
| robustbench:URI | the checkpoint of `architecture` | given |
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dra_ray import config, data, runs, students
from dra_ray.config import networks
from dra_ray.data import Shape
from dra_ray.errors import CheckpointError, ConfigError, DataError, nearest
from dra_ray.storage import Store, large, sha256
from dra_ray.students import checkpoint, robustbench
from dra_ray.students.weights import Weights, load_into, read_weights

FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
STATE = "state.pt"  # of a training checkpoint
DECODED = 256  # images at a time, where all are turned into float
IN_RUN = (
    4  # folders from a checkpoint's file up to its run: RUN/checkpoints/NAME/CHECKPOINT/state.pt
)
SECTIONS = ("data", "evaluation", "model", "resources", "threat")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What `evaluate` takes.

    Attributes:
        name: for progress and messages.
        student: images -> logits [N,K], in eval mode.
        images: float [N,C,H,W] in [0,1]; labels: int64 [N].
        experiment: its sections data, threat, evaluation and resources count.
        folder: where the results go.
        source: what was evaluated, for the result; `code` in it, digests of source files, also for
            the result's digest.
        beside: another folder of results whose batches serve where they are the same.
        keep: whether a result of other settings in `folder` is an error, or replaced.
        code: modules that other machines may not have, sent to them with the student.
        notes: sentences on what was changed in the student, for the result's flags.
    """

    name: str
    student: nn.Module
    images: Tensor
    labels: Tensor
    experiment: config.Experiment
    folder: Store
    source: dict[str, Any]
    beside: Store | None = None
    keep: bool = False
    code: tuple[ModuleType, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user changes or adds; None leaves it as it is.

    Attributes:
        settings: dotted fields of an experiment's data, evaluation, model, resources and threat;
            without a dot, of data.
        to: folder of the results; needed unless a run is evaluated.
        images: .npz file with `image` (uint8 NHWC, or float NCHW in [0,1]) and `label`, instead of
            the data set's test images.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eps_255: float | None = None
    norm: str | None = None
    version: str | None = None
    level: str | None = None
    streams: str | None = None
    to: Store | None = None
    weights: str | None = None
    images: str | None = None
    architecture: str | None = None


def of_run(run: Store) -> Subject:
    """A training run as it is."""
    return _run(run, Options())


def held_out(
    run: Store,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    folder: Store,
    count: int | None = None,
) -> Subject:
    """A training run's student with weights of its own, as of one of its checkpoints, on the first
    `count` of the run's validation images; test images play no part.

    Args:
        settings: dotted fields of the run's evaluation and resources that are others.
    """
    experiment = config.override(_experiment(run), settings)
    student = students.build(experiment.model, data.outline(experiment.data).shape)
    load_into(student, weights, experiment.model.name, str(folder))
    images = data.load(experiment.data).validation
    few = data.in_memory(images[: len(images) if count is None else count])
    return Subject(
        run.name,
        student.eval().requires_grad_(False),
        data.to_float(few.images),
        few.labels,
        experiment,
        folder,
        {"kind": "checkpoint", "what": run.name, "data": {"name": experiment.data.name}},
    )


def read(what: str, options: Options | None = None) -> Subject:
    """The subject that `what` names; see the table above.

    Raises:
        ConfigError, CheckpointError, DataError: with one line that says what is missing or does not
        fit.
    """
    options = options or Options()
    if _is_run(what):
        return _run(Store(what), options)
    if options.to is None:
        raise ConfigError(
            f"--to is not set, but '{what}' is no run with a folder for its results; give --to URI"
        )
    run = _run_around(Store(what).resolved()) if _is_file(what) else None
    experiment = _overridden(_experiment(run), options) if run else _given(what, options)
    images, labels, facts = _images(experiment, options)
    subject = Subject(
        what,
        nn.Identity(),
        images,
        labels,
        experiment,
        options.to.resolved(),
        {"what": what, "data": facts},
        keep=True,
    )
    student, source, code = _student(
        what,
        experiment,
        options,
        _shape(experiment, options, images, labels, known=run is not None),
    )
    notes: tuple[str, ...] = ()
    if source["kind"] == "function":
        student, notes = _fitting(what, student, images, labels)
    return dataclasses.replace(
        subject,
        student=student.requires_grad_(False),
        source=subject.source | source,
        code=code,
        notes=notes,
    )


def _is_run(what: str) -> bool:
    return networks.is_place(what) and not _is_file(what)


def _is_file(what: str) -> bool:
    return not what.startswith((networks.TIMM, networks.ROBUSTBENCH)) and (
        what.endswith(FILES) or (Store(what) / STATE).exists()
    )


# -- runs ------------------------------------------------------------------------------------------
def _run(run: Store, options: Options) -> Subject:
    for option in ("weights", "architecture"):
        if getattr(options, option):
            raise ConfigError(
                f"--{option} was given, but '{run}' is taken as a run, which has its own; leave "
                "it out"
            )
    student, stored = checkpoint.load(run)
    run = run.resolved()
    experiment = _overridden(stored, options)
    images, labels, facts = _images(experiment, options)
    name = _difference(stored, experiment, facts)
    folder = (
        options.to.resolved()
        if options.to
        else run / "evaluation" / name
        if name
        else run / "evaluation"
    )
    beside = run / "evaluation" if folder != run / "evaluation" else None
    source = {"kind": "run", "what": run.name, "data": facts}
    return Subject(
        run.name,
        student,
        images,
        labels,
        experiment,
        folder,
        source,
        beside,
        keep=options.to is not None,
    )


def _run_around(file: Store) -> Store | None:
    """The training run that a checkpoint lies in, if it does."""
    folder = file.uri.rstrip("/")
    for _ in range(IN_RUN):
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith(":/"):
            return None
        with contextlib.suppress(CheckpointError):  # a manifest.json that is not ours
            manifest = checkpoint.manifest(Store(folder))
            if manifest and manifest.kind == "train":
                return Store(folder)
    return None


def _experiment(run: Store) -> config.Experiment:
    manifest = checkpoint.manifest(run)
    if manifest is None:
        raise CheckpointError(f"'{run}' has no {runs.MANIFEST}; give the folder of a run")
    return config.validate(config.Experiment, manifest.config, str(run / runs.MANIFEST))


def _difference(
    stored: config.Experiment, experiment: config.Experiment, facts: Mapping[str, Any]
) -> str:
    """Name of a result whose settings are not those that the run was trained with; "" where they
    are.
    """
    before, after = stored.evaluation.model_dump(), experiment.evaluation.model_dump()
    parts = [
        _word(field, value)
        for field, value in after.items()
        if value != before[field] and field != "workers"
    ]
    if experiment.threat.norm != stored.threat.norm:
        parts.append(experiment.threat.norm)
    if experiment.threat.eps_255 != stored.threat.eps_255:
        parts.append(f"eps-{experiment.threat.eps_255:g}")
    if experiment.data != stored.data or "images" in facts:
        parts.append(f"data-{sha256(repr((experiment.data, facts)).encode())[:8]}")
    return "_".join(parts)


def _word(field: str, value: Any) -> str:
    if field in ("version", "level"):
        return str(value)
    if field == "streams":
        return f"{value}-streams"
    text = "-".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)
    short = re.fullmatch(r"[A-Za-z0-9.-]{1,40}", text)
    return f"{field.replace('_', '-')}-{text if short else sha256(text.encode())[:8]}"


# -- settings --------------------------------------------------------------------------------------
def _changes(options: Options) -> dict[str, Any]:
    changes = {
        field if "." in field else f"data.{field}": value
        for field, value in options.settings.items()
    }
    for field in changes:
        section = field.partition(".")[0]
        if section not in SECTIONS:
            raise ConfigError(
                f"--set {field}: an evaluation has no section '{section}'; "
                f"{nearest(section, SECTIONS)}"
            )
    chosen = {"version": options.version, "level": options.level, "streams": options.streams}
    return changes | {
        f"evaluation.{field}": value for field, value in chosen.items() if value is not None
    }


def _overridden(stored: config.Experiment, options: Options) -> config.Experiment:
    changes = _changes(options)
    for field in changes:
        if field.startswith("model."):
            raise ConfigError(f"--set {field}: a run's student is as it was trained; leave it out")
    changed = config.override(stored, changes) if changes else stored
    return changed.model_copy(update={"threat": _threat(changed.threat, options)})


def _given(what: str, options: Options) -> config.Experiment:
    """Settings of what brings none along."""
    tree: dict[str, Any] = {}
    for field, value in _changes(options).items():
        *folders, leaf = field.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    model = tree.setdefault("model", {})
    if what.startswith(networks.TIMM):
        model["name"] = what
    if options.architecture:
        model["name"] = options.architecture
    if options.weights:
        model["weights"] = options.weights
    experiment = config.validate(config.Experiment, tree, "--set")
    return experiment.model_copy(update={"threat": _threat(experiment.threat, options)})


def _threat(threat: config.Threat, options: Options) -> config.Threat:
    """The ball that is attacked; PGD starts as the run's own does, or as its norm allows."""
    norm, eps_255 = options.norm or threat.norm, options.eps_255 or threat.eps_255
    if options.eps_255 is not None and options.eps_255 <= 0:
        raise ConfigError(f"--eps-255 {options.eps_255:g}: a radius must be above 0, such as 8")
    if (norm, eps_255) == (threat.norm, threat.eps_255):
        return threat
    start = threat.start if norm == threat.norm else "normal" if norm == "l2" else "uniform"
    changes = {"norm": norm, "eps_255": eps_255, "step_255": eps_255 / 4, "start": start}
    return config.validate(config.Threat, threat.model_dump() | changes, "--norm, --eps-255")


# -- images ----------------------------------------------------------------------------------------
def _images(
    experiment: config.Experiment, options: Options
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Test images float [N,C,H,W] in [0,1], labels int64 [N], and what they are."""
    if options.images:
        return *_from_npz(Store(options.images)), {"images": options.images}
    if not experiment.model_fields_set & {"data"}:
        raise ConfigError(
            "no images to attack; give --set name=cifar10 --set uri=URI (any data set by its "
            "fields), or --images FILE.npz"
        )
    test = data.load(experiment.data).test
    return _floats(test), test.labels, {"name": experiment.data.name}


def _floats(test: data.Pictures) -> Tensor:
    """All images, float [N,C,H,W] in [0,1]; never are all decoded ones in memory."""
    images = large.empty((len(test), *test.picture_shape))
    for rows in torch.arange(len(test)).split(DECODED):
        images[rows] = data.to_float(test.take(rows)[0])
    return images


def _from_npz(file: Store) -> tuple[Tensor, Tensor]:
    arrays = file.read_npz()
    if missing := [key for key in ("image", "label") if key not in arrays]:
        raise DataError(
            f"'{file}' has no array '{missing[0]}' but {', '.join(arrays) or 'none'}; it needs "
            "image and label"
        )
    image, label = arrays["image"], arrays["label"]
    if image.ndim != 4 or not (image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)):
        raise DataError(
            f"'{file}': image is {image.dtype} {list(image.shape)}; expected uint8 [N,H,W,C], or "
            "float [N,C,H,W] in [0,1]"
        )
    if not (np.issubdtype(label.dtype, np.integer) and label.shape == (len(image),) and len(label)):
        raise DataError(
            f"'{file}': label is {label.dtype} {list(label.shape)} for {len(image)} images; "
            "expected one class number each"
        )
    if image.dtype == np.uint8:
        images = data.to_float(torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2))))
    else:
        images = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    return _in_range(images, file), torch.from_numpy(label.astype(np.int64))


def _in_range(images: Tensor, file: Store) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"'{file}': images have {images.shape[1]} channels; uint8 images are [N,H,W,C], float "
            "ones [N,C,H,W], with 1 or 3 channels"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise DataError(
            f"'{file}': images span [{low:g}, {high:g}] and must lie in [0, 1]; normalise inside "
            "the student"
        )
    return images


def _shape(
    experiment: config.Experiment, options: Options, images: Tensor, labels: Tensor, known: bool
) -> Shape:
    """What the student must fit: the data set's shape, or that of an .npz file's images where no
    data set is named.
    """
    if known or "data" in experiment.model_fields_set:
        shape = data.outline(experiment.data).shape
        if tuple(images.shape[1:]) != (shape.channels, shape.resolution, shape.resolution):
            raise DataError(
                f"'{options.images}': images are {list(images.shape[1:])}, but those of "
                f"'{experiment.data.name}' are not"
            )
        return shape
    channels, height, width = images.shape[1:]
    if height != width:
        raise DataError(f"'{options.images}': images are {height} x {width}; give square ones")
    return Shape(int(labels.max()) + 1, channels, height, (0.0,) * channels, (1.0,) * channels)


# -- students --------------------------------------------------------------------------------------
Found = tuple[nn.Module, dict[str, Any], tuple[ModuleType, ...]]


def _student(what: str, experiment: config.Experiment, options: Options, shape: Shape) -> Found:
    """The student, what it is, and the modules that travel with it."""
    if networks.FUNCTION.fullmatch(what):
        return _made_by(what)
    if what.startswith(networks.ROBUSTBENCH):
        if not options.architecture:
            raise ConfigError(
                f"--architecture is not set, but '{what}' needs one, such as wrn-28-10"
            )
        student = robustbench.load(
            Store(what.removeprefix(networks.ROBUSTBENCH)), experiment.model, shape
        )
        return student, {"kind": "robustbench", "architecture": options.architecture}, ()
    if what.startswith(networks.TIMM):
        if not options.weights:
            raise ConfigError(
                f"--weights is not set, but '{what}' is a network without weights; give --weights "
                "URI"
            )
        return (
            _loaded(Store(options.weights), experiment, options, shape),
            {"kind": "timm", "weights": options.weights},
            (),
        )
    if "name" not in experiment.model.model_fields_set:
        raise ConfigError(
            f"model.name is not set, and '{what}' lies in no training run that would tell; give "
            "--set model.name=NAME"
        )
    return (
        _loaded(Store(what), experiment, options, shape),
        {"kind": "checkpoint", "architecture": experiment.model.name},
        (),
    )


def _loaded(
    file: Store, experiment: config.Experiment, options: Options, shape: Shape
) -> students.Student:
    """Strictly: a classifier that is missing or of other classes is an error here."""
    settings = experiment.model
    if (
        settings.normalise
        and not (settings.mean and settings.std)
        and options.images
        and "data" not in experiment.model_fields_set
    ):
        raise ConfigError(
            f"'{file}' is a network that normalises its images, but an npz file has no usual mean; "
            "give --set model.mean=[...] and model.std=[...], "
            "--set name=DATASET, or --set model.normalise=false"
        )
    weights, student = _weights(file), students.build(settings, shape)
    if options.images and "data" not in experiment.model_fields_set:
        outputs = _outputs(weights.tensors, student)
        if outputs > shape.num_classes:  # the images of the npz file lack the last classes
            student = students.build(settings, dataclasses.replace(shape, num_classes=outputs))
    load_into(student, weights, settings.name, str(file))
    return student.eval()


def _outputs(weights: Mapping[str, Tensor], student: students.Student) -> int:
    """Rows of the last layer in a file for this kind of student, whatever stands before the names;
    0 where it has none."""
    last = f".{student.classifier.removeprefix('net.')}weight"
    return next(
        (len(value) for key, value in weights.items() if f".{key}".endswith(last) and value.ndim), 0
    )


def _weights(file: Store) -> Weights:
    """Of a training checkpoint, the averaged weights."""
    file = file / STATE if not file.uri.endswith(FILES) else file
    if file.name != STATE:
        return read_weights(file)
    state = file.read_torch()
    if not (isinstance(state, Mapping) and isinstance(state.get("average"), Mapping)):
        raise CheckpointError(
            f"'{file}' has no averaged weights; give a checkpoint that `dra train` wrote"
        )
    return Weights(dict(state["average"]))


def _made_by(what: str) -> Found:
    """Import `module:function`, also from the current directory, and call it."""
    name, _, function = what.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise ConfigError(
            f"'{what}': module '{name}' cannot be imported ({_first_line(error)}); run it where "
            f"`import {name}` works"
        ) from error
    make = getattr(module, function, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(
            f"'{what}': module '{name}' has no function '{function}'; {nearest(function, known)}"
        )
    try:
        student = make()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"'{what}' failed ({_first_line(error)}); it is called without arguments and must "
            "return a torch.nn.Module"
        ) from error
    if not isinstance(student, nn.Module):
        raise ConfigError(
            f"'{what}' returned {type(student).__name__}; it must return a torch.nn.Module that "
            "gives logits"
        )
    code = _local_code(name)
    digests = {
        found: sha256(Store(str(part.__file__)).read_bytes())
        for found, part in sorted(code.items())
    }
    return student, {"kind": "function", "code": digests}, tuple(code.values())


class Logits(nn.Module):
    """`net`, of whose output (a tuple, a dict, an object with `logits`) only the logits are
    given, in float32.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _logits(self.net(x))
        return logits.float()


def _logits(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        names = [name for name in ("logits", "out", "output", "pred") if name in output]
        return output[names[0]] if names else next(iter(output.values()), None)
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) and output else output


def _fitting(
    what: str, student: nn.Module, images: Tensor, labels: Tensor
) -> tuple[nn.Module, tuple[str, ...]]:
    """The user's network in eval mode and float32, giving logits [N,K], and what was changed for
    that.

    It is tried on two images here, so that what cannot work is said before Ray starts. Raises
    `ConfigError`.
    """
    _require_plain(what, student)
    notes = []
    if any(module.training for module in student.modules()):
        notes.append(f"'{what}' returned a network in train mode; it was put into eval mode.")
    student = getattr(student, "_orig_mod", student).eval().cpu()
    tensors = [*student.parameters(), *student.buffers()]
    kinds = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {
        "float32"
    }
    if kinds:
        notes.append(
            f"'{what}' returned a network in {', '.join(sorted(kinds))}; it was evaluated in "
            "float32."
        )
        student = student.float()
    few = images[:2].clone().requires_grad_()
    try:
        output = student(few.clone())
        logits = _logits(output)
    except (Exception, SystemExit) as error:  # the user's network may fail in any way
        raise ConfigError(
            f"'{what}' cannot take float32 images {list(few.shape)} ({_first_line(error)}); make "
            "it take images in [0,1] and give logits"
        ) from error
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"'{what}' gives {type(output).__name__} for images; it must give logits [N,K]"
        )
    classes = int(labels.max()) + 1
    if (
        logits.ndim != 2
        or len(logits) != len(few)
        or logits.shape[1] < classes
        or not logits.is_floating_point()
        or logits.layout != torch.strided
    ):
        kind = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        raise ConfigError(
            f"'{what}' gives {kind} for {len(few)} images of {classes} classes; it must give "
            "logits [N,K]"
        )
    _require_attackable(what, student, few, logits)
    if _mixes_images(student, few.detach()):
        notes.append(f"'{what}' gives an image other logits beside other images.")
    if not isinstance(output, Tensor):
        notes.append(f"'{what}' gives {type(output).__name__}; its logits were taken.")
    if not isinstance(output, Tensor) or logits.dtype != torch.float32:
        student = Logits(student).eval()
    return student, tuple(notes)


def _require_plain(what: str, student: nn.Module) -> None:
    """`ConfigError` for a network that cannot be sent to a worker."""
    problem = ""
    if isinstance(student, torch.jit.ScriptModule):
        problem = "a TorchScript module"
    elif any(tensor.is_meta for tensor in (*student.parameters(), *student.buffers())):
        problem = "a network on the meta device, which has no weights"
    else:
        try:
            copy.deepcopy(student)  # fails where sending fails, as for an open file
        except Exception as error:  # of whatever the network holds
            problem = f"a network that cannot be copied ({_first_line(error)})"
    if problem:
        raise ConfigError(
            f"'{what}' returned {problem}; return a plain torch.nn.Module with its weights"
        )


def _require_attackable(what: str, student: nn.Module, few: Tensor, logits: Tensor) -> None:
    """`ConfigError` for a network on which attacks would fail, or pass for the wrong reason."""
    problem = ""
    if any(module.training for module in student.modules()):
        problem = "puts itself into train mode when it is called; leave its mode as it is"
    elif not bool(logits.isfinite().all()):
        problem = "gives logits that are not finite"
    elif logits.grad_fn is None or _gradient(logits, few) is None:
        problem = (
            "gives logits without a gradient to the images; take out .detach(), torch.no_grad() "
            "and what rounds"
        )
    elif _writes_into(student, few.detach()):
        problem = "writes into the images that it gets; let it work on a copy"
    if problem:
        raise ConfigError(f"'{what}' {problem}")


def _gradient(logits: Tensor, few: Tensor) -> Tensor | None:
    try:
        return torch.autograd.grad(logits.sum(), few, allow_unused=True)[0]
    except RuntimeError:  # such as an operation without a derivative
        return None


def _writes_into(student: nn.Module, few: Tensor) -> bool:
    given = few.clone()
    with torch.no_grad():
        student(given)
    return not torch.equal(given, few)


_ROUNDING = 1e-3  # of the logits' range


def _mixes_images(student: nn.Module, few: Tensor) -> bool:
    """Whether an image's logits depend on the images beside it, as with BatchNorm of the batch;
    False where they are random.
    """
    with torch.no_grad():
        first, again, beside_itself = (
            _logits(student(part.clone()))[0].float() for part in (few, few, few[[0] * len(few)])
        )
    if not torch.equal(first, again):
        return False
    return bool((first - beside_itself).abs().max() > _ROUNDING * (1 + first.abs().max()))


def _local_code(name: str) -> dict[str, ModuleType]:
    """Module `name` and what it uses, as far as it lies below the current directory and is not
    installed.
    """
    found: dict[str, ModuleType] = {}
    names = [name]
    while names:
        module = sys.modules.get(name := names.pop())
        if name in found or module is None or not _is_local(module):
            continue
        found[name] = module
        for value in vars(module).values():
            other = (
                value.__name__
                if isinstance(value, ModuleType)
                else getattr(value, "__module__", None)
            )
            if isinstance(other, str):
                names.append(other)
    return found


def _is_local(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None) or ""
    return (
        file.startswith(os.getcwd() + os.sep)
        and "site-packages" not in file
        and module.__name__.partition(".")[0] not in ("dra_ray", "__main__")
    )


def _first_line(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if str(error)
        else type(error).__name__
    )
