"""Ray job: train a diffusion teacher. `python train_teacher.py CONFIG --storage URI --name NAME
[--set FIELD=VALUE ...]`
"""

from dra_ray.cli import job
from dra_ray.config import TeacherTraining
from dra_ray.workloads import train_teacher

if __name__ == "__main__":
    job.main(TeacherTraining, train_teacher.fit)
