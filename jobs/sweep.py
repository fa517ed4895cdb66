"""Ray job: run or resume a sweep. `python sweep.py CONFIG --storage URI --name NAME [--set FIELD=VALUE ...]`"""

from dra_ray import job, sweep
from dra_ray.config import Sweep

if __name__ == "__main__":
    job.main(Sweep, sweep.run)
