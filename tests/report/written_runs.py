"""Writers of realistic run directories: every value comes from a formula, so a test can compute it
again.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from dra_ray import data, students
from dra_ray.config import Asha, Data, Experiment, Model, Optim, Quickstart, Sweep, UNet
from dra_ray.evaluation.intervals import wilson
from dra_ray.storage import Store
from dra_ray.students import checkpoint as student_checkpoint
from dra_ray.sweeps import spaces
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM

SPACE = {
    "align.weight": [0.0, 0.5, 2.0],
    "align.sigma": [0.05, 0.2, 0.8],
    "synthetic.images": [0, 4000],
}
IMAGES, EPOCHS, TRAIN_IMAGES, START = 360, 12, 1181, 1_764_000_000.0


def sweep_config() -> Sweep:
    base = Experiment(optim=Optim(epochs=EPOCHS))
    return Sweep(
        description="λ, σ & synthetic images",
        base=base,
        space=SPACE,
        trials=10,
        asha=Asha(grace_epochs=2, reduction_factor=2),
    )


def chosen() -> dict[str, dict[str, Any]]:
    """The changed fields of each trial."""
    trees = {
        name: experiment.model_dump()
        for name, experiment in spaces.experiments(sweep_config()).items()
    }
    return {
        name: {field: tree[field.split(".")[0]][field.split(".")[1]] for field in SPACE}
        for name, tree in trees.items()
    }


def robust(fields: dict[str, Any], epoch: int) -> float:
    """Robust validation accuracy: best at a middling weight and sigma, better with synthetic
    images.
    """
    top = (
        0.40
        + 0.05 * math.sin(fields["align.weight"])
        + 0.02 * (fields["align.sigma"] == 0.2) * (fields["align.weight"] > 0)
    )
    top += 0.03 * (fields["synthetic.images"] > 0)
    return round(256 * top * (1 - math.exp(-epoch / 2.5))) / 256


def clean(fields: dict[str, Any], epoch: int) -> float:
    return (
        round(256 * (0.95 - 0.03 * fields["align.weight"] / 2) * (1 - math.exp(-epoch / 1.2))) / 256
    )


def teacher() -> EDM:
    torch.manual_seed(0)
    return EDM(UNet(model_channels=32, num_blocks=1), 8, 1, 10)


def png(side: int = 160) -> bytes:
    grid = np.add.outer(np.arange(side) * 3, np.arange(side) * 5).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, format="PNG")
    return buffer.getvalue()


def manifest(run: Store, kind: str, config: dict[str, Any], **more: Any) -> None:
    facts = {
        "kind": kind,
        "name": run.name,
        "created": "2025-11-24T16:00:00+00:00",
        "config": config,
        "digest": "d" * 64,
        "status": "done",
    }
    (run / "manifest.json").write_json(
        facts | {"versions": {"python": "3.11.9", "torch": "2.14.1", "ray": "2.60.0"}} | more
    )


def write_train(run: Store, fields: dict[str, Any], epochs: int = EPOCHS, **more: Any) -> None:
    manifest(run, "train", Experiment().model_dump(mode="json"), **more)
    aligned = fields["align.weight"] > 0
    (run / "metrics.jsonl").write_jsonl(
        {
            "step": 9 * epoch,
            "epoch": epoch,
            "images_seen": TRAIN_IMAGES * epoch,
            "loss": 2.4 * math.exp(-epoch / 8) + 0.9,
            "loss_clean": 1.6 * math.exp(-epoch / 6) + 0.5 + 0.05 * aligned,
            "loss_robust": 0.2 + 0.02 * epoch / EPOCHS - 0.05 * aligned,
            "loss_align": 0.9 * math.exp(-epoch / 5) + 0.3 if aligned else 0.0,
            "lr": 0.2 * (1 - epoch / EPOCHS),
            "clean_accuracy": clean(fields, epoch),
            "robust_accuracy": robust(fields, epoch),
            "elapsed_s": 8.5 * epoch,
            "at": START + 8.5 * epoch,
        }
        for epoch in range(1, epochs + 1)
    )


def verdicts(shift: int) -> np.ndarray:
    """Which test images are robust; two shifts agree on most images."""
    index = np.arange(IMAGES)
    return (index * 7 % 100 < 38) | (index % 24 < shift)


def write_verdicts(run: Store, robust: np.ndarray) -> None:
    """Of every test image: its label, and whether it is right when clean, under PGD, and under
    AutoAttack.
    """
    index = np.arange(len(robust))
    pgd = robust | (index % 30 == 5)
    clean = pgd | (index % 3 > 0)
    (run / "evaluation/per_sample.npz").write_npz(
        robust=robust, pgd_correct=pgd, clean_correct=clean, labels=index % 10
    )


def write_evaluation(run: Store, flags: list[str], shift: int) -> None:
    robust_now = verdicts(shift)
    accuracy = float(robust_now.mean())
    after = {
        "apgd-ce": accuracy + 10 / IMAGES,
        "apgd-t": accuracy + 2 / IMAGES,
        "fab-t": accuracy + 2 / IMAGES,
        "square": accuracy,
    }
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / IMAGES)
    (run / "evaluation/autoattack.json").write_json(
        {
            "images": IMAGES,
            "clean_accuracy": 0.93 - 0.005 * shift,
            "pgd_accuracy": accuracy + 12 / IMAGES,
            "pgd_steps": 20,
            "autoattack_accuracy": accuracy,
            "interval": [accuracy - half, accuracy + half],
            "after_attack": after,
            "flags": flags,
            "threat": {"norm": "linf", "eps_255": 8.0, "step_255": 2.0, "steps": 10},
            "seed": 0,
            "batch": 128,
            "elapsed_s": 61.25,
            "versions": {},
        }
    )
    write_verdicts(run, robust_now)


def kept(eps_255: float) -> float:
    """Accuracy under PGD at a radius."""
    return round(IMAGES * 0.9 * math.exp(-eps_255 / 9)) / IMAGES


def under(corruption: int, severity: int) -> float:
    return 0.9 - 0.03 * corruption - 0.08 * severity


SPENT = {"clean": 3.25, "apgd-ce": 22.5, "apgd-t": 101.0, "fab-t": 75.0, "square": 130.5}
CORRUPTIONS = ("gaussian_noise", "motion_blur", "jpeg_compression")


def write_attacked(run: Store) -> None:
    """A training run with its weights, evaluated with everything that an evaluation can measure;
    some images are fooled, within the ball.
    """
    write_train(run, {"align.weight": 0.5, "align.sigma": 0.2, "synthetic.images": 0})
    write_evaluation(run, ["With 10 classes all is well"], 3)
    settings = Experiment(data=Data(test_images=IMAGES), model=Model(name="wrn-10-1"))
    manifest(run, "train", settings.model_dump(mode="json"))
    images = data.load(settings.data)
    torch.manual_seed(0)
    student_checkpoint.save(run, students.build(settings.model, images.shape).state_dict())
    file = run / "evaluation" / "autoattack.json"
    file.write_json(
        file.read_json()
        | {
            "curve": [
                {
                    "eps_255": eps,
                    "accuracy": kept(eps),
                    "interval": list(wilson(round(IMAGES * kept(eps)), IMAGES)),
                }
                for eps in (2.0, 8.0, 16.0)
            ]
        }
        | {"corruptions": corruptions()}
        | {
            "attack_s": SPENT,
            "resumed_batches": 1,
            "version": "standard",
            "level": "reference",
            "streams": "batch",
            "batch_asked": 256,
        }
        | {
            "numerics": {"device": "cpu", "threads": 1, "matmul_tf32": False},
            "versions": {"torch": "2.14.1", "pyautoattack": "0.2.0"},
        }
    )
    clean, labels = data.to_float(data.in_memory(images.test).images), images.test.labels
    failures = first_failures()
    fooled = torch.tensor([failure not in ("", "clean") for failure in failures])
    sign = torch.where(torch.arange(clean[0].numel()).view(clean.shape[1:]) % 2 == 0, 1.0, -1.0)
    adversarial = torch.where(
        fooled[:, None, None, None], (clean + sign * 8 / 255).clamp(0, 1), clean
    )
    (run / "evaluation/adversarial.npz").write_npz(
        images=adversarial.numpy(), labels=labels.numpy()
    )
    (run / "evaluation/per_sample.npz").write_npz(
        robust=verdicts(3), first_failure=np.array(failures), labels=labels.numpy()
    )
    for stage, batches in {"clean": 3, "apgd-ce": 3, "apgd-t": 2, "fab-t": 2, "square": 2}.items():
        for k in range(batches):
            (run / f"evaluation/chunks/{stage}-{k:05d}.npz").write_npz(seconds=np.array(1.0))


def corruptions() -> dict[str, Any]:
    found = {
        (name, severity): under(i, severity)
        for i, name in enumerate(CORRUPTIONS)
        for severity in (1, 3, 5)
    }
    rows = [
        {"name": name, "severity": severity, "accuracy": accuracy}
        for (name, severity), accuracy in found.items()
    ]
    return {"mean": sum(found.values()) / len(found), "rows": rows, "source": "generated"}


def first_failures() -> list[str]:
    """What fooled the classifier first on each image; 10 are wrong anyway."""
    names = ("apgd-ce", "apgd-t", "square")
    return [
        "" if robust else "clean" if index % 36 == 1 else names[index % 3]
        for index, robust in enumerate(verdicts(3))
    ]


def last_epoch(place: int) -> int:
    """Rungs at epochs 2, 4 and 8 each stop some of the trials, by their place in robust
    accuracy.
    """
    return 2 if place >= 7 else 4 if place >= 5 else 8 if place >= 3 else EPOCHS


def write_sweep(run: Store, **more: Any) -> None:
    fields = chosen()
    order = sorted(fields, key=lambda name: -robust(fields[name], EPOCHS))
    baseline = next(name for name in order if fields[name]["align.weight"] == 0)
    order.insert(
        min(order.index(baseline), 2), order.pop(order.index(baseline))
    )  # the baseline is trained to the end
    best = next(name for name in order if fields[name]["align.weight"] > 0)
    rows = []
    for place, name in enumerate(order):
        last = last_epoch(place)
        for epoch in range(1, last + 1):
            decision = "continue" if epoch < last else "done" if last == EPOCHS else "stop"
            rows.append(
                {
                    "trial": name,
                    "epoch": epoch,
                    "images_seen": TRAIN_IMAGES * epoch,
                    "robust_accuracy": robust(fields[name], epoch),
                }
                | {
                    "clean_accuracy": clean(fields[name], epoch),
                    "decision": decision,
                    "at": START + 40 * place + 8.5 * epoch,
                }
            )
        write_train(run / "trials" / name, fields[name], last)
    (run / "rungs.jsonl").write_jsonl(sorted(rows, key=lambda row: row["at"]))
    manifest(
        run,
        "sweep",
        sweep_config().model_dump(mode="json"),
        trials=fields,
        finals={"dra": best, "baseline": baseline},
        **more,
    )
    write_evaluation(run / "trials" / best, [], 3)
    write_evaluation(
        run / "trials" / baseline,
        ["Square broke 1.1 % of the images that white-box attacks left"],
        2,
    )
    write_pool(run)


def write_pool(run: Store) -> None:
    rows = []
    for second in range(0, 420, 2):
        demand = 0.3 + 1.9 * math.exp(-(((second - 160) / 90) ** 2)) + 0.1 * math.sin(second / 9)
        row = {
            "at": START + second,
            "running": 2 if 76 <= second < 282 else 1,
            "target": 2 if 70 <= second < 280 else 1,
            "demand": demand,
        }
        rows.append(
            row
            | {
                "clients": 2,
                "requests": 7 * second,
                "images": 7 * 128 * second,
                "retries": second // 200,
            }
        )
    (run / "pool.jsonl").write_jsonl(rows)


def write_quickstart(
    run: Store,
    description: str = "Everything on a laptop: teacher, synthetic images, ten classifiers",
    **more: Any,
) -> Store:
    seconds = {"teacher": 141.5, "synthesis": 22.0, "sweep": 431.2, "evaluation": 122.5}
    stages = [{"name": name, "seconds": spent} for name, spent in seconds.items()]
    config = Quickstart(description=description, sweep=sweep_config()).model_dump(mode="json")
    manifest(
        run,
        "quickstart",
        config,
        stages=stages,
        hardware={"cpu": "2 cores", "memory_gib": 7.8},
        **more,
    )
    manifest(run / "teacher", "teacher", config["teacher"])
    seen = range(10_000, 200_001, 10_000)
    (run / "teacher/metrics.jsonl").write_jsonl(
        {
            "images_seen": n,
            "loss": 0.3 + math.exp(-n / 4e4),
            "lr": 1e-3,
            "elapsed_s": n / 1500,
            "at": START - 200 + n / 1500,
        }
        for n in seen
    )
    digest = checkpoint.save(run / "teacher", teacher(), {"images_seen": 200_000})
    for n in (50_000, 100_000, 200_000):
        (run / f"teacher/samples-{n}.png").write_bytes(png())
    counts = {str(label): 400 for label in range(10)}
    manifest(
        run / "synthetic",
        "synthetic",
        config["synthesis"],
        counts=counts,
        images=4000,
        teacher_digest=digest,
        sampler={"name": "heun", "steps": 18},
    )
    (run / "synthetic/samples.png").write_bytes(png())
    write_sweep(run / "sweep")
    return run
