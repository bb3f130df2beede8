"""`pu-ray serve --config-out`, deployed by Ray Serve's own command; its metrics, fetched as Prometheus would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_serving import free_port
from tests.unit.serving.students import png, write_student

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120
DASHBOARD = ROOT / "cluster" / "grafana" / "serving.json"
# What only a shadow, a bad picture or an export that knows its certainty brings about.
RARE = {"ray_pu_ray_shadow_images_total", "ray_pu_ray_shadow_agreements_total", "ray_pu_ray_score_drift"}


def settled(condition: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(httpx.HTTPError, FileNotFoundError):
            if found := condition():
                return found
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.5)


@pytest.fixture(scope="module", params=["inside", pytest.param("apart", marks=pytest.mark.slow)])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The server's URL and Ray's folder."""
    folder = tmp_path_factory.mktemp("deployed")
    uri, port = write_student(folder / "pets"), free_port()
    # A short path: Ray's sockets lie in it.
    temporary = Path("/tmp") / f"pu-ray-{os.getpid()}-{request.param}"
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
    }
    temporary.mkdir()
    written = [sys.executable, "-m", "pu_ray", "serve", uri, "--placement", request.param, "--port", str(port)]
    subprocess.run(
        [*written, "--no-auth", "--config-out", str(folder / "serve.yaml")], env=environment, cwd=ROOT, check=True
    )
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "serve.yaml")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False) as web:
            settled(lambda: web.get("/v2/health/ready").status_code == 200)
        yield url, temporary
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(temporary, ignore_errors=True)
        print((folder / "log").read_text()[-5000:])


def test_it_answers_and_is_measured(deployed: tuple[str, Path]) -> None:
    url, temporary = deployed
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as web:
        for seed in range(3):
            response = web.post("/v1/classify", content=png(seed), headers={"Content-Type": "image/png"})
            assert response.status_code == 200, response.text
            assert response.json()["model"] == "pets"
        assert web.post("/v1/classify", content=b"GIF89a", headers={"Content-Type": "image/gif"}).status_code == 422

        def scraped() -> str | None:
            """All of Ray's metrics, once the four requests and every process are in them."""
            found = sorted(temporary.rglob("prom_metrics_service_discovery.json"))
            targets = {
                target for file in found for entry in json.loads(file.read_text()) for target in entry["targets"]
            }
            text = "\n".join(web.get(f"http://{target}/metrics").text for target in targets)
            counts = re.findall(
                r'ray_pu_ray_responses_total\{.*route="/v1/classify",status="(?:200|422)".*\} (\d)', text
            )
            missing = drawn - set(re.findall(r"^(ray_pu_ray_\w+)\{", text, re.MULTILINE)) - RARE
            return text if sum(map(int, counts)) == 4 and not missing else None

        drawn = set(re.findall(r"ray_pu_ray_\w+", DASHBOARD.read_text()))
        text = settled(scraped)
    assert len(drawn) > len(RARE)
    assert re.search(r'ray_pu_ray_predictions_total\{.*label=".*model="pets".*\} \d', text)
