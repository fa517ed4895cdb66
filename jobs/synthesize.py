"""Ray job: sample synthetic images. `python synthesize.py CONFIG --storage URI --name NAME [--set
FIELD=VALUE ...]`
"""

from dra_ray.cli import job
from dra_ray.config import Synthesis
from dra_ray.workloads import synthesize

if __name__ == "__main__":
    job.main(Synthesis, synthesize.run)
