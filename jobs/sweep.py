"""Ray job: run or resume a sweep. `python sweep.py CONFIG --storage URI --name NAME [--set
FIELD=VALUE ...]`
"""

from dra_ray.cli import job
from dra_ray.config import Sweep
from dra_ray.workloads import sweep

if __name__ == "__main__":
    job.main(Sweep, sweep.run)
