"""What a small run of every workload gives, to hold that a change of the code changes no number.

`scenario` drives the product from outside: by the `dra` command and the files of its run folders.
`measure` reads what came out. `python -m tests.parity.same_numbers record` writes it to
same_numbers.json, and `python -m tests.parity.same_numbers compare` prints what differs from it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

DRA = [sys.executable, "-m", "dra_ray"]
COMMAND_TIMEOUT_S = 600
RECORD = Path(__file__).with_name("same_numbers.json")
TEACHER: dict[str, object] = {
    "images_seen": 640,
    "checkpoint_images": 640,
    "data.validation_images": 64,
    "data.test_images": 32,
}
SYNTHESIS: dict[str, object] = {
    "teacher": "runs/teacher",
    "images": 200,
    "steps": 3,
    "batch": 50,
    "shard_images": 100,
}
DATA: dict[str, object] = {
    "data.train_images": 1024,
    "data.validation_images": 64,
    "data.test_images": 32,
}
SMALL: dict[str, object] = DATA | {
    "optim.epochs": 4,
    "optim.batch": 64,
    "selection.every_epochs": 2,
    "selection.steps": 2,
    "threat.steps": 2,
    "threat.eps_255": 8,
    "threat.step_255": 4,
    "resources.metrics_steps": 4,
    "evaluation.batch": 16,
    "evaluation.pgd_steps": 4,
    "evaluation.curve_255": [8, 64],
}
SOURCES: dict[str, object] = {
    "teacher.uri": "runs/teacher",
    "synthetic.uri": "runs/images",
    "synthetic.images": 200,
}
IKL: dict[str, object] = {
    "align.weight": 0,
    "loss.name": "ikl",
    "optim.averaging": "epoch",
    "threat.start": "normal",
    "threat.mode": "eval",
    "evaluation.corruptions": "generated",
}


def environment() -> dict[str, str]:
    """A user's, without the cluster that other tests share, and with one thread per process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1"}


