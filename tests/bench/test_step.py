"""The matrix of `dra bench step`: every way to compute takes the textbook's step."""

from __future__ import annotations

import torch

from dra_ray.bench import step


def test_every_way_takes_the_same_step_and_says_what_it_took() -> None:
    threads = torch.get_num_threads()
    figures = step.compare(
        student="wrn-10-1",
        batch=8,
        resolution=8,
        attack_steps=2,
        rounds=2,
        threads=1,
        compiled=False,
        device="cpu",
    )
    torch.set_num_threads(threads)
    rows = {row["step"]: row for row in figures["rows"]}
    assert {"textbook", "eager"} <= rows.keys() <= {"textbook", "eager", "bf16"}
    assert rows["textbook"]["ratio"] == 1
    assert rows["eager"]["loss_rel_diff"] < 1e-4
    for row in rows.values():
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert 0 < row["peak_share"] < 1.5
        assert 0 < row["memory_gib"] < 16
