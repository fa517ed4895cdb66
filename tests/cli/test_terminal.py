"""Tables of the terminal fit 80 columns, cut no name, and show numbers as people write them."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dra_ray import config, plan, report, runs
from dra_ray.bench import policy
from dra_ray.cli import terminal
from dra_ray.evaluation import compare
from dra_ray.pool.records import Totals
from dra_ray.report import words
from dra_ray.storage import Store

WIDTH = 80
ROW = runs.ValidationRow(
    step=1234,
    epoch=16,
    images_seen=1_234_567,
    loss=0.51234567,
    loss_clean=0.4,
    loss_robust=0.1,
    loss_align=0.0,
    lr=2e-06,
    clean_accuracy=0.91234,
    robust_accuracy=0.4567,
    images=256,
    verdicts=runs.pack_verdicts(np.ones(256, bool)),
    elapsed_s=4321.0,
    at=1_790_000_000.0,
)


def names(rows: list[dict[str, Any]]) -> list[str]:
    """Texts without a space, which a table may not break."""
    return [v for row in rows for v in row.values() if isinstance(v, str) and v and " " not in v]


def check(rows: list[dict[str, Any]], title: str = "a title", hidden: tuple[str, ...] = ()) -> str:
    shown = terminal.lines(rows, title, WIDTH, hidden)
    for line in shown:
        assert len(line) <= WIDTH or " " not in line.strip() or len(line.split()[-1]) > 40, line
    text = "\n".join(shown)
    for name in names([{k: v for k, v in row.items() if k not in hidden} for row in rows]):
        assert name in text, name
    assert "1790000000" not in text.replace(",", "")
    return text


def test_a_validation_has_no_unix_time_and_no_verdicts() -> None:
    text = check([ROW.on_disk()], "last epoch", hidden=("verdicts",))
    assert "2026-" in text
    assert "1,234,567" in text
    assert "91.23%" in text
    assert "1 h 12 min" in text
    assert "2e-06" in text
    assert ROW.verdicts not in text


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["quickstart", "digits-sweep", "cifar10-wrn-28-10-1m-dra"])
def test_plans_fit(name: str) -> None:
    rows = plan.rows(plan.plan(config.load(name), tflops=1.0))
    text = check([{"quantity": row.quantity, "value": row.text} for row in rows if row.stage])
    assert "─" in text


def test_recipes_fit() -> None:
    rows = [
        {
            "recipe": name,
            "paper": "Tables 1, 2",
            "clean": 95.22,
            "AA": 71.77,
            "description": config.load(name).description,
        }
        for name in config.recipe_names()
    ]
    check(rows)


def test_trials_and_scores_fit(quickstart: Store, attacked: Store) -> None:
    for run in (quickstart, attacked):
        check(report.rows(run))


def test_a_comparison_fits() -> None:
    a, b = np.arange(300) % 3 > 0, np.arange(300) % 5 > 0
    rows = [
        {"what": what, **dataclasses.asdict(compare.compare(a, b))}
        for what in ("Clean", "PGD-20", "AutoAttack")
    ]
    check(compare.table({"rows": rows}), "A: runs/digits-dm-at, B: runs/digits-dra, " * 3)


@pytest.mark.seconds
def test_pools_and_policies_fit() -> None:
    workload = policy.Workload(gpus=2, sweeps_at_h=(9.0,), trials=2, node_start_s=60.0, seed=0)
    check([one.row.as_json() for one in policy.compare(workload, policy.suited(workload))])
    totals = Totals(requests=12345, images=1e6, wait_s=0.0321)
    text = check([{"trial": "trial-000", **vars(totals)}])
    assert "1,000,000" in text
    assert "0.0321 s" in text


def test_a_wide_table_becomes_records() -> None:
    row: dict[str, Any] = {f"a_field_number_{i}": (i + 1) * 10**9 for i in range(9)}
    shown = terminal.lines([row, row], "wide", WIDTH)
    assert shown.count("a field number 7  8,000,000,000") == 2
    assert terminal.lines([], "nothing", WIDTH) == ["nothing", "  (none)"]


def test_numbers_as_people_write_them() -> None:
    assert [terminal.duration(s) for s in (0.01234, 12.34, 200, 7500)] == [
        "0.0123 s",
        "12.3 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert terminal.cell("images_per_s", 1234.5) == "1,234"
    assert terminal.cell("pflop", 0.123456) == "0.1235"
    assert terminal.cell("compiled", True) == "yes"
    assert terminal.cell("rung_epochs", [2, 4]) == "2, 4"


CODE = """
import logging, signal, time, os
from dra_ray.cli import terminal
with terminal.Bars() as bars:
    logging.getLogger("dra_ray").info("starting Ray on this machine")
    bars.show("train", 0.1, "training")
    {then}
"""


def run(then: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE.format(then=then), *argv],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_progress_says_what_is_waited_for_and_warnings_stay() -> None:
    done = run("logging.getLogger('dra_ray').warning('no room')")
    assert [line.split("] ")[-1] for line in done.stderr.splitlines()] == [
        "loading torch and Ray",
        "starting Ray on this machine",
        "training:  10%",
        "no room",
    ]


def test_ctrl_c_is_answered_at_once() -> None:
    done = run("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    assert terminal.STOPPING in done.stderr.splitlines()


@pytest.mark.seconds
def test_quiet_leaves_warnings() -> None:
    assert "a note" not in run("terminal.be_quiet(); bars.say('a note')").stderr
    done = run("terminal.be_quiet(); logging.getLogger('dra_ray').warning('no room')")
    assert done.stderr.splitlines()[-1] == "no room"


def test_json_holds_numbers(tmp_path: Path) -> None:
    file = str(tmp_path / "row.json")
    terminal.table([ROW.on_disk()], "last epoch", file, hidden=("verdicts",))
    assert json.loads(Path(file).read_text()) == [ROW.on_disk()]


def test_what_is_waited_for_is_said_before_what_comes_of_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dra_ray", "plan", "digits-dra", "--tflops", "0.1"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path) as run:
        os.close(theirs)
        shown = b""
        while b"planning digits-dra" not in shown:
            shown += os.read(ours, 1000)
        run.kill()
    os.close(ours)
    assert b"plan of digits-dra" not in shown


def test_a_pages_numbers_are_printed_with_ordinary_spaces(capsys) -> None:
    """As a sweep's answer is, which the page shows too; what a terminal would obey stays out."""
    written = f"{words.count(48_000)} images, {words.percent(0.5)}"
    assert words.THIN in written
    terminal.out.print(f"{written}\x1b[31m")
    assert capsys.readouterr().out == "48 000 images, 50.0 %\\x1b[31m\n"
