"""`dra bench teacher`: what each way to compute is worth, of a folder and of a recipe."""

from __future__ import annotations

import torch

from dra_ray.bench import teacher


def test_every_way_gives_the_feature_up_to_its_rounding() -> None:
    threads = torch.get_num_threads()
    for name in ("package:fashion-edm-10", "digits-edm"):
        figures = teacher.compare(name, batch=4, rounds=2, threads=1, compiled=False, device="cpu")
        rows = {row["way"]: row for row in figures["rows"]}
        assert {"fp32", "channels last"} <= rows.keys() <= {"fp32", "channels last", "bf16"}
        assert rows["fp32"]["ratio"] == 1
        assert rows["fp32"]["difference"] == 0
        assert rows["channels last"]["difference"] < 1e-4
        assert all(row["images_per_s"] > 0 and row["difference"] < 0.1 for row in rows.values())
        assert figures["beside"].keys() == {"noise", "digest", "copies"}
    torch.set_num_threads(threads)
