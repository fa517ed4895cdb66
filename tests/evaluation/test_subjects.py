"""What can be evaluated, from what a user names, and the one line where it cannot; no Ray here."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dra_ray import config, data, runs, students
from dra_ray.errors import CheckpointError, ConfigError, DataError, DraError
from dra_ray.evaluation import subjects
from dra_ray.evaluation.subjects import Options
from dra_ray.storage import Store
from dra_ray.students import checkpoint

EXPERIMENT = config.Experiment(
    data=config.Data(test_images=20, validation_images=8), model=config.Model(name="wrn-10-1")
)
MODULE = """
import numpy
import torch
import parts_of_mine

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.last = parts_of_mine.Last()

    def forward(self, x):
        return self.last(x)

def net():
    return Net().eval()

def number():
    return 3

def training():
    return Net()

def half():
    return Net().eval().half()

def double():
    return Net().eval().double()

class Wrapped(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = Net(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))

def pair():
    return Wrapped(lambda y: (y, None)).eval()

def mapping():
    return Wrapped(lambda y: {"aux": y * 0, "logits": y}).eval()

class Output:
    def __init__(self, logits):
        self.loss, self.logits = None, logits

def record():
    return Wrapped(Output).eval()

def text():
    return Wrapped(str).eval()

def flat():
    return Wrapped(lambda y: y.sum(1)).eval()

def narrow():
    return Wrapped(lambda y: y[:, :3]).eval()

def needs(size):
    return Net()

def leaves():
    raise SystemExit(3)

def wrong_size():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(65, 10)).eval()

def broken():
    raise KeyError("weights")

def half_logits():
    return Wrapped(lambda y: y.half()).eval()

def of_the_batch():
    return Wrapped(lambda y: y - y.mean(0)).eval()

def compiled():
    return torch.compile(Net().eval())

def detached():
    return Wrapped(lambda y: y.detach()).eval()

def not_finite():
    return Wrapped(lambda y: y / 0).eval()

def sparse():
    return Wrapped(lambda y: y.to_sparse()).eval()

def leaves_later():
    return Wrapped(exit).eval()

def scripted():
    return torch.jit.script(torch.nn.Flatten())

def weightless():
    with torch.device("meta"):
        return torch.nn.Linear(64, 10).eval()

class Holding(Net):
    def __init__(self):
        super().__init__()
        self.file = open("/dev/null")

def holding():
    return Holding().eval()

class Overwriting(Net):
    def forward(self, x):
        y = super().forward(x)
        x.detach().mul_(0)
        return y

def overwriting():
    return Overwriting().eval()

class Restless(Net):
    def forward(self, x):
        self.train()
        return super().forward(x)

def restless():
    return Restless().eval()
"""
PART = """
import torch

class Last(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1))
"""


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run whose weights are random."""
    run = Store(str(tmp_path / "run"))
    runs.begin_run(run, "train", EXPERIMENT.model_dump(mode="json"), EXPERIMENT.digest())
    student = students.build(EXPERIMENT.model, data.outline(EXPERIMENT.data).shape)
    checkpoint.save(run, student.state_dict())
    folder = run / "checkpoints" / "run" / "checkpoint_1"
    (folder / "state.pt").write_torch(
        {
            "student": {},
            "average": {k: v + 1 for k, v in student.state_dict().items()},
            "sums": torch.zeros(3),
        }
    )
    return run


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    file = Store(str(tmp_path / "pictures.npz"))
    file.write_npz(
        image=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1), label=np.array([0, 1, 2, 9])
    )
    return file.uri


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A current directory with a module of the user's."""
    before, path = os.getcwd(), list(sys.path)
    (tmp_path / "mine_to_try.py").write_text(MODULE)
    (tmp_path / "parts_of_mine.py").write_text(PART)
    (tmp_path / "torn.py").write_text("import no_such_module_anywhere")
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
    sys.path[:] = path
    for name in ("mine_to_try", "parts_of_mine"):
        sys.modules.pop(name, None)


