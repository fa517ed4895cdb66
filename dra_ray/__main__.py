"""`python -m dra_ray`, the same as `dra`."""

from dra_ray.cli.main import main

main()
