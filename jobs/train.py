"""Ray job: train one student. `python train.py CONFIG --storage URI --name NAME [--set FIELD=VALUE ...]`"""

from dra_ray import job, train
from dra_ray.config import Experiment

if __name__ == "__main__":
    job.main(Experiment, train.fit)
