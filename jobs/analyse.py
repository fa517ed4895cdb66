"""Ray job: what the paper looked at, for a set of models, as a page and a JSON file in NAME.
`python analyse.py CONFIG --storage URI --name NAME [--set FIELD=VALUE ...]`
"""

from dra_ray.cli import job
from dra_ray.config import Analysis
from dra_ray.workloads import look

if __name__ == "__main__":
    job.main(Analysis, look.analyse)
