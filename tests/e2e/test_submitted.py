"""A job submitted through Ray's Jobs API to a cluster that somebody else started, with its token and without."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import SMALL, write_job
from tests.head import Head, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with six logical CPUs and token authentication."""
    with started(tmp_path_factory.mktemp("home"), cpus=6) as running:
        yield running


def test_without_the_token_nothing_is_submitted(head: Head, task: Path, tmp_path: Path) -> None:
    for variables in ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        status, _, told = head.pu_ray("submit", str(write_job(task, tmp_path)), **variables)
        assert status == 4, told
        assert "refused the token" in told
        assert head.environment["RAY_AUTH_TOKEN"] not in told
    assert head.get("/api/jobs/") == []


def test_a_submitted_job_mines_every_row_and_is_not_done_twice(head: Head, task: Path, tmp_path: Path) -> None:
    job = write_job(task, tmp_path)
    status, result, told = head.pu_ray("submit", str(job), "--wait")
    assert status == 0, told
    assert (result["action"], result["status"]) == ("submitted", "SUCCEEDED")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["lake_rows"] == SMALL.lake_rows
    assert summary["scored_rows"] + summary["error_rows"] == SMALL.lake_rows
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*/manifest.json")}
    status, result, told = head.pu_ray("submit", str(job), "--wait")
    assert (status, result["action"], result["status"]) == (0, "resubmitted", "SUCCEEDED"), told
    assert {file: file.stat().st_mtime_ns for file in made} == made, "finished stages stay as they are"


def test_a_job_whose_driver_was_killed_goes_on_and_scores_no_shard_again(
    head: Head, task: Path, tmp_path: Path
) -> None:
    # In many shards, so that some are finished when the driver dies.
    images = pa.concat_tables(pq.read_table(file) for file in sorted((task / "lake").glob("*.parquet")))
    (tmp_path / "lake").mkdir()
    for first in range(0, images.num_rows, 75):
        pq.write_table(images.slice(first, 75), tmp_path / f"lake/{first:05d}.parquet", row_group_size=25)
    job = write_job(task, tmp_path, lake={"uri": str(tmp_path / "lake")})
    status, result, told = head.pu_ray("submit", str(job))
    assert (status, result["action"]) == (0, "submitted"), told
    ledger = tmp_path / "run/features/ledger"
    deadline = time.monotonic() + 200
    while not any(ledger.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (driver,) = head.drivers()
    os.kill(driver, signal.SIGKILL)
    status, result, told = _ended(head, result["submission_id"])
    assert result["status"] == "FAILED", told
    assert not (tmp_path / "run/features/manifest.json").exists(), "killed too late to show anything"
    before = {file: file.stat().st_mtime_ns for file in ledger.glob("*.json")}
    status, result, told = head.pu_ray("submit", str(job), "--wait")
    assert (status, result["action"], result["status"]) == (0, "resubmitted", "SUCCEEDED"), told
    assert {file: file.stat().st_mtime_ns for file in before} == before
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["scored_rows"] + summary["error_rows"] == SMALL.lake_rows


def _ended(head: Head, submission: str) -> tuple[int, dict[str, Any], str]:
    for _ in range(30):
        code, result, told = head.pu_ray("status", submission)
        if result["status"] not in ("PENDING", "RUNNING"):
            return code, result, told
        time.sleep(1)
    raise AssertionError(f"it did not end: {result}")
