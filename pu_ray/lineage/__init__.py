"""Where images went, and runs that never choose them again: `pu-ray trace` and `pu-ray forget`."""
