"""Ray job: AutoAttack on a trained run. `python evaluate.py --storage URI --name NAME`"""

from collections.abc import Callable
from typing import Any

from dra_ray.cli import job
from dra_ray.storage import Store
from dra_ray.workloads import evaluate


def attack(run: Store, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    return evaluate.evaluate(run, progress=progress).tree()


if __name__ == "__main__":
    job.main(None, attack)
