"""Ray job: train one student. `python train.py CONFIG --storage URI --name NAME [--set FIELD=VALUE
...]`
"""

from dra_ray.cli import job
from dra_ray.config import Experiment
from dra_ray.workloads import train

if __name__ == "__main__":
    job.main(Experiment, train.fit)
