"""Fixtures for every kind of test: one local Ray for the session, tiny teachers and lakes."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator

import httpx
import pytest
from moto.server import ThreadedMotoServer

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


# -- S3 ----------------------------------------------------------------------------------------------------

S3_SECRET = "a-secret-that-must-not-show"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 server of our own."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty bucket there; address and credentials are in the environment alone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    httpx.post(f"{s3_server}/moto-api/reset").raise_for_status()
    httpx.put(f"{s3_server}/bucket").raise_for_status()
    return "s3://bucket"
