"""`python -m pu_ray` is `pu-ray`."""

from pu_ray.cli import main

main()