def dra(folder: Path, *arguments: str) -> None:
    """Run one command in `folder`; `RuntimeError` with what it printed when it fails."""
    done = subprocess.run(
        [*DRA, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    if done.returncode:
        command = " ".join(arguments)
        raise RuntimeError(f"dra {command} ended with {done.returncode}:\n{done.stderr}")


def settings(changes: dict[str, object], prefix: str = "") -> list[str]:
    return [
        part for field, value in changes.items() for part in ("--set", f"{prefix}{field}={value}")
    ]


def commands() -> list[list[str]]:
    """Arguments of `dra`, one command after the other; their runs lie below ./runs."""
    aligned = settings(SMALL | SOURCES)
    recorded = {"loss.name": "pgd-at", "pool.kind": "local", "optim.norm_momentum": 0.01}
    base = settings(SMALL | SOURCES | recorded, "base.")
    axes = ["--set", "space={align.weight: [0.0, 1.0]}", "--set", "asha.grace_epochs=2"]
    one_at_a_time = ["--set", "asha.max_concurrent=1"]  # the order decides what ASHA compares
    trials = [f"runs/sweep/trials/trial-00{number}" for number in (0, 1)]
    probe = ["--sigmas", "0.1,0.5", "--layers", "all", "--images", "100", "--json", "probe.json"]
    return [
        ["teacher", "train", "digits-edm", "--name", "teacher", *settings(TEACHER)],
        ["synthesize", "--name", "images", *settings(SYNTHESIS)],
        ["train", "digits-dra", "--name", "local", *aligned, "--set", "pool.kind=local"],
        ["train", "digits-dra", "--name", "pool", *aligned, "--set", "pool.kind=pool"],
        ["train", "digits-dm-at", "--name", "ikl", *settings(SMALL | IKL)],
        ["evaluate", "runs/ikl", "--level", "fast", "--streams", "sample"],
        ["sweep", "digits-sweep", "--name", "sweep", *base, *axes, *one_at_a_time],
        *(["evaluate", trial] for trial in trials),
        ["compare", *trials, "--json", "compare.json"],
        ["report", "runs/sweep", "--json", "trials.json"],
        ["teacher", "probe", "runs/teacher", *probe],
    ]


def scenario(folder: Path) -> None:
    """Write the runs of every workload below `folder`/runs, and the tables that commands print."""
    for arguments in commands():
        dra(folder, *arguments)


def features(teacher: Path) -> np.ndarray:
    """Float32 [200, D] of a trained teacher. No other function here imports the package."""
    from dra_ray.config import Teacher
    from dra_ray.storage import Store
    from dra_ray.teachers import checkpoint
    from dra_ray.teachers.source import LocalTeacher, Request

    source = LocalTeacher(checkpoint.load(Store(str(teacher))), Teacher())
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8, generator=draws)
    sigma = torch.linspace(0.05, 0.5, 200)
    return source.encode(Request.seeded(images, torch.arange(200) % 10, sigma, 3)).numpy()


# -- what came out -------------------------------------------------------------------------------
# Numbers that differ between two runs of the same code: times, rates, the machine and versions.
# Those of the config are left to its digest.
VARYING = re.compile(
    r"(^|\.)(at|gpu_hours|hardware|versions|numerics|sources|files|stages|config)($|\.|\[)"
    r"|_s($|\.)|seconds"
)
TIMED_FILES = ("pool.jsonl", "lease.json")  # a row per second, a beat
NOT_IN_DIGEST = {
    *("description", "paper", "pool", "resources", "tracking"),
    *("workers", "cpus_per_worker", "gpus_per_worker", "max_concurrent"),
    *("max_failures", "budget", "prices"),
}
# Fields that a config has got since the record: at their default they are not in its digest.
ADDED: dict[str, Any] = {
    "data_seed": None,
    "cuda_graphs": False,
    "weights": "average",
    "level": 0.05,
    "constraints": [],
    "search": {"method": "grid", "startup_trials": 8, "points": [], "warm_start": None},
    "repeats": {"seeds": 1, "of": "finalists"},
    "scheduler": "noise_aware",
    "fidelity": {
        "apgd_from": None,
        "apgd_images": None,
        "apgd_steps": 20,
        "finalists": "none",
        "best": 3,
        "workers": 1,
        "gpus_per_worker": 0.0,
    },
    "wire": "float32",
    "window_images": None,
    "replace": True,
    "background": "none",
    "adr_temperature": [2.0, 1.0],
    "adr_share": [0.7, 0.95],
    "target": "teacher",
    "canonical": {"uri": None, "images": None},
    "distill": {
        "weight": 0.0,
        "align": 0.5,
        "cluster": 0.5,
        "cka": 1.0,
        "samples": 0.0,
        "warmup_epochs": 5,
        "per_step": 128,
        "temperature": 0.1,
        "projection": 128,
    },
    "transform": "none",
    "whiten_dim": 16,
    "statistics_images": 2048,
    "spatial_norm": False,
    "terms": [],
    "loss": "cosine",
    "temperature": 0.1,
    "warmup_epochs": 0,
    "decay": "none",
    "projector_lr": None,
    "norm_momentum": 0.01,
    "norm_first_batch": True,
    "first": "clean",
    "projector_weight_decay": None,
    "tokens": False,
}
CHECKPOINT = r"checkpoint_[^/]*[0-9][^/]*/"
# Files that Ray writes for itself; a checkpoint's folder is named by the time.
RAYS_OWN = r"/tune/|/checkpoints/[^/]*/[^/]*$|/\.[^/]*$"
ROOT = "/root-of-the-runs"


def measure(folder: Path) -> dict[str, Any]:
    """What `scenario` wrote to `folder`.

    `structure`: names of files, keys of JSON records, digests of configs; alike on every machine.
    `bits`: SHA-256 of weights, images, verdicts and features; of one CPU and version of torch.
    `numbers`: losses, accuracies and norms of arrays; close to each other on other machines.
    """
    names: set[str] = set()
    keys: dict[str, list[str]] = {}
    bits: dict[str, str] = {}
    numbers: dict[str, float] = {}
    chunks: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = re.sub(CHECKPOINT, "checkpoint_TIME/", path.relative_to(folder).as_posix())
        if re.search(RAYS_OWN, name) or "lease.json" in path.name:  # who drives it, not what it is
            continue
        if "/chunks/" in name:  # which ones there are depends on the verdicts before them
            folder_name = name.rpartition("/")[0]
            chunks.setdefault(folder_name, {}).update(_arrays(path, prefix=f"{path.stem}."))
            continue
        names.add(name)
        if path.suffix in (".json", ".jsonl"):
            values = dict(_leaves(_json(path)))
            keys[name] = sorted({re.sub(r"\[\d+\]", "[]", key) for key in values})
            if path.name not in TIMED_FILES and "/checkpoints/" not in name:
                numbers |= {f"{name}:{key}": x for key, x in values.items() if _steady(key, x)}
        elif "/checkpoints/" not in name and (arrays := _arrays(path)):
            bits[name] = _sha256(arrays)
            numbers[f"{name}:norm"] = _norm(arrays)
    bits |= {name: _sha256(arrays) for name, arrays in chunks.items()}
    encoded = {"features": features(folder / "runs/teacher")}
    bits["features"], numbers["features:norm"] = _sha256(encoded), _norm(encoded)
    manifests = sorted(folder.rglob("manifest.json"))
    digests = {
        path.parent.relative_to(folder).as_posix(): _portable_digest(path, folder)
        for path in manifests
    }
    images = _json(folder / "runs/images/manifest.json")
    bits["runs/images/manifest.json:digest"] = images["digest"]
    return {
        "structure": {"files": sorted(names), "keys": keys, "config digests": digests},
        "bits": bits,
        "numbers": numbers,
    }


def _json(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name -> value that is no list or dictionary; an empty one counts as a value."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _leaves(below, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from _leaves(below, f"{key}[{index}]")
    else:
        yield key, value


def _steady(key: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and not VARYING.search(key)


def _arrays(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a file of weights, verdicts or images; none of another file."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return {name: tensor.numpy() for name, tensor in load(data).items()}
    if path.suffix == ".npz":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            steady = [name for name in arrays.files if name not in ("seconds", "numerics")]
            return {prefix + name: arrays[name] for name in steady}
    if path.suffix == ".npy":  # rows; the record is older than they, and has labels as int64
        rows = np.load(io.BytesIO(data), allow_pickle=False)
        columns = {name: rows[name] for name in rows.dtype.names or ()}
        return columns | {"label": columns["label"].astype(np.int64)}
    if path.suffix == ".png":
        return {"pixels": np.array(Image.open(io.BytesIO(data)))}
    return {}


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, types, shapes and values, so not of the container, which may hold a time."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype.str} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _norm(arrays: Mapping[str, np.ndarray]) -> float:
    """Of all numbers together; summed exactly, since files do not give arrays in a fixed order."""
    counted = [array for array in arrays.values() if array.dtype.kind in "biuf"]
    squares = (float(np.square(array.astype(np.float64)).sum()) for array in counted)
    return math.sqrt(math.fsum(squares))


def _portable_digest(path: Path, folder: Path) -> str:
    """The digest of a manifest's config as if the runs lay at `ROOT`; "" if it depends on weights.

    A config names its teacher by an absolute path, so the manifest's own digest differs between
    folders. It is checked against the rule that gives it; the same rule digests the moved config.
    """
    manifest = _json(path)
    if manifest["kind"] == "synthetic":
        return ""
    assert manifest["digest"] == _digest(manifest["config"]), f"{path}: the digest has another rule"
    return _digest(json.loads(json.dumps(manifest["config"]).replace(str(folder.resolve()), ROOT)))


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(_kept(tree), sort_keys=True).encode()).hexdigest()


def _kept(tree: Any, section: str = "") -> Any:
    if isinstance(tree, dict):
        added = ADDED | ADDED_IN.get(section, {})
        return {
            key: _kept(value, key)
            for key, value in tree.items()
            if key not in NOT_IN_DIGEST and (key not in added or value != added[key])
        }
    return tree


# the same of fields whose names other sections have too
ADDED_IN: dict[str, dict[str, Any]] = {
    "model": {"sigma": 0.06, "layer": None},
    "teacher": {"precision": "fp32", "channels_last": False, "compile": False},
}


# -- against the record --------------------------------------------------------------------------
# CPUs round differently and training amplifies it: accuracies of 64 or 16 images may move by a few
# images.
RELATIVE, ABSOLUTE = 0.1, 0.15
COMPARABLE = re.compile(r"accuracy|loss|after_attack\.|:norm$")


def machine() -> str:
    """What the bits depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def differences(measured: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[str, list[str]]:
    """How the two were compared, and what differs, one line each."""
    lines = _changes(_flat(measured["structure"]), _flat(recorded["structure"]))
    if same := recorded["machines"].get(machine()):
        lines += _changes(measured["bits"], same["bits"])
        # intervals and p-values come from a library that may order its sums anew
        lines += _changes(measured["numbers"], same["numbers"], 1e-12)
        return f"bits, as recorded on {machine()}", lines
    name, other = next(iter(recorded["machines"].items()))
    now, before = (
        {key: x for key, x in numbers.items() if COMPARABLE.search(key)}
        for numbers in (measured["numbers"], other["numbers"])
    )
    lines += _changes(now, before, RELATIVE, ABSOLUTE)
    bound = f"accuracies, losses and norms within {RELATIVE:.0%} or {ABSOLUTE} of {name}'s"
    return f"{bound}, since no bits are recorded for {machine()}", lines


def _flat(structure: Mapping[str, Any]) -> dict[str, Any]:
    keys = {f"keys of {name}": names for name, names in structure["keys"].items()}
    digests = {f"config digest of {run}": x for run, x in structure["config digests"].items()}
    return dict.fromkeys(structure["files"], "a file") | keys | digests


def _changes(
    now: Mapping[str, Any],
    before: Mapping[str, Any],
    relative: float = 0.0,
    absolute: float = 0.0,
) -> list[str]:
    lines = [f"{name} is gone" for name in before.keys() - now.keys()]
    lines += [f"{name} is new" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if isinstance(old, list):
            lines += [f"{name}: {key} is gone" for key in set(old) - set(new)]
            lines += [f"{name}: {key} is new" for key in set(new) - set(old)]
        elif isinstance(old, str):
            lines += [f"{name} was {old}, is {new}"] * (old != new)
        elif not math.isclose(old, new, rel_tol=relative, abs_tol=absolute):
            lines.append(f"{name} was {old}, is {new}")
    return sorted(lines)


def main(what: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        scenario(Path(folder))
        measured = measure(Path(folder))
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"machines": {}}
    if what == "record":
        mine = {machine(): {part: measured[part] for part in ("bits", "numbers")}}
        record = {"structure": measured["structure"], "machines": recorded["machines"] | mine}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return 0
    how, lines = differences(measured, recorded)
    print(f"compared {how}", *lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    if sys.argv[1:] not in (["record"], ["compare"]):
        sys.exit("usage: python -m tests.parity.same_numbers record|compare")
    sys.exit(main(sys.argv[1]))