def test_a_run_as_it_is(run: Store) -> None:
    subject = subjects.of_run(run)
    assert subject.experiment == EXPERIMENT
    assert subject.folder.uri == f"{run}/evaluation"
    assert subject.beside is None
    assert subject.images.shape == (20, 1, 8, 8)
    assert subject.images.dtype == torch.float32
    assert float(subject.images.max()) <= 1
    assert not subject.student.training
    assert not any(p.requires_grad for p in subject.student.parameters())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(version="plus"), "plus"),
        (Options(version="standard", level="fast", streams="sample"), "fast_sample-streams"),
        (Options(norm="l2", eps_255=127.5), "l2_eps-127.5"),
        (
            Options(settings={"evaluation.curve_255": [2, 4.5], "evaluation.seed": 3}),
            "seed-3_curve-255-2-4.5",
        ),
        (Options(settings={"evaluation.workers": 4, "resources.gpus_per_worker": 1}), ""),
    ],
)
def test_other_settings_go_beside_the_runs_own(run: Store, options: Options, name: str) -> None:
    subject = subjects.read(run.uri, options)
    assert subject.folder.uri.removeprefix(f"{run}/evaluation").strip("/") == name
    assert (subject.beside is None) == (name == "")
    if options.norm == "l2":
        assert (subject.experiment.threat.start, subject.experiment.threat.eps) == ("normal", 0.5)


def test_other_data_has_another_name(run: Store, pictures: str) -> None:
    names = [
        subjects.read(run.uri, options).folder.name
        for options in (Options({"test_images": 10}), Options(images=pictures))
    ]
    assert all(re.fullmatch("data-[0-9a-f]{8}", name) for name in names)
    assert len(set(names)) == 2


def test_checkpoints_of_a_run_know_what_they_are(run: Store, tmp_path: Path) -> None:
    to = Store(str(tmp_path / "results"))
    best = subjects.read(f"{run}/model.safetensors", Options(to=to))
    last = subjects.read(f"{run}/checkpoints/run/checkpoint_1", Options(to=to))
    assert best.experiment == EXPERIMENT
    assert best.source["kind"] == "checkpoint"
    ours = subjects.of_run(run).student.state_dict()
    for key, value in best.student.state_dict().items():
        torch.testing.assert_close(value, ours[key])
        torch.testing.assert_close(last.student.state_dict()[key], ours[key] + 1)


def test_a_lone_checkpoint_is_told_its_network(run: Store, tmp_path: Path, pictures: str) -> None:
    lone = Store(str(tmp_path / "lone.safetensors"))
    lone.write_bytes((run / "model.safetensors").read_bytes())
    to = Store(str(tmp_path / "results"))
    settings = {
        "name": "digits",
        "test_images": 20,
        "model.name": "wrn-10-1",
        "evaluation.batch": 5,
    }
    subject = subjects.read(lone.uri, Options(settings, to=to))
    assert subject.folder == to
    assert len(subject.images) == 20
    assert subject.experiment.evaluation.batch == 5
    assert subject.keep
    plain = Options({"model.name": "wrn-10-1", "model.normalise": False}, to=to, images=pictures)
    assert subjects.read(lone.uri, plain).images.shape == (4, 1, 8, 8)
    with pytest.raises(ConfigError, match="model.name is not set"):
        subjects.read(lone.uri, Options({"name": "digits", "test_images": 20}, to=to))
    with pytest.raises(CheckpointError, match="does not fit model.name='wrn-16-1'"):
        subjects.read(lone.uri, Options(settings | {"model.name": "wrn-16-1"}, to=to))
    with pytest.raises(ConfigError, match="npz file has no usual mean"):
        subjects.read(lone.uri, Options({"model.name": "wrn-10-1"}, to=to, images=pictures))


