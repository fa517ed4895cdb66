"""Ray job: AutoAttack on a trained run, or on the best trials of a sweep. `python evaluate.py
--storage URI --name NAME`
"""

from collections.abc import Callable, Mapping

from dra_ray import runs
from dra_ray.cli import job
from dra_ray.storage import Store
from dra_ray.workloads import evaluate


def attack(run: Store, progress: Callable[[runs.EvaluationProgress], None]) -> Mapping[str, object]:
    """Scores of the run, or by role those of the sweep's best trials."""
    if best := runs.finalists(run):
        results = evaluate.evaluate_many(list(best.values()), progress=progress)
        return {role: result.tree() for role, result in zip(best, results, strict=True)}
    return evaluate.evaluate(run, progress=progress).tree()


if __name__ == "__main__":
    job.main(None, attack)
