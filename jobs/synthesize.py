"""Ray job: sample synthetic images. `python synthesize.py CONFIG --storage URI --name NAME [--set FIELD=VALUE ...]`"""

from dra_ray import job, synthesize
from dra_ray.config import Synthesis

if __name__ == "__main__":
    job.main(Synthesis, synthesize.run)