def test_images_may_lack_the_last_classes(run: Store, tmp_path: Path) -> None:
    """The student's last layer says how many classes there are, not the largest label of the
    images."""
    lone, few = Store(str(tmp_path / "lone.safetensors")), Store(str(tmp_path / "few.npz"))
    lone.write_bytes((run / "model.safetensors").read_bytes())
    few.write_npz(
        image=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1), label=np.array([0, 1, 2, 3])
    )
    options = Options(
        {"model.name": "wrn-10-1", "model.normalise": False},
        to=Store(str(tmp_path / "results")),
        images=few.uri,
    )
    subject = subjects.read(lone.uri, options)
    assert subject.student(subject.images).shape == (4, 10)


def test_networks_of_timm_and_robustbench(tmp_path: Path) -> None:
    shape, to = data.Shape(10, 1, 8, (0.3,), (0.4,)), Store(str(tmp_path / "results"))
    digits = {"name": "digits", "test_images": 20, "model.mean": [0.3], "model.std": [0.4]}
    for what, name in (("timm/resnet10t", "timm/resnet10t"), ("robustbench:{}", "wrn-10-1")):
        file = Store(str(tmp_path / f"{name.replace('/', '-')}.pt"))
        student = students.build(config.Model(name=name), shape).eval()
        file.write_torch(
            {"state_dict": {f"module.{key}": value for key, value in student.state_dict().items()}}
        )
        options = (
            Options(digits, to=to, weights=file.uri)
            if name.startswith("timm")
            else Options(digits, to=to, architecture=name)
        )
        subject = subjects.read(what.format(file.uri), options)
        with torch.no_grad():
            torch.testing.assert_close(subject.student(subject.images), student(subject.images))


