"""Ray job: train a diffusion teacher. `python teach.py CONFIG --storage URI --name NAME [--set FIELD=VALUE ...]`"""

from dra_ray import job, teach
from dra_ray.config import TeacherTraining

if __name__ == "__main__":
    job.main(TeacherTraining, teach.fit)
