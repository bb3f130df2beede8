"""A real Ray: what a private one says and writes, and what the checks see of a running one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import preflight
from cluster.session import ray_session
from pu_ray.config import JobConfig, resolve
from pu_ray.errors import ClusterError

ROOT = Path(__file__).parents[2]

# The driver runs elsewhere, so that workers find pu_ray only if the session sees to it.
QUIET_SCRIPT = """
from cluster.session import ray_session

class Double:
    def __init__(self):
        import pu_ray
        print("a worker speaks")
    def __call__(self, batch):
        return {"id": batch["id"] * 2}

with ray_session(address=None, verbose=False, needed_cpus=2) as session:
    import ray.data
    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=1)
    rows = ray.data.range(40, override_num_blocks=2).map_batches(Double, batch_size=16, compute=pool).take_all()
    assert sum(row["id"] for row in rows) == 1560
    assert session.kind == "started" and session.cpus >= 6
"""


def job(output: Path, **resources: object) -> JobConfig:
    settings = {
        "name": "check",
        "output": str(output),
        "teacher": {"architecture": "cifar/resnet8-w16", "weights": "weights", "classes": "classes"},
        "labeled": {"uri": "labeled"},
        "test": {"uri": "test"},
        "lake": {"uri": str(output.parent / "lake")},
        "student": {"architecture": "cifar/resnet8-w16"},
        "resources": resources,
    }
    return resolve([("test", settings)]).job


@pytest.mark.integration
def test_a_private_ray_prints_nothing_and_leaves_no_token_at_home(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", QUIET_SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_preflight_sees_the_running_ray(ray_cluster: object, tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    with ray_session(address=None, verbose=False, needed_cpus=1) as session:
        assert session.kind == "found"
        report = preflight.check(job(tmp_path / "run"))
        assert report.waiting_for == ()
        assert report.capacity.total["CPU"] == session.cpus
        with pytest.raises(ClusterError, match=r"mining needs 10001\.2 CPU at once"):
            preflight.check(job(tmp_path / "run", embed={"cpus": 10_000}))
    import ray

    assert ray.is_initialized()  # a session that was found is left running
