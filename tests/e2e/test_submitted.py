"""A job submitted through Ray's Jobs API to a cluster that somebody else started, with its token and without."""

from __future__ import annotations

import contextlib
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

    def submit(self, job: Path, *, wait: bool = True, **variables: str) -> tuple[int, dict[str, Any], str]:
        """Exit status, what was printed and what was told."""
        command = [sys.executable, "-m", "pu_ray", "submit", str(job), "--address", self.address, "--json"]
        command += ["--wait"] if wait else []
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=400
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def drivers(self) -> list[int]:
        """Process ids of what submitted jobs run on this cluster."""
        found = []
        home = f"HOME={self.environment['HOME']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"pu_ray", b"run"] and home in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found


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


def test_a_job_whose_driver_was_killed_goes_on_and_scores_no_shard_again(
    started: Started, task: Path, tmp_path: Path
) -> None:
    job = write_job(task, tmp_path)
    status, result, told = started.submit(job, wait=False)
    assert (status, result["action"]) == (0, "submitted"), told
    ledger = tmp_path / "run/features/ledger"
    deadline = time.monotonic() + 200
    while not any(ledger.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (driver,) = started.drivers()
    os.kill(driver, signal.SIGKILL)
    status, result, told = _ended(started, result["submission_id"])
    assert result["status"] == "FAILED", told
    assert not (tmp_path / "run/features/manifest.json").exists(), "killed too late to show anything"
    before = {file: file.stat().st_mtime_ns for file in ledger.glob("*.json")}
    status, result, told = started.submit(job)
    assert (status, result["action"], result["status"]) == (0, "resubmitted", "SUCCEEDED"), told
    assert {file: file.stat().st_mtime_ns for file in before} == before
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["scored_rows"] + summary["error_rows"] == SMALL.lake_rows


def _ended(started: Started, submission: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "pu_ray", "status", submission, "--address", started.address, "--json"]
    for _ in range(30):
        done = subprocess.run(
            command, cwd=ROOT, env=started.environment, capture_output=True, text=True, timeout=60, check=False
        )
        result = json.loads(done.stdout)
        if result["status"] not in ("PENDING", "RUNNING"):
            return done.returncode, result, done.stderr
        time.sleep(1)
    raise AssertionError(f"it did not end: {result}")
