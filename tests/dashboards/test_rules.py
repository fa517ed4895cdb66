"""promtool reads our configuration, and each alert fires when it should, alone, and not before."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "dra_ray" / "dashboards"
pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")

RUN = 'run="a-1",trial="",SessionName="s",WorkerId="w"'
POOL = 'teacher="t",SessionName="s"'
STEP = "ray_dra_train_step_seconds_total"
Case = tuple[str, int, dict[str, str], dict[str, str]]
# alert, minute, series that provoke it, the same just below what provokes it
CASES: list[Case] = [
    (
        "PoolSaturated",
        8,
        {
            f'ray_dra_teacher_demand{{{POOL},WorkerId="w"}}': "3.9x20",
            f'ray_dra_teacher_replicas_limit{{{POOL},WorkerId="v"}}': "4x20",
        },
        {
            f'ray_dra_teacher_demand{{{POOL},WorkerId="w"}}': "3.7x20",
            f'ray_dra_teacher_replicas_limit{{{POOL},WorkerId="v"}}': "4x20",
        },
    ),
    (
        "TrialStalled",
        40,
        {f"ray_dra_train_step{{{RUN}}}": "0+1x10 10x40"},
        # one that is slow, and one that has ended
        {
            f"ray_dra_train_step{{{RUN}}}": "0 0x9 1x9 2x9 3x9 4x9",
            f"ray_dra_train_step{{{RUN.replace('a-1', 'b-2')}}}": "0+1x30 stale",
        },
    ),
    (
        "TeacherWait",
        25,
        {
            f'{STEP}{{{RUN},part="teacher_wait"}}': "0+6x30",
            f'{STEP}{{{RUN},part="attack"}}': "0+54x30",
        },
        {
            f'{STEP}{{{RUN},part="teacher_wait"}}': "0+2x30",
            f'{STEP}{{{RUN},part="attack"}}': "0+58x30",
        },
    ),
    (
        "NodeChurn",
        12,
        {
            f'ray_node_cpu_count{{SessionName="s",ip="10.0.0.{node}"}}': values
            for node, values in enumerate(["1x20", "1x5 stale", "1x5 stale", "1x5 stale"])
        },
        {
            f'ray_node_cpu_count{{SessionName="s",ip="10.0.0.{node}"}}': values
            for node, values in enumerate(["1x20", "1x20", "1x5 stale", "1x5 stale"])
        },
    ),
    (
        "SpendAbovePlan",
        5,
        {
            'ray_dra_sweep_spent{run="s-1",what="images",WorkerId="w"}': "101x10",
            'ray_dra_sweep_planned{run="s-1",what="images",WorkerId="w"}': "100x10",
        },
        {
            'ray_dra_sweep_spent{run="s-1",what="images",WorkerId="w"}': "100x10",
            'ray_dra_sweep_planned{run="s-1",what="images",WorkerId="w"}': "100x10",
            'ray_dra_sweep_planned{run="s-2",what="images",WorkerId="w"}': "1x10",
        },
    ),
    (
        "StorageErrors",
        5,
        {'ray_dra_storage_errors_total{SessionName="s",NodeAddress="n",WorkerId="w"}': "0 0 1x10"},
        {'ray_dra_storage_errors_total{SessionName="s",NodeAddress="n",WorkerId="w"}': "0x12"},
    ),
]


def promtool(*arguments: str, folder: Path = FOLDER) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_configuration() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "rules/alerts.yml")


def test_every_alert_is_tried() -> None:
    groups = yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    assert [case[0] for case in CASES] == alerts


@pytest.mark.parametrize(("alert", "minute", "loud", "quiet"), CASES, ids=[c[0] for c in CASES])
def test_an_alert_fires_alone_and_not_before(
    alert: str, minute: int, loud: dict[str, str], quiet: dict[str, str], tmp_path: Path
) -> None:
    def case(series: dict[str, str], fires: bool) -> dict[str, object]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] * fires,
                }
            ],
        }

    tests = {
        "rule_files": [str(FOLDER / "rules" / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [case(loud, True), case(quiet, False)],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", "test.yml", folder=tmp_path)
