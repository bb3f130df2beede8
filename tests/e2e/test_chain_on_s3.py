"""The whole chain with everything on S3, through a proxy that throttles, resets and stalls: the same result."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from moto.server import ThreadedMotoServer

from pu_ray.lease import FILE_NAME
from pu_ray.storage import Storage
from tests.e2e.conftest import pu_ray, write_job
from tests.fault_proxy import FaultProxy

SECRET = "not-for-any-log"
RATES = {
    "slow_down": 0.04,
    "internal": 0.01,
    "too_many": 0.01,
    "reset": 0.03,
    "lost": 0.01,
    "cut": 0.02,
    "stall": 0.003,
}


def environment(endpoint: str) -> dict[str, str]:
    """Where S3 is and who asks: for the command only, not for this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return kept | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PU_RAY_S3_TIMEOUT_S": "3",
    }


@pytest.fixture
def server(task: Path) -> Iterator[str]:
    """An S3 server that holds the task, in the bucket `data`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.post(f"{url}/moto-api/reset").raise_for_status()
    httpx.put(f"{url}/data").raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(url).items():
            patch.setenv(name, value)
        uploaded = Storage("s3://data/task")
        for file in Storage(str(task)).list_files():
            uploaded.write_bytes(file.path, (task / file.path).read_bytes())
    yield url
    server.stop()


def on_s3(task: Path, folder: Path) -> Path:
    """The local run's job with every path moved to the bucket."""
    path = write_job(task, folder)
    text = path.read_text().replace(str(task), "s3://data/task").replace(str(folder / "run"), "s3://data/run")
    assert str(folder) not in text
    assert yaml.safe_load(text)["output"] == "s3://data/run"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_chain_on_s3_in_bad_weather_ends_where_the_local_one_does(
    task: Path, finished: tuple[Path, Any, Any], server: str, tmp_path: Path
) -> None:
    job = on_s3(task, tmp_path)
    with FaultProxy(server, seed=3, rates=RATES, stall_s=60) as proxy:
        done = pu_ray("run", str(job), "--json", env=environment(proxy.url))
        assert done.returncode == 0, done.stderr[-5000:]
        counts = dict(proxy.counts)
        targets = {request.target for request in proxy.requests}
    assert min(counts[fault] for fault in RATES) > 0, counts
    assert counts["slow_down"] > 20
    summary, local = json.loads(done.stdout), finished[1]
    for name in ("lake_rows", "scored_rows", "error_rows", "mined_rows", "recall_promise"):
        assert summary[name] == local[name], name
    assert summary["lake_rows"] == summary["scored_rows"] + summary["error_rows"]
    assert SECRET not in done.stdout + done.stderr

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server).items():
            patch.setenv(name, value)
        output = Storage("s3://data/run")
        selected = output.read_table("selection/selection.parquet")
        assert selected.equals(pq.read_table(finished[0] / "run/selection/selection.parquet"))
        # Nothing was left behind: no lock, no half-written file that a listing shows.
        assert output.read_if_there(FILE_NAME) is None
        recorded = {
            f"{stage}/{path}": size
            for stage in ("features", "scores", "mined", "student", "exported")
            for path, size in output.read_json(f"{stage}/manifest.json")["files"].items()
        }
        sizes = {file.path: file.size_bytes for file in output.list_files()}
        assert recorded.items() <= sizes.items()
        for path in ("summary.json", "report.html", "features/manifest.json"):
            assert SECRET.encode() not in output.read_bytes(path)
    assert any("/data/task/lake" in target for target in targets)
