"""A job submitted through Ray's Jobs API to a cluster that somebody else started, with its token and without."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, SMALL, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Started:
    """A cluster of `ray start`.

    Attributes:
        address: The dashboard's URL.
        environment: Of a client that knows the token.
    """

    address: str
    environment: dict[str, str]

    def submit(self, job: Path, **variables: str) -> tuple[int, dict[str, Any], str]:
        """Exit status, what was printed and what was told."""
        command = [sys.executable, "-m", "pu_ray", "submit", str(job), "--address", self.address, "--wait", "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=400
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A head with six logical CPUs and token authentication."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    gcs, dashboard, agent, client, metrics = free_ports(5)
    command = ["ray", "start", "--head", "--block", "--num-cpus=6", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--object-store-memory={200 * 2**20}"]
    with open(home / "ray.log", "wb") as log:
        ray = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    token = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    try:
        for _ in range(120):
            time.sleep(0.5)
            assert ray.poll() is None, (home / "ray.log").read_text()[-2000:]
            try:
                if httpx.get(f"{address}/api/jobs/", headers=token).is_success:
                    break
            except httpx.TransportError:
                continue
        else:
            raise AssertionError((home / "ray.log").read_text()[-2000:])
        yield Started(address, environment)
    finally:
        os.killpg(ray.pid, signal.SIGTERM)
        ray.wait(60)


def test_without_the_token_nothing_is_submitted(started: Started, task: Path, tmp_path: Path) -> None:
    for variables in ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        status, _, told = started.submit(write_job(task, tmp_path), **variables)
        assert status == 4, told
        assert "refused the token" in told
        assert started.environment["RAY_AUTH_TOKEN"] not in told
    jobs = httpx.get(
        f"{started.address}/api/jobs/", headers={"Authorization": f"Bearer {started.environment['RAY_AUTH_TOKEN']}"}
    )
    assert jobs.json() == []


def test_a_submitted_job_mines_every_row_and_is_not_done_twice(started: Started, task: Path, tmp_path: Path) -> None:
    job = write_job(task, tmp_path)
    status, result, told = started.submit(job)
    assert status == 0, told
    assert (result["action"], result["status"]) == ("submitted", "SUCCEEDED")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["lake_rows"] == SMALL.lake_rows
    assert summary["scored_rows"] + summary["error_rows"] == SMALL.lake_rows
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*/manifest.json")}
    status, result, told = started.submit(job)
    assert (status, result["action"], result["status"]) == (0, "resubmitted", "SUCCEEDED"), told
    assert {file: file.stat().st_mtime_ns for file in made} == made, "finished stages stay as they are"