def test_a_function_of_the_users(here: Path, pictures: str) -> None:
    subject = subjects.read(
        "mine_to_try:net", Options(images=pictures, to=Store("results"), eps_255=4)
    )
    assert subject.folder.uri == str(here / "results"), "a full path, for workers elsewhere"
    assert [module.__name__ for module in subject.code] == ["mine_to_try", "parts_of_mine"]
    assert set(subject.source["code"]) == {"mine_to_try", "parts_of_mine"}
    assert subject.source["kind"] == "function"
    assert subject.student(subject.images).shape == (4, 10)
    assert subject.experiment.threat.eps_255 == 4


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nowhere_at_all:net", "module 'nowhere_at_all' cannot be imported .*ModuleNotFoundError"),
        ("torn:net", "module 'torn' cannot be imported .*no_such_module_anywhere"),
        ("mine_to_try:nets", "has no function 'nets'; did you mean 'net'"),
        ("mine_to_try:number", "returned int; it must return a torch.nn.Module"),
        ("mine_to_try:broken", "failed .*KeyError"),
        ("mine_to_try:needs", "failed .*missing 1 required positional argument"),
        ("mine_to_try:leaves", "failed .*SystemExit"),
        ("mine_to_try:text", "gives str for images; it must give logits"),
        ("mine_to_try:flat", r"gives float32 \[2\] for 2 images"),
        ("mine_to_try:narrow", r"gives float32 \[2, 3\] for 2 images of 10 classes"),
        ("mine_to_try:wrong_size", r"cannot take float32 images \[2, 1, 8, 8\]"),
        ("mine_to_try:detached", "gives logits without a gradient"),
        ("mine_to_try:not_finite", "gives logits that are not finite"),
        ("mine_to_try:sparse", "it must give logits"),
        ("mine_to_try:leaves_later", "cannot take float32 images .*SystemExit"),
        ("mine_to_try:scripted", "returned a TorchScript module"),
        ("mine_to_try:weightless", "returned a network on the meta device"),
        ("mine_to_try:holding", "returned a network that cannot be copied"),
        ("mine_to_try:overwriting", "writes into the images|cannot take|without a gradient"),
        ("mine_to_try:restless", "puts itself into train mode"),
        ("timm/resnet10t", "--weights is not set"),
        ("robustbench:a.pt", "--architecture is not set"),
    ],
)
def test_what_is_no_student_is_said_in_one_line(
    here: Path, pictures: str, what: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        subjects.read(what, Options(images=pictures, to=Store("results")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": np.zeros((2, 8, 8, 1), np.uint8)}, "no array 'label'"),
        ({"x": np.zeros(2), "label": np.zeros(2, int)}, "no array 'image' but x, label"),
        (
            {"image": np.zeros((2, 8, 8), np.uint8), "label": np.zeros(2, int)},
            r"image is uint8 \[2, 8, 8\]",
        ),
        ({"image": np.zeros((2, 1, 8, 8), np.uint8), "label": np.zeros(2, int)}, "8 channels"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(3, int)}, "for 2 images"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2)}, "label is float64"),
        (
            {"image": np.full((2, 1, 8, 8), 1.5, np.float32), "label": np.zeros(2, int)},
            r"\[1.5, 1.5\] and must lie in \[0, 1\]",
        ),
        (
            {"image": np.full((2, 1, 8, 8), np.nan, np.float32), "label": np.zeros(2, int)},
            "must lie in",
        ),
    ],
)
def test_files_of_images_that_do_not_fit(
    here: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    Store("bad.npz").write_npz(**arrays)
    with pytest.raises(DataError, match=words):
        subjects.read("mine_to_try:net", Options(images="bad.npz", to=Store("results")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(), "--to is not set"),
        (Options(to=Store("results")), "no images to attack"),
        (
            Options({"nam": "digits"}, to=Store("results")),
            "unknown field 'data.nam'; did you mean 'name'",
        ),
        (Options({"optim.lr": 1}, to=Store("results")), "no section 'optim'"),
        (Options({"evaluation.batches": 1}, to=Store("results")), "did you mean 'batch'"),
        (
            Options({"name": "digits", "test_images": 20}, norm="l3", to=Store("results")),
            "norm='l3'",
        ),
        (
            Options({"name": "digits", "test_images": 20}, eps_255=0, to=Store("results")),
            "--eps-255 0",
        ),
        (
            Options({"name": "digits", "test_images": 20}, version="best", to=Store("results")),
            "evaluation.version='best'",
        ),
    ],
)
def test_options_that_do_not_fit(here: Path, options: Options, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        subjects.read("mine_to_try:net", options)


def test_a_run_keeps_what_it_is(run: Store) -> None:
    with pytest.raises(DataError, match="'nowhere' does not exist"):
        subjects.read("nowhere")
    with pytest.raises(ConfigError, match="a run's student is as it was trained"):
        subjects.read(run.uri, Options({"model.name": "wrn-10-2"}))
    with pytest.raises(ConfigError, match="--weights was given"):
        subjects.read(run.uri, Options(weights="a.pt"))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("net", None),
        ("training", "put into eval mode"),
        ("half", "in float16; it was evaluated in float32"),
        ("double", "in float64; it was evaluated in float32"),
        ("pair", "gives tuple; its logits"),
        ("mapping", "gives dict; its logits"),
        ("record", "gives Output; its logits"),
        ("half_logits", None),
        ("compiled", None),
        ("of_the_batch", "other logits beside other images"),
    ],
)
def test_a_users_network_is_made_to_fit_and_this_is_said(
    here: Path, pictures: str, function: str, words: str | None
) -> None:
    subject = subjects.read(
        f"mine_to_try:{function}", Options(images=pictures, to=Store("results"))
    )
    logits = subject.student(subject.images)
    assert logits.shape == (4, 10)
    assert logits.dtype == torch.float32
    assert not subject.student.training
    assert [words in note for note in subject.notes if words] == ([True] if words else [])
    assert len(subject.notes) == (words is not None)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1]",
        '"text"',
        "5",
        "{}",
        '{"kind": []}',
        '{"kind": "train", "config": []}',
        '{"kind": {"a": 1}}',
        "[" * 100000,
        "\xff{",
    ],
)
def test_a_strangers_manifest_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(DraError) as caught:
        subjects.read(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
