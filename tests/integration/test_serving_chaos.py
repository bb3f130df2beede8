"""A replica is killed under steady load: our client sees no failed request."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve

from pu_ray.errors import PuRayError
from serving import app, client
from serving.settings import settings_from
from tests.integration.test_serving import free_port
from tests.unit.serving.students import png, write_student

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(params=["inside", "apart"])
def placement(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(ray_cluster: object, placement: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = write_student(tmp_path_factory.mktemp("chaos"))
    settings = settings_from({"authentication": "off", "replicas": 2, "placement": placement})
    yield app.deploy([uri], settings, port=free_port())
    serve.shutdown()


def replica_pids(placement: str) -> list[int]:
    """Processes that answer; their title says who they are."""
    title = b"ServeReplica:pu-ray" if placement == "inside" else b"ServeReplica:student-pets"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if title in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def test_a_killed_replica_costs_no_request(url: str, placement: str) -> None:
    stop = threading.Event()
    answered: Counter[str] = Counter()
    failed: list[str] = []

    def asking() -> None:
        with client.Client(url) as own:
            while not stop.is_set():
                try:
                    answered[own.classify(png(1)).predictions[0].label] += 1
                except PuRayError as error:
                    failed.append(str(error))

    def watching() -> None:
        # What a client without patience sees.
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as web:
            while not stop.is_set():
                status = web.post("/v1/classify", content=png(1), headers={"Content-Type": "image/png"}).status_code
                raw[status] += 1

    raw: Counter[int] = Counter()
    threads = [threading.Thread(target=target) for target in (asking, asking, watching)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2)
        before = sum(answered.values())
        victims = replica_pids(placement)
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        # Until another process has taken its place.
        while len([pid for pid in replica_pids(placement) if pid != victims[0]]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert len(answered) == 1, "always the same answer"
    assert sum(answered.values()) > before + 20
    # Nobody stands before a process that answers by itself, but for Serve's proxy, which says 500 for what it lost.
    assert set(raw) <= {200, 503} | ({500} if placement == "inside" else set()), raw
    assert raw[500] <= 3
    print(f"{sum(answered.values())} answered; without patience: {dict(raw)}")
