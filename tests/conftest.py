"""Fixtures for every kind of test: one local Ray for the session, tiny teachers and lakes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

# Set before anything imports Ray: its mode is read once per process, and a fresh local Ray would otherwise write a
# token into the home of whoever runs the tests.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Before torch loads OpenMP: see pu_ray.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private Ray with enough logical CPUs that actors never starve reads."""
    from cluster.session import ray_session

    with ray_session(address=None, verbose=False, needed_cpus=6):
        yield
