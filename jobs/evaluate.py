"""Ray job: AutoAttack on a trained run. `python evaluate.py --storage URI --name NAME`"""

from collections.abc import Callable, Mapping

from dra_ray.cli import job
from dra_ray.runs import EvaluationProgress
from dra_ray.storage import Store
from dra_ray.workloads import evaluate


def attack(run: Store, progress: Callable[[EvaluationProgress], None]) -> Mapping[str, object]:
    return evaluate.evaluate(run, progress=progress).tree()


if __name__ == "__main__":
    job.main(None, attack)
