"""A Ray head started by hand with `ray start`, for tests that come to a cluster as a user does."""

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]

_HEAD_NODE = "f" * 51 + "00000"  # an id is 28 bytes in hexadecimal; the provider counts on from here
_HEAD_TYPE = "ray.head.default"  # so the provider calls it, whatever the file says
_UPDATE_S = 1


@dataclass(frozen=True)
class Head:
    """A cluster of `ray start --head`.

    Attributes:
        address: The dashboard's URL.
        gcs: Where nodes and drivers connect.
        environment: Of a client that knows the token.
        home: Its folder; `ray.log` is what it printed.
    """

    address: str
    gcs: str
    environment: dict[str, str]
    home: Path

    @property
    def token(self) -> dict[str, str]:
        """Headers of a request that is let in."""
        return {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}

    def get(self, path: str) -> Any:
        """What the dashboard answers."""
        return httpx.get(f"{self.address}{path}", headers=self.token, timeout=30).raise_for_status().json()

    def pu_ray(self, *arguments: str, **variables: str) -> tuple[int, dict[str, Any], str]:
        """Exit status, what was printed and what was told; `--json` is added, and the address."""
        command = [sys.executable, "-m", "pu_ray", *arguments, "--address", self.address, "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=500
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def run(self, verb: str, job: Path) -> tuple[str, str]:
        """Status and log of a verb of `pu-ray` as a job of this cluster, without a working directory that travels.

        Nodes that are processes on one machine share the folder of such directories, and each empties it at its start.
        """
        client = httpx.Client(base_url=self.address, headers=self.token, timeout=30)
        request = {
            "entrypoint": f"{sys.executable} -m pu_ray {verb} {job} --json",
            "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
        }
        name = client.post("/api/jobs/", json=request).raise_for_status().json()["submission_id"]
        while (status := client.get(f"/api/jobs/{name}").json()["status"]) in ("PENDING", "RUNNING"):
            time.sleep(0.5)
        return status, client.get(f"/api/jobs/{name}/logs").json()["logs"]

    def drivers(self) -> list[int]:
        """Process ids of what submitted jobs run on this cluster."""
        found = []
        for process in self._processes():
            with contextlib.suppress(OSError):
                if (process / "cmdline").read_bytes().split(b"\0")[1:4] == [b"-m", b"pu_ray", b"run"]:
                    found.append(int(process.name))
        return found

    def _processes(self) -> Iterator[Path]:
        home = f"HOME={self.environment['HOME']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if home in (process / "environ").read_bytes().split(b"\0"):
                    yield process

    def end_all(self) -> None:
        """End whatever still runs with this home: nodes that the autoscaler started are nobody's children."""
        for process in self._processes():
            with contextlib.suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextlib.contextmanager
def started(home: Path, *, cpus: int, node_types: Mapping[str, Any] | None = None) -> Iterator[Head]:
    """A head with token authentication, ended with all its nodes.

    Args:
        home: An empty folder, the home of everything that runs.
        cpus: Logical CPUs of the head.
        node_types: Kinds of nodes that Ray's autoscaler may start, as under `available_node_types` of a cluster file;
            each node is a raylet on this machine with as many logical resources as its kind says.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    gcs, dashboard, agent, client, metrics = free_ports(5)
    command = ["ray", "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--object-store-memory={200 * 2**20}"]
    variables = {}
    if node_types is not None:
        (home / "autoscaling.json").write_text(json.dumps(_autoscaling(f"127.0.0.1:{gcs}", cpus, node_types)))
        command.append(f"--autoscaling-config={home / 'autoscaling.json'}")
        variables = {
            "PYTHONPATH": str(ROOT),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_NODE,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_NODE,
            "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": str(_UPDATE_S),
        }
    with open(home / "ray.log", "wb") as log:
        ray = subprocess.Popen(
            command, env=environment | variables, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, home)
    try:
        for _ in range(120):
            time.sleep(0.5)
            assert ray.poll() is None, (home / "ray.log").read_text()[-2000:]
            try:
                head.get("/api/jobs/")
            except (httpx.TransportError, httpx.HTTPStatusError):
                continue
            break
        else:
            raise AssertionError((home / "ray.log").read_text()[-2000:])
        yield head
    finally:
        os.killpg(ray.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            ray.wait(60)
        head.end_all()


def _autoscaling(gcs: str, cpus: int, node_types: Mapping[str, Any]) -> dict[str, Any]:
    """What `ray up` would leave on a head, for nodes that are processes."""
    return {
        "cluster_name": "test",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "tests.fake_nodes.FakeNodes",
            "launch_multiple": True,
            "head_node_id": _HEAD_NODE,
            "gcs_address": gcs,
        },
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}} | dict(kind) for name, kind in node_types.items()},
        },
        "head_node_type": _HEAD_TYPE,
        # Nothing is set up and nobody logs in, but Ray looks for these.
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{
            key: []
            for key in (
                "initialization_commands",
                "setup_commands",
                "head_setup_commands",
                "worker_setup_commands",
                "head_start_ray_commands",
                "worker_start_ray_commands",
                "cluster_synced_files",
            )
        },
    }
