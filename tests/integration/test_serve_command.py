"""`pu-ray serve` as a process: what it starts answers, is as light and as quick as it should be, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.test_serving import free_port
from tests.unit.serving.students import png, write_student

pytestmark = pytest.mark.timeout(300)


def replicas() -> list[Path]:
    """Folders in /proc of the processes that answer."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:pu-ray" in (entry / "cmdline").read_bytes():
                found.append(entry)
        except OSError:
            continue
    return found


def nice(process: Path) -> str:
    """A process's nice level, as proc(5) has it."""
    behind_the_name = (process / "stat").read_text().rpartition(")")[2].split()
    return behind_the_name[16]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    arguments = ["serve", write_student(tmp_path / "pets"), "--port", str(port), "--no-auth"]
    # A Ray of its own, whatever this process is connected to.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-m", "pu_ray", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        yield f"http://127.0.0.1:{port}", child
        if child.poll() is None:
            child.kill()


def test_a_server_is_light_and_runs_at_normal_priority(command: tuple[str, subprocess.Popen[str]]) -> None:
    url, child = command
    known = {entry.name for entry in replicas()}
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("serving at"):
            break
    headers = {"Content-Type": "image/png"}
    answer = httpx.post(f"{url}/v1/classify", content=png(1), headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    (process,) = [entry for entry in replicas() if entry.name not in known]
    assert nice(process) == nice(Path("/proc") / str(child.pid))
    assert "/pandas/" not in (process / "maps").read_text()
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 130
    deadline = time.monotonic() + 30
    while process.exists():
        assert time.monotonic() < deadline, "the process outlives the server"
        time.sleep(0.2)
