"""`python -m dra_ray.cli`."""

from dra_ray.cli.main import main

main()
