"""Ray job: AutoAttack on a trained run. `python evaluate.py --storage URI --name NAME`"""

from dra_ray.cli import job
from dra_ray.workloads import evaluate

if __name__ == "__main__":
    job.main(None, evaluate.evaluate)
