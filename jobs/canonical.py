"""Ray job: make canonical samples. `python canonical.py CONFIG --storage URI --name NAME [--set
FIELD=VALUE ...]`
"""

from dra_ray.cli import job
from dra_ray.config import Canonical
from dra_ray.workloads import canonical

if __name__ == "__main__":
    job.main(Canonical, canonical.run)
