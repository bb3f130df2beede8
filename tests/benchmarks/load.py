"""Load from wrk: a closed loop of one request over a number of connections, and what came of it.

wrk is written in C and shares the machine with the server that it asks, so it must cost little, which a client in
Python does not. Connections are kept open; a connection sends its next request when its answer is there.

Latencies are as wrk gives them: it adds the requests that could not be sent while one took more than twice the mean, so
that the tail of a server that stalls is not flattered. An answer of status 400 and more counts as `not_ok`.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("load.lua")
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Request:
    """A POST request.

    Attributes:
        path: With the query.
        headers: By name; the body's length is not among them.
        body: Its bytes.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Load:
    """What a closed loop measured.

    Attributes:
        requests: Answered, whatever the answer.
        seconds: Of the loop.
        failed: Answers of status 400 and more, connections refused or broken, and answers that took too long.
        p50_ms: Median latency.
        p99_ms: The latency that one request of a hundred exceeds.
        mean_ms: Mean latency.
    """

    requests: int
    seconds: float
    failed: int
    p50_ms: float
    p99_ms: float
    mean_ms: float

    @property
    def per_s(self) -> float:
        """Good answers per second."""
        return max(0, self.requests - self.failed) / self.seconds


class LoadError(Exception):
    """wrk is not there, or did not say what it measured."""


def parse(output: str) -> Load:
    """What `load.lua` printed, behind wrk's own report.

    Raises:
        LoadError: It printed nothing of the kind.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            failed = sum(said[kind] for kind in ("not_ok", "connect", "read", "write", "timeout"))
            return Load(
                requests=said["requests"],
                seconds=said["duration_us"] / 1e6,
                failed=failed,
                p50_ms=said["p50_us"] / 1e3,
                p99_ms=said["p99_us"] / 1e3,
                mean_ms=said["mean_us"] / 1e3,
            )
    raise LoadError(f"wrk printed no line of JSON but\n{output}")


def press(request: Request, *, port: int, concurrency: int, seconds: int, body_file: Path) -> Load:
    """Ask a server on this machine again and again.

    Args:
        request: What is asked.
        port: TCP port on the loopback address.
        concurrency: Requests under way at any time.
        seconds: How long.
        body_file: Where the body is put for wrk to read.

    Raises:
        LoadError: wrk is not installed, or failed.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise LoadError("wrk is not installed; `make peers` installs Debian's package")
    body_file.write_bytes(request.body)
    command = [wrk, "-t1", f"-c{concurrency}", f"-d{seconds}s", f"--timeout={_TIMEOUT_S}s", "-s", str(_SCRIPT)]
    command += [f"http://127.0.0.1:{port}{request.path}", "--", str(body_file)]
    command += [f"{name}: {value}" for name, value in request.headers.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise LoadError(f"wrk exited with {done.returncode} and said\n{done.stdout}")
    return parse(done.stdout)


def ask(request: Request, *, port: int, timeout_s: float = _TIMEOUT_S) -> tuple[int, bytes]:
    """One request: status and body of the answer.

    Raises:
        OSError, http.client.HTTPException: Nobody answers.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
